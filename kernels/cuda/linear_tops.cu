// linear_tops.cu -- of features of kind EXP: the largest product of a token with the projection,
// the stabilisers of keys, and the largest of TOKENS keys each. A block does TOKENS keys, or queries
// (then `groups` and `m` are theirs, and there are no `tops`).
#include "linear.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
linear_tops(const __grid_constant__ LinearArguments a) {
    const Block block(a);
    const int first = blockIdx.y * TOKENS;
    const int count = clipped(a.kv_lengths[block.batch] - first, TOKENS);
    Sum most[2] = {-INFINITE, -INFINITE};
    Sum square[2] = {0, 0};
    _Pragma("unroll 1")
    for (int f = 0; f < a.f; f += SIDE) {
        __syncthreads();            // the features before have been found
        fetch_projection(a, block, f, 0);
        fetch(block.raw_x, a.x, block.batch, block.group, first, count, a.d);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        const Tokens tokens = {a.x, block.group, first, count, 0};
        Sum own[2] = {0, 0};
        const Projected projected(a, block, block.x, block.raw_x, tokens, f, [&] {
            UNROLL
            for (int h = 0; h < 2; h++)
                own[h] += half_square(block.x, block.row(h));
        });
        UNROLL
        for (int h = 0; h < 2; h++) {
            most[h] = larger_number(most[h], projected.most[h]);
            square[h] = own[h];
        }
    }
    UNROLL
    for (int h = 0; h < 2; h++) {
        const int row = block.row(h);
        const i64 line = i64(blockIdx.x) * a.m + first + row;
        const Sum top = row < count ? most[h] - square[h] : -INFINITE;
        if (block.part == 0 && pair_of_lane() == 0) {
            store_sum(block.tops, row, top);
            if (row < count && a.key_most)
                const_cast<Sum*>(a.key_most)[line] = most[h];
            if (row < count && a.tops)
                const_cast<Sum*>(a.tops)[line] = top;
        }
    }
    if (!a.tops)
        return;
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
