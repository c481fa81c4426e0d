// talking_heads_join.cu -- talking heads, backward: adds up what blocks found of the gradients of
// the matrices that mix. A block does 32 numbers; each warp adds some blocks' in order, in double.
#include "primitives.cuh"

#if DOUBLE
typedef double Sum;
#else
typedef float Sum;
#endif

struct JoinArguments {
    const Sum* parts;       // (blocks, numbers)
    Sum* results;           // (numbers,)
    int blocks, numbers;
};

extern "C" __global__ void __launch_bounds__(THREADS)
talking_heads_join(const __grid_constant__ JoinArguments a) {
    enum { WARPS = THREADS / 32 };
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int number = blockIdx.x * 32 + lane;
    double sum = 0;
    if (number < a.numbers)
        for (int block = warp; block < a.blocks; block += WARPS)
            sum += a.parts[i64(block) * a.numbers + number];
    store_shared(shared_base() + threadIdx.x * 8, sum);
    __syncthreads();
    if (warp > 0 || number >= a.numbers)
        return;
    for (int other = 1; other < WARPS; other++)
        sum += load_shared<double>(shared_base() + (other * 32 + lane) * 8);
    a.results[number] = sum;
}
