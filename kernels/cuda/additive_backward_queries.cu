// additive_backward_queries.cu -- additive attention, backward: gradients of queries and of w.
//
// A block of four warps owns a tile of queries of a head, a warp 16 of them, and walks the tiles of
// keys that the BlockMask lists. Scores are found again, then, through shared memory, their
// gradients meet the tanhs once more, now with a feature in each lane:
//
//     weights   (16 x TILE)  = exp(scores - lse)
//     gradients (16 x TILE)  = weights (dout v^T - delta)
//     dq_f += w_f sum_j gradient_j (1 - tanh_jf^2)      dw_f += sum_j gradient_j tanh_jf
//
// dq is added to in memory, by its one owner. So is dw, whose rows each have one warp's.
#include "additive_backward.cuh"

enum { WARPS = THREADS / 32 };

struct QueriesArguments {
    Problem problem;
    Operand dout;
    const Sum* lse;         // (batch, heads, n)
    const Sum* delta;
    Sum* dq;                // (batch, heads, n, a), zeros
    Sum* dw;                // (batch, heads, lines, WARPS, a), zeros
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
additive_backward_queries(const __grid_constant__ QueriesArguments a) {
    const Problem& p = a.problem;
    const int lines = p.q.tiles;
    const int line = lines - 1 - int(blockIdx.x % lines);
    const int head = blockIdx.x / lines % p.heads;
    const int batch = blockIdx.x / lines / p.heads;
    const int group = head / (p.heads / p.groups);
    const int queries = p.q_lengths[batch];
    const int keys = p.kv_lengths[batch];
    const Tokens rows = tokens_of(p, p.q, batch, head, line, queries);
    const Sum* w = p.w + i64(head) * p.chunks() * FEATURES;
    const Stored* v = p.v.head(batch, group);
    const Stored* dout = a.dout.head(batch, head);

    const u32 planes = shared_base();
    const u32 gradients = planes + PLANES_SIZE;
    const u32 dout_tile = gradients + GRADIENTS_SIZE;
    const u32 v_tile = dout_tile + SIZE;
    const int warp = threadIdx.x / 32;
    const int own = warp * 16;              // the warp's first row
    const i64 place = (i64(batch) * p.heads + head) * p.n + line * TILE;
    Sum* dq = a.dq + place * p.a;
    Sum* dw = a.dw + (((i64(batch) * p.heads + head) * lines + line) * WARPS + warp) * p.a;

    Sum shift[2], delta[2];
    UNROLL
    for (int h = 0; h < 2; h++) {
        const int row = own + 8 * h + row_of_lane();
        const bool live = row < rows.there;
        shift[h] = live ? shift_of(a.lse[place + row]) : INFINITE;
        delta[h] = live ? a.delta[place + row] : Sum(0);
    }

    const int end = rows.there > 0 ? (keys + TILE - 1) / TILE : 0;
    Walk<1> walk;
    walk.begin(p.lists, p.lists.layout[batch * p.heads + head], line, 0);
    for (; walk.here(end); walk.advance(p.lists)) {
        const int kind = walk.kind(p.lists, 0);
        const Tokens columns = tokens_of(p, p.k, batch, group, walk.tile, keys);
        auto load = [&](int from) {
            load_tokens<TILE, E>(dout_tile, dout + from, a.dout.n, line * TILE, queries,
                                 p.e - from);
            load_tokens<TILE, E>(v_tile, v + from, p.v.n, walk.tile * TILE, keys, p.e - from);
        };
        load(0);
        commit_copies();

        // forward: score = sum_f w_f tanh_f, out = weights v
        Sum scores[TILE / 8][4];
        find_scores(scores, p, w, rows, columns, own, own < rows.there, planes);
        RowBits<TILE> bits[2];
        UNROLL
        for (int h = 0; h < 2; h++) {
            bits[h].set(bits_of_row(p.lists, shift[h] == INFINITE ? NONE : kind,
                                    own + 8 * h + row_of_lane(), columns.there), 0);
            UNROLL
            for (int i = 0; i < TILE / 8; i++)
                UNROLL
                for (int e = 0; e < 2; e++) {
                    // forward: weight = exp(score - lse)
                    Sum& score = scores[i][2 * h + e];
                    score = power((score - shift[h]) * TO_BASE);
                }
        }
        store_weights(gradients, scores, bits, own);
        Sum pulls[1][TILE / 8][4];
        find_pulls(pulls, dout_tile, v_tile, own, p.e, load);
        store_gradients(gradients, pulls[0], own, [&](int h, int) {
            return Two{delta[h], delta[h]};
        });
        add_slopes(dq, p.a, dw, p, w, rows, columns, own, gradients, planes);
    }
    wait_copies<0>();
}
