// selected.cuh -- what the kernels of selected attention share: the problem, who lists which block
// of keys, and how warps divide a block's work. selected.py has the same structs as NumPy dtypes.
//
// Columns come LOAD at a time. Warps do 16 rows each: ROW_WARPS of them all rows, with a share of a
// load's columns, and COLUMN_WARPS such shares the whole load:
//
//     16 rows     warp 0 | warp 2         ROW_WARPS 2, COLUMN_WARPS 2: what warps 2 and 3 have
//     16 rows     warp 1 | warp 3         summed is in the end added to what warps 0 and 1 have
//
// So few rows, the heads of one token, occupy several warps, too.
#pragma once
#include "nonfinite.cuh"
#include "online.cuh"

enum {
    ROWS = 16 * ROW_WARPS,
    SHARE = LOAD / COLUMN_WARPS,
    // columns are looked up two loads ahead, while those of this load are in use
    NOTES = 3
};

struct Problem {
    Operand q, k, v;
    const Sum* scale;           // (heads,)
    const int* q_lengths;       // (batch,)
    const int* kv_lengths;
    const int* offsets;         // position of token 0
    Sum softcap;                // 0 for none
    int batch, heads, groups, n, m, d, e;
    int block_size, causal;
};

DEVICE int warp_number() {
    return threadIdx.x / 32;
}

// The warp's first row in its block.
DEVICE int own_row() {
    return warp_number() % ROW_WARPS * 16;
}

// Which share of a load's columns the warp has.
DEVICE int own_share() {
    return warp_number() / ROW_WARPS;
}

// Keys below this may be seen by a token.
DEVICE int keys_seen(const Problem& p, int batch, int token) {
    if (token >= p.q_lengths[batch])
        return 0;
    const int keys = p.kv_lengths[batch];
    return p.causal ? max(0, min(keys, token + p.offsets[batch] + 1)) : keys;
}

// The score of a product q.k, and how fast it grows with scale * product.
DEVICE Sum score_of(const Problem& p, Sum product, Sum scale, Sum& slope) {
    Sum score = product * scale;
    slope = 1;
#if SOFTCAP
    if (p.softcap > 0) {
        const Sum bent = hyperbolic_tangent(score / p.softcap);
        slope = 1 - bent * bent;
        score = p.softcap * bent;
    }
#endif
    return score;
}

// Turns a product q.k into the pair's weight, and its pull dout.v into the gradient of the scaled
// product. Of a pair that is not `allowed` nothing is looked at.
DEVICE void differentiate(const Problem& p, bool allowed, Sum scale, Sum shift, Sum delta,
                          Sum& product, Sum& pull) {
    Sum slope;
    const Sum score = score_of(p, product, scale, slope);
    // forward: weight = exp(score - lse), out = weights v
    const Sum weight = power((score - shift) * TO_BASE);
    product = allowed ? weight : Sum(0);
    pull = allowed ? weight * (pull - delta) * slope : Sum(0);
}

// Clears what is not finite in the columns that the warps of a block do at `step` of their shares.
template<int WIDTH> DEVICE void clean_step(u32 tile, int step) {
    UNROLL
    for (int share = 0; share < COLUMN_WARPS; share++)
        clean<LOAD, WIDTH>(tile, share * SHARE + step, STEP);
}

// Adds what the warps of the same rows have summed, in the order of their shares, to the first
// one's. `space` is shared memory that nobody needs any more.
template<int TILES> DEVICE void join(Sum (&c)[1][TILES][4], u32 space) {
    if (COLUMN_WARPS == 1)
        return;
    const auto place_of = [&](int share, int i, int x) {
        const int warp = (share - 1) * ROW_WARPS + warp_number() % ROW_WARPS;
        return space + (((warp * TILES + i) * 4 + x) * 32 + lane_number()) * sizeof(Sum);
    };
    if (own_share() > 0)
        UNROLL
        for (int i = 0; i < TILES; i++)
            UNROLL
            for (int x = 0; x < 4; x++)
                store_shared(place_of(own_share(), i, x), c[0][i][x]);
    __syncthreads();
    if (own_share() > 0)
        return;
    _Pragma("unroll 1")
    for (int share = 1; share < COLUMN_WARPS; share++)
        UNROLL
        for (int i = 0; i < TILES; i++)
            UNROLL
            for (int x = 0; x < 4; x++)
                c[0][i][x] += load_shared<Sum>(place_of(share, i, x));
}
