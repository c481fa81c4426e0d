// selected_join.cu -- selected attention, backward: adds up what the pieces of a block of keys
// found. A thread does a number; the order is that of the pieces.
#include "primitives.cuh"

#if DOUBLE
typedef double Sum;
#else
typedef float Sum;
#endif

struct Divided {
    int line, block, first, last;       // sums of its own from `first` to `last` - 1
};

struct JoinArguments {
    const Divided* blocks;
    Sum* results;           // (lines, m, width)
    const Sum* parts;       // (parts, block_size, width)
    int block_size, m, width;
    int chunks;             // of THREADS numbers, in a block of keys
};

extern "C" __global__ void __launch_bounds__(THREADS)
selected_join(const __grid_constant__ JoinArguments a) {
    const Divided it = a.blocks[blockIdx.x / a.chunks];
    const i64 key = i64(it.block) * a.block_size;
    const i64 numbers = min(i64(a.block_size), a.m - key) * a.width;
    const i64 i = i64(blockIdx.x % a.chunks) * THREADS + threadIdx.x;
    if (i >= numbers)
        return;
    Sum* result = a.results + (i64(it.line) * a.m + key) * a.width + i;
    Sum sum = *result;
    for (int part = it.first; part < it.last; part++)
        sum += a.parts[i64(part) * a.block_size * a.width + i];
    *result = sum;
}
