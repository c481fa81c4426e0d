// additive_backward_keys.cu -- additive attention, backward: gradients of keys and values.
//
// A block of four warps owns a tile of keys of a group, a warp 16 of them. Scores are found again,
// with keys as rows; queries come a tile at a time, through all heads that share the group, in the
// order of the transposed BlockMask:
//
//     weights   (16 x TILE)  = exp(scores - lse)             dv (16 x E) += weights dout
//     gradients (16 x TILE)  = weights (v dout^T - delta)    dk_f += w_f sum_i gradient_i slope_if
//
// dk is added to in memory, by its one owner, as in additive_backward_queries.cu. Each key has one,
// so there are no atomics, and every sum has one order; the price is that tanhs are computed in
// both kernels. A launch sums E columns of dv; the first one has dk, too.
#include "additive_backward.cuh"

struct KeysArguments {
    Problem problem;        // its lists are of lines of keys
    Operand dout;
    const Sum* lse;         // (batch, heads, n)
    const Sum* delta;
    Sum* dk;                // (batch, groups, m, a), zeros; or 0
    Sum* dv;                // (batch, groups, m, dv_width)
    int dv_width, dv_from;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
additive_backward_keys(const __grid_constant__ KeysArguments a) {
    const Problem& p = a.problem;
    const int lines = p.k.tiles;
    const int line = blockIdx.x % lines;
    const int group = blockIdx.x / lines % p.groups;
    const int batch = blockIdx.x / lines / p.groups;
    const int share = p.heads / p.groups;
    const int queries = p.q_lengths[batch];
    const int keys = p.kv_lengths[batch];
    const Tokens rows = tokens_of(p, p.k, batch, group, line, keys);
    const Stored* v = p.v.head(batch, group);

    const u32 planes = shared_base();
    const u32 gradients = planes + PLANES_SIZE;
    const u32 v_tile = gradients + GRADIENTS_SIZE;
    const u32 dout_tile = v_tile + SIZE;
    const int own = threadIdx.x / 32 * 16;              // the warp's first row
    const u32 lse_row = dout_tile + SIZE;
    const u32 delta_row = lse_row + TILE * sizeof(Sum);
    const u32 words = delta_row + TILE * sizeof(Sum) + own * 8;     // for nonfinite.cuh
    const i64 place = (i64(batch) * p.groups + group) * p.m + line * TILE;

    Sum dv[1][E / 8][4];
    clear(dv);
    const int end = rows.there > 0 ? (queries + TILE - 1) / TILE : 0;
    for (int head = group * share; head < (group + 1) * share; head++) {
        const Sum* w = p.w + i64(head) * p.chunks() * FEATURES;
        const Stored* dout = a.dout.head(batch, head);
        Walk<1> walk;
        walk.begin(p.lists, p.lists.layout[batch * p.heads + head], line, 0);
        for (; walk.here(end); walk.advance(p.lists)) {
            const int kind = walk.kind(p.lists, 0);
            const Tokens columns = tokens_of(p, p.q, batch, head, walk.tile, queries);
            const i64 query = (i64(batch) * p.heads + head) * p.n + walk.tile * TILE;
            const bool masked = kind != FULL || columns.there < TILE;
            auto load = [&](int from) {
                load_tokens<TILE, E>(v_tile, v + from, p.v.n, line * TILE, keys, p.e - from);
                load_tokens<TILE, E>(dout_tile, dout + from, a.dout.n, walk.tile * TILE, queries,
                                     p.e - from);
            };
            load(a.dv_from);
            if (threadIdx.x < TILE) {
                const i64 from = query + min(int(threadIdx.x), columns.there - 1);
                const u32 at = threadIdx.x * sizeof(Sum);
                copy_async<sizeof(Sum)>(lse_row + at, a.lse + from, true);
                copy_async<sizeof(Sum)>(delta_row + at, a.delta + from, true);
            }
            commit_copies();

            // forward: score = sum_f w_f tanh_f, weight = exp(score - lse)
            Sum scores[1][TILE / 8][4];
            find_scores(scores[0], p, w, rows, columns, own, own < rows.there, planes);
            RowBits<TILE> bits[2];
            UNROLL
            for (int h = 0; h < 2; h++) {
                const int row = own + 8 * h + row_of_lane();
                bits[h].set(bits_of_row(p.lists, row < rows.there ? kind : NONE, row,
                                        columns.there), 0);
            }
            UNROLL
            for (int i = 0; i < TILE / 8; i++)
                UNROLL
                for (int e = 0; e < 2; e++) {
                    const u32 at = (8 * i + 2 * pair_of_lane() + e) * sizeof(Sum);
                    const Sum shift = shift_of(load_shared<Sum>(lse_row + at));
                    UNROLL
                    for (int h = 0; h < 2; h++) {
                        if (shift == INFINITE)
                            bits[h].hide(i, e);
                        Sum& score = scores[0][i][2 * h + e];
                        const Sum weight = power((score - shift) * TO_BASE);
                        score = bits[h].get(i, e) ? weight : Sum(0);
                    }
                }
            // forward: out = weights v
            const bool bad = (masked || ELEMENT == F32)
                && __syncthreads_or(any_bad<TILE, E>(dout_tile));
            Weights<TILE / 8> weights[1];
            hold(weights[0], scores[0]);
            if (bad) {
                // see nonfinite.cuh
                add_by_weight(words, bits, weights, [&](bool vanished) {
                    add_bad<TILE, E>(dv, dout_tile, 0, TILE, words, vanished);
                });
                __syncthreads();
                clean<TILE, E>(dout_tile, 0, TILE);
                __syncthreads();
            }
            multiply_weights<TILE, E>(dv, weights, dout_tile, 0);
            if (bad || !a.dk)
                __syncthreads();    // the next load overwrites what was just read
            if (!a.dk)
                continue;
            if (bad)
                load(0);
            store_weights(gradients, scores[0], bits, own);
            Sum pulls[1][TILE / 8][4];
            find_pulls(pulls, v_tile, dout_tile, own, p.e, load);
            store_gradients(gradients, pulls[0], own, [&](int, int i) {
                return load_shared<Two>(delta_row + (8 * i + 2 * pair_of_lane()) * sizeof(Sum));
            });
            add_slopes(a.dk + place * p.a, p.a, 0, p, w, rows, columns, own, gradients, planes);
        }
    }
    wait_copies<0>();
    UNROLL
    for (int h = 0; h < 2; h++) {
        const int row = own + 8 * h + row_of_lane();
        if (line * TILE + row >= p.m)
            continue;
        if (row >= rows.there)
            // it may have met what is not finite
            UNROLL
            for (int i = 0; i < E / 8; i++)
                dv[0][i][2 * h] = dv[0][i][2 * h + 1] = 0;
        store_wide_row(a.dv + (place + row) * a.dv_width + a.dv_from, dv[0], 2 * h, Sum(1),
                       p.e - a.dv_from);
    }
}
