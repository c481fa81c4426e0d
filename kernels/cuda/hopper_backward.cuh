// What both kernels of the backward for Hopper share. A block owns 64 GROUPS rows, of queries or of
// keys, and walks the others 64 at a time:
//
//     hopper_backward_keys.cu         S' = K Q', dP' = V dO', dV += P' dO, dK += dS' Q
//     hopper_backward_queries.cu      S = Q K',  dP = dO V',  dQ += dS K
//
// with P = exp(S - lse), dS = P (dP - delta). So scores are computed twice, but nothing is added up
// by more than one block: results do not depend on the order of blocks, and no workspace is needed.
#pragma once
#include "hopper_tiles.cuh"

enum {
    OWN_BYTES = ROWS * ROW_BYTES,       // of one operand
    TILE_BYTES = TILE * ROW_BYTES,
    STAGE_BYTES = 2 * TILE_BYTES,
    BITS_BYTES = ROWS * TILE / 8,
    VALUES_BYTES = 2 * 4 * TILE,        // lse and delta of 64 queries

    // shared memory
    WALKED = 2 * OWN_BYTES,
    BITS = WALKED + STAGES * STAGE_BYTES,
    ROW_VALUES = BITS + STAGES * BITS_BYTES,
    NOTES = ROW_VALUES + STAGES * VALUES_BYTES,
    FOUND = NOTES + STAGES * NOTE,      // what inspectors tell
    BARRIERS = FOUND + STAGES * NOTE,
    SHARED_BYTES = BARRIERS + 8 * (2 + 5 * STAGES),

    INSPECTORS = 2,                     // warps
    TOGETHER = 1                        // named barriers of the groups
};

struct Barriers {
    u32 own_full, own_empty;
    u32 full, empty, scouted, scored, inspected;    // the first of STAGES
};

struct BackwardArguments {
    TensorMap q, k, v, dout;
    StepLists lists;
    Rows walked[2];             // the walked operands once more: q and dout, or k and v
    const int4* items;          // in the order in which blocks take them
    const int* q_lengths;       // (batch,)
    const int* kv_lengths;
    const float* scale;         // (heads,)
    const int* steps;           // (batch, heads, lines): of each line, for keys
    const float* lse;           // (batch, heads, n)
    const float* delta;
    u16* dq;                    // (batch, heads, n, D)
    u16* dk;                    // (batch, groups, m, D)
    u16* dv;
    float* dscale;              // (batch, heads, n): each row's part
    int item_count, heads, groups, group_heads, n, m;
};

DEVICE Barriers initialise(u32 shared) {
    const u32 first = shared + BARRIERS;
    const u32 all = 8 * STAGES;
    const Barriers at = {first, first + 8, first + 16, first + 16 + all, first + 16 + 2 * all,
                         first + 16 + 3 * all, first + 16 + 4 * all};
    if (threadIdx.x == 0) {
        mbarrier_init(at.own_full, 1);
        mbarrier_init(at.own_empty, COMPUTING_WARPS);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(at.full + 8 * i, 1);
            mbarrier_init(at.empty + 8 * i, COMPUTING_WARPS + INSPECTORS);
            mbarrier_init(at.scouted + 8 * i, 1);
            mbarrier_init(at.scored + 8 * i, COMPUTING_WARPS);
            mbarrier_init(at.inspected + 8 * i, INSPECTORS);
        }
        mbarrier_fence();
    }
    __syncthreads();
    return at;
}

// Cleans the first `bytes` of stages with masked pairs, once the products that read them whole are
// done.
DEVICE void inspect_stages(const BackwardArguments& a, int bytes, u32 shared, const Barriers& at) {
    const int thread = threadIdx.x - 2 * WARP;
    const int threads = WARP * INSPECTORS;
    Turn<STAGES> turn;
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x)
        for (int left = item_of(a.items, number).steps; left > 0; left--) {
            const u32 tile = shared + WALKED + turn.stage * STAGE_BYTES;
            mbarrier_wait(at.scouted + 8 * turn.stage, turn.parity);
            mbarrier_wait(at.full + 8 * turn.stage, turn.parity);
            if (read_note(shared + NOTES + turn.stage * NOTE).masked
                && inspect(tile, bytes, shared + FOUND + turn.stage * NOTE, thread, threads)) {
                mbarrier_wait(at.scored + 8 * turn.stage, turn.parity);
                clean(tile, bytes, thread, threads);
            }
            release(at.inspected + 8 * turn.stage);
            release(at.empty + 8 * turn.stage);
            turn.advance();
        }
}

// 64 of the block's own rows times 64 walked ones.
DEVICE void start_scores(float (&scores)[TILE / 2], u32 own, u32 walked) {
    wgmma_fence();
    UNROLL
    for (int i = 0; i < D / 16; i++) {
        const u32 column = i % 4 * 32;
        const u64 a = matrix_descriptor(own + i / 4 * ROWS * PANEL_ROW + column, 16, 1024);
        const u64 b = matrix_descriptor(walked + i / 4 * TILE * PANEL_ROW + column, 16, 1024);
        wgmma_ss<BRAIN, false>(scores, a, b, i > 0);
    }
    wgmma_commit();
}

// sums (64 x D) += weights (64 x 64) times walked rows.
DEVICE void start_sums(float (&sums)[D / 2], u32 (&weights)[TILE / 16][4], u32 walked) {
    wgmma_fence();
    UNROLL
    for (int i = 0; i < TILE / 16; i++) {
        const u64 b = matrix_descriptor(walked + 16 * i * PANEL_ROW, TILE * PANEL_ROW, 1024);
        wgmma_rs<BRAIN, true>(sums, weights[i], b, true);
    }
    wgmma_commit();
}

DEVICE void round_weights(u32 (&weights)[TILE / 16][4], const float (&x)[TILE / 2]) {
    UNROLL
    for (int i = 0; i < TILE / 16; i++)
        UNROLL
        for (int j = 0; j < 4; j++)
            weights[i][j] = pack(x[8 * i + 2 * j], x[8 * i + 2 * j + 1]);
}

DEVICE void clear(float (&sums)[D / 2]) {
    UNROLL
    for (int i = 0; i < D / 2; i++)
        sums[i] = 0.0f;
}

DEVICE void hide(float (&x)[TILE / 2], u32 bits, int group) {
    u64 rows[2];
    read_bits<1>(rows, bits, group, 0);
    mask(x, 0, rows, 0.0f);
}
