// linear_tops.cu -- the stabilisers of keys with features of kind EXP, and the largest of TOKENS
// keys each. A block does TOKENS keys.
#include "linear.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
linear_tops(const __grid_constant__ LinearArguments a) {
    const Block block(a);
    const int first = blockIdx.y * TOKENS;
    const int count = clipped(a.kv_lengths[block.batch] - first, TOKENS);
    fetch_projection(a, block);
    fetch(block.raw_x, a.x, block.batch, block.group, first, count, a.d);
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    const Projected projected(a, block, block.x, block.raw_x, count);
    UNROLL
    for (int h = 0; h < 2; h++) {
        const int row = block.row(h);
        const Sum square = half_square(block.x, row);
        const Sum top = row < count ? projected.most[h] - square : -INFINITE;
        if (block.part == 0 && pair_of_lane() == 0) {
            store_sum(block.tops, row, top);
            if (row < count)
                const_cast<Sum*>(a.tops)[i64(blockIdx.x) * a.m + first + row] = top;
        }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        Sum most = -INFINITE;
        for (int row = lane_number(); row < TOKENS; row += 32)
            most = larger_number(most, shared_sum(block.tops, row));
        UNROLL
        for (int apart = 16; apart > 0; apart /= 2)
            most = larger_number(most, __shfl_xor_sync(~0u, most, apart));
        if (threadIdx.x == 0)
            const_cast<Sum*>(a.running)[i64(blockIdx.x) * (a.chunks + 1) + 1 + blockIdx.y] = most;
    }
}
