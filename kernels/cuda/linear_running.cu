// linear_running.cu -- the largest of all numbers up to each. A warp does a row.
#include "linear.cuh"

struct RunningArguments {
    Sum* running;               // (rows, columns)
    int rows, columns;
};

extern "C" __global__ void __launch_bounds__(THREADS)
linear_running(const __grid_constant__ RunningArguments a) {
    const int number = blockIdx.x * WARPS + threadIdx.x / 32;
    if (number >= a.rows)
        return;
    Sum* row = a.running + i64(number) * a.columns;
    Sum before = -INFINITE;
    for (int first = 0; first < a.columns; first += 32) {
        const int column = first + lane_number();
        Sum most = column < a.columns ? row[column] : -INFINITE;
        UNROLL
        for (int apart = 1; apart < 32; apart *= 2) {
            const Sum other = __shfl_up_sync(~0u, most, apart);
            if (lane_number() >= apart)
                most = larger_number(most, other);
        }
        most = larger_number(before, most);
        if (column < a.columns)
            row[column] = most;
        before = __shfl_sync(~0u, most, 31);
    }
}
