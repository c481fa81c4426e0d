// softmax_backward_queries.cu -- flash attention, backward: gradients of queries and of the scale.
//
// A block owns ROWS queries of a head and walks the keys that the BlockMask lists for them:
//
//     weights (ROWS x STEP) = exp(q k^T - lse)
//     dscores               = weights (dout v^T - delta)      dq (ROWS x D) += dscores k
//
// With scores = scale q k^T, a row's part of the gradient of the scale is q . dq before dq is scaled.
// A launch sums DQ columns of dq, where registers have no room for all.
#include "softmax.cuh"

enum {
    ROWS = 16 * SLICES * WARPS,
    Q_SIZE = TileSize<ROWS, D>::SIZE,
    DOUT_SIZE = TileSize<ROWS, E>::SIZE,
    K_SIZE = TileSize<LOAD, D>::SIZE,
    V_SIZE = TileSize<LOAD, E>::SIZE
};

struct QueriesArguments {
    Problem problem;
    Operand dout, dq;
    Sum* wide_dq;           // (batch, heads, n, width) where not 0: instead of dq
    const Sum* lse;         // (batch, heads, n)
    const Sum* delta;
    Sum* dscale;            // (batch, heads, n)
    int dq_width;
    int dq_from;            // the first column that this launch sums, at the beginning of a panel
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
softmax_backward_queries(const __grid_constant__ QueriesArguments a) {
    const Problem& p = a.problem;
    const int lines = (p.n + ROWS - 1) / ROWS;
    const int first = (lines - 1 - int(blockIdx.x % lines)) * ROWS;
    const int head = blockIdx.x / lines % p.heads;
    const int batch = blockIdx.x / lines / p.heads;
    const int group = head / (p.heads / p.groups);
    const int queries = p.q_lengths[batch];
    const int keys = p.kv_lengths[batch];

    const u32 q_tile = shared_base();
    const u32 dout_tile = q_tile + Q_SIZE;
    const u32 k_tiles = dout_tile + DOUT_SIZE;
    const u32 v_tiles = k_tiles + 2 * K_SIZE;
    const int own = threadIdx.x / 32 * 16 * SLICES;         // the warp's first row
    const u32 words = v_tiles + 2 * V_SIZE + own * 8;       // for nonfinite.cuh
    const Stored* k = p.k.head(batch, group);
    const Stored* v = p.v.head(batch, group);
    const Sum scale = p.scores.scale[head];

    Sum dq[SLICES][DQ / 8][4];
    const u32 dq_panel = a.dq_from / PANEL;
    Sum shift[SLICES][2];
    Sum delta[SLICES][2];
    clear(dq);
    const i64 rows = (i64(batch) * p.heads + head) * p.n;
    UNROLL
    for (int s = 0; s < SLICES; s++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            const int query = first + own + 16 * s + 8 * h + row_of_lane();
            const bool live = query < queries;
            shift[s][h] = live ? shift_of(a.lse[rows + query]) : INFINITE;
            delta[s][h] = live ? a.delta[rows + query] : Sum(0);
        }

    load_tokens<ROWS, D>(q_tile, p.q.head(batch, head), p.q.n, first, queries, p.d);
    load_tokens<ROWS, E>(dout_tile, a.dout.head(batch, head), a.dout.n, first, queries, p.e);
    if (ELEMENT == F32)
        commit_copies();

    const int end = first < queries ? (keys + TILE - 1) / TILE : 0;
    Walk<1> walk;
    walk.begin(p.lists, p.lists.layout[batch * p.heads + head], first / TILE, 0);
    int from = 0;               // which column of a tile a load begins at
    auto load = [&](int slot) {
        const int key = walk.tile * TILE + from;
        load_tokens<LOAD, D>(k_tiles + slot * K_SIZE, k, p.k.n, key, keys, p.d);
        load_tokens<LOAD, E>(v_tiles + slot * V_SIZE, v, p.v.n, key, keys, p.e);
    };
    if (walk.here(end))
        load(0);
    commit_copies();
    bool bad_queries = false;
    if (ELEMENT == F32) {
        wait_copies<1>();
        bad_queries = any_bad<ROWS, D>(q_tile) | any_bad<ROWS, E>(dout_tile);
    }

    for (int slot = 0; walk.here(end); slot ^= 1) {
        const int tile_from = from;
        const int key = walk.tile * TILE + from;
        const int columns = keys - walk.tile * TILE;
        const int kind = walk.kind(p.lists, 0);
        // terms have nothing for queries that are not there
        const bool masked = kind != FULL || columns < TILE || (TERMS && first + ROWS > queries)
            || (HAS(BIAS) && p.scores.bias.at) || (HAS(GATE) && p.scores.gate.at);
        from += LOAD;
        if (from >= min(columns, int(TILE))) {
            from = 0;
            walk.advance(p.lists);
        }
        if (walk.here(end))
            load(slot ^ 1);
        commit_copies();
        wait_copies<1>();

        const u32 k_tile = k_tiles + slot * K_SIZE;
        const u32 v_tile = v_tiles + slot * V_SIZE;
        bool bad = false;
        if (ELEMENT == F32)
            bad = __syncthreads_or(bad_queries | any_bad<LOAD, D>(k_tile) | any_bad<LOAD, E>(v_tile));
        else if (masked)
            bad = __syncthreads_or(any_bad<LOAD, D>(k_tile));
        else
            __syncthreads();

        _Pragma("unroll 1")
        for (int step = 0; step < LOAD; step += STEP) {
            const bool met = key + step < keys;
            RowBits<STEP> bits[SLICES][2];
            Weights<STEP / 8> dscores[SLICES];
            if (met) {
                // forward: scores = q k^T, out = weights v
                Sum products[SLICES][STEP / 8][4];
                Sum pulls[SLICES][STEP / 8][4];
                clear(products);
                clear(pulls);
                if (ELEMENT == F32 && bad) {
                    multiply_numbers<ROWS, LOAD, D>(products, q_tile, own, k_tile, step);
                    multiply_numbers<ROWS, LOAD, E>(pulls, dout_tile, own, v_tile, step);
                } else {
                    multiply_transposed<ROWS, LOAD, D>(products, q_tile, own, k_tile, step);
                    multiply_transposed<ROWS, LOAD, E>(pulls, dout_tile, own, v_tile, step);
                }
                UNROLL
                for (int s = 0; s < SLICES; s++) {
                    UNROLL
                    for (int h = 0; h < 2; h++) {
                        const int query = first + own + 16 * s + 8 * h + row_of_lane();
                        const QueryOfTerms terms = {batch, head, query};
                        RowBits<STEP>& seen = bits[s][h];
                        if (masked || bad)
                            seen.set(bits_of_row(p.lists, shift[s][h] == INFINITE ? NONE : kind,
                                                 query % TILE, columns), tile_from + step);
                        UNROLL
                        for (int i = 0; i < STEP / 8; i++)
                            UNROLL
                            for (int e = 0; e < 2; e++) {
                                const int column = key + step + 8 * i + 2 * pair_of_lane() + e;
                                const bool allowed = !(masked || bad) || seen.get(i, e);
                                Sum& pull = pulls[s][i][2 * h + e];
                                const Pair pair = pair_of(
                                    p.scores, terms, column, allowed, products[s][i][2 * h + e],
                                    scale, shift[s][h], pull, delta[s][h]);
                                if ((masked || bad) && !pair.seen)
                                    seen.hide(i, e);
                                pull = pair.dscore * pair.slope;
                            }
                    }
                    hold(dscores[s], pulls[s]);
                }
            }
            if (bad) {
                // see nonfinite.cuh
                if (met) {
                    UNROLL
                    for (int r = 0; r < 2 * SLICES; r++)
                        bits[r / 2][r % 2].share(words + 8 * (8 * r + row_of_lane()));
                    __syncwarp();
                    add_bad<LOAD, DQ>(dq, k_tile + dq_panel * LOAD * 128, step, STEP, words, true);
                }
                __syncthreads();
                clean<LOAD, D>(k_tile, step, STEP);
                __syncthreads();
            }
            // dq += dscores k
            if (met)
                multiply_weights<LOAD, DQ>(dq, dscores, k_tile + dq_panel * LOAD * 128, step);
        }
        __syncthreads();            // the next load overwrites what was just read
    }
    wait_copies<0>();
    __syncthreads();

    UNROLL
    for (int s = 0; s < SLICES; s++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            const int number_ = own + 16 * s + 8 * h + row_of_lane();
            const int query = first + number_;
            Sum dscale = 0;
            UNROLL
            for (int i = 0; i < DQ / 8; i++)
                UNROLL
                for (int e = 0; e < 2; e++) {
                    Sum& x = dq[s][i][2 * h + e];
                    // what a padded query has met is not looked at, nor what one without a finite
                    // score has
                    if (shift[s][h] == INFINITE)
                        x = 0;
                    // a row that sees no key may hold anything
                    if (x != 0)
                        dscale = times_plus(x, number(load_shared<Stored>(place<ROWS>(
                            q_tile + dq_panel * ROWS * 128, number_, 8 * i + 2 * pair_of_lane() + e))), dscale);
                }
            dscale += __shfl_xor_sync(~0u, dscale, 1);
            dscale += __shfl_xor_sync(~0u, dscale, 2);
            if (query >= p.n)
                continue;
            if (pair_of_lane() == 0)
                a.dscale[rows + query] = dscale;
            if (a.wide_dq)
                store_wide_row(a.wide_dq + (rows + query) * a.dq_width + a.dq_from, dq[s], 2 * h,
                               scale, p.d - a.dq_from);
            else
                store_row(a.dq.head(batch, head) + query * a.dq.n + a.dq_from, dq[s], 2 * h, scale,
                          p.d - a.dq_from);
        }
}
