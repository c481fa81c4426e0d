// softmax_backward_keys.cu -- flash attention, backward: gradients of keys and values.
//
// A block owns ROWS keys of a group. Scores are computed again, with keys as rows, so that weights
// and their gradients go from the sums of one product into the next one's operand:
//
//     weights (ROWS x STEP) = exp(k q^T - lse)        dv (ROWS x E) += weights dout
//     dscores               = weights (v dout^T - delta)
//                                                     dk (ROWS x D) += dscores q
//
// Queries come LOAD at a time, through all heads that share the group, in the order of the
// transposed BlockMask. Each key has one owner, so nothing is added to by two blocks, and every sum
// has one order: no atomics, and the same bits in every run. The scores are computed once more for
// dq (softmax_backward_queries.cu); that is the price.
//
// A launch sums DK columns of dk and DV of dv, or none of one of them, where registers have no room
// for all.
#include "softmax.cuh"

enum {
    ROWS = 16 * SLICES * WARPS,
    K_SIZE = TileSize<ROWS, D>::SIZE,
    V_SIZE = TileSize<ROWS, E>::SIZE,
    Q_SIZE = TileSize<LOAD, D>::SIZE,
    DOUT_SIZE = TileSize<LOAD, E>::SIZE,
    ROW_SIZE = LOAD * sizeof(Sum)
};

struct KeysArguments {
    Problem problem;        // its lists are of lines of keys
    Operand dout, dk, dv;
    Sum* wide_dk;           // (batch, groups, m, width) where not 0: instead of dk
    Sum* wide_dv;
    const Sum* lse;         // (batch, heads, n)
    const Sum* delta;
    int dk_width, dv_width;
    int dk_from, dv_from;   // the first columns that this launch sums, at the beginning of a panel
};

// Writes the sums of columns `from` on, of `width` in all.
template<int TILES>
DEVICE void write(const Problem& p, const Operand& to, Sum* wide, int wide_width, int batch,
                  int group, int first, int keys, const Sum (&sums)[SLICES][TILES][4], int from,
                  int width) {
    UNROLL
    for (int s = 0; s < SLICES; s++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            const int key = first + 16 * s + 8 * h + row_of_lane();
            if (key >= p.m)
                continue;
            // what a padded key has met is not looked at
            Sum own[TILES][4];
            UNROLL
            for (int i = 0; i < TILES; i++)
                UNROLL
                for (int e = 0; e < 2; e++)
                    own[i][2 * h + e] = key < keys ? sums[s][i][2 * h + e] : Sum(0);
            const i64 row = (i64(batch) * p.groups + group) * p.m + key;
            if (wide)
                store_wide_row(wide + row * wide_width + from, own, 2 * h, 1, width - from);
            else
                store_row(to.head(batch, group) + key * to.n + from, own, 2 * h, 1, width - from);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
softmax_backward_keys(const __grid_constant__ KeysArguments a) {
    const Problem& p = a.problem;
    const int lines = (p.m + ROWS - 1) / ROWS;
    const int first = blockIdx.x % lines * ROWS;
    const int group = blockIdx.x / lines % p.groups;
    const int batch = blockIdx.x / lines / p.groups;
    const int share = p.heads / p.groups;
    const int queries = p.q_lengths[batch];
    const int keys = p.kv_lengths[batch];

    const u32 k_tile = shared_base();
    const u32 v_tile = k_tile + K_SIZE;
    const u32 q_tiles = v_tile + V_SIZE;
    const u32 dout_tiles = q_tiles + 2 * Q_SIZE;
    const u32 lse_rows = dout_tiles + 2 * DOUT_SIZE;
    const u32 delta_rows = lse_rows + 2 * ROW_SIZE;
    const int own = threadIdx.x / 32 * 16 * SLICES;         // the warp's first row
    const u32 words = delta_rows + 2 * ROW_SIZE + own * 8;  // for nonfinite.cuh

    Sum dk[SLICES][DK ? DK / 8 : 1][4];
    Sum dv[SLICES][DV ? DV / 8 : 1][4];
    const u32 dk_panel = a.dk_from / PANEL * LOAD * 128;
    const u32 dv_panel = a.dv_from / PANEL * LOAD * 128;
    clear(dk);
    clear(dv);

    load_tokens<ROWS, D>(k_tile, p.k.head(batch, group), p.k.n, first, keys, p.d);
    load_tokens<ROWS, E>(v_tile, p.v.head(batch, group), p.v.n, first, keys, p.e);
    if (ELEMENT == F32)
        commit_copies();

    const int end = first < keys ? (queries + TILE - 1) / TILE : 0;
    int head = group * share;
    const int stop = head + share;
    Walk<1> walk;
    int from = 0;               // which column of a tile a load begins at
    auto enter = [&] {
        walk.begin(p.lists, p.lists.layout[batch * p.heads + head], first / TILE, 0);
    };
    // goes on to the next head that has a tile
    auto settle = [&] {
        while (!walk.here(end) && ++head < stop)
            enter();
    };
    auto load = [&](int slot) {
        const int query = walk.tile * TILE + from;
        load_tokens<LOAD, D>(q_tiles + slot * Q_SIZE, p.q.head(batch, head), p.q.n, query, queries,
                             p.d);
        load_tokens<LOAD, E>(dout_tiles + slot * DOUT_SIZE, a.dout.head(batch, head), a.dout.n, query,
                             queries, p.e);
        const i64 row = (i64(batch) * p.heads + head) * p.n + query;
        for (int i = threadIdx.x; i < LOAD; i += THREADS) {
            const bool there = query + i < queries;
            const u32 to = slot * ROW_SIZE + i * sizeof(Sum);
            copy_async<sizeof(Sum)>(lse_rows + to, a.lse + (there ? row + i : row), there);
            copy_async<sizeof(Sum)>(delta_rows + to, a.delta + (there ? row + i : row), there);
        }
    };
    enter();
    settle();
    if (head < stop)
        load(0);
    commit_copies();
    bool bad_keys = false;
    if (ELEMENT == F32) {
        wait_copies<1>();
        bad_keys = any_bad<ROWS, D>(k_tile) | any_bad<ROWS, E>(v_tile);
    }

    for (int slot = 0; head < stop; slot ^= 1) {
        const int here = head;
        const int tile_from = from;
        const int query = walk.tile * TILE + from;
        const int columns = queries - walk.tile * TILE;
        const int kind = walk.kind(p.lists, 0);
        // terms have nothing for keys that are not there
        bool masked = kind != FULL || columns < TILE || (TERMS && first + ROWS > keys)
            || (HAS(BIAS) && p.scores.bias.at) || (HAS(GATE) && p.scores.gate.at);
        from += LOAD;
        if (from >= min(columns, int(TILE))) {
            from = 0;
            walk.advance(p.lists);
            settle();
        }
        if (head < stop)
            load(slot ^ 1);
        commit_copies();
        wait_copies<1>();

        const u32 q_tile = q_tiles + slot * Q_SIZE;
        const u32 dout_tile = dout_tiles + slot * DOUT_SIZE;
        if (!masked) {
            // a query whose scores are all -inf adds nothing, whatever it and dout hold; LOAD is
            // THREADS at most
            const u32 own_lse = lse_rows + slot * ROW_SIZE + threadIdx.x * sizeof(Sum);
            masked = __syncthreads_or(threadIdx.x < LOAD && load_shared<Sum>(own_lse) == -INFINITE);
        }
        bool bad = false;
        if (masked || ELEMENT == F32)
            bad = __syncthreads_or(bad_keys | any_bad<LOAD, D>(q_tile)
                                   | any_bad<LOAD, E>(dout_tile));
        const Sum scale = p.scores.scale[here];

        _Pragma("unroll 1")
        for (int step = 0; step < LOAD; step += STEP) {
            const bool met = query + step < queries;
            RowBits<STEP> bits[SLICES][2];
            Weights<STEP / 8> weights[SLICES], dscores[SLICES];
            if (met) {
                // forward: scores = q k^T, out = weights v
                Sum products[SLICES][STEP / 8][4];
                Sum pulls[SLICES][STEP / 8][4];
                clear(products);
                clear(pulls);
                if (ELEMENT == F32 && bad) {
                    multiply_numbers<ROWS, LOAD, D>(products, k_tile, own, q_tile, step);
                    multiply_numbers<ROWS, LOAD, E>(pulls, v_tile, own, dout_tile, step);
                } else {
                    multiply_transposed<ROWS, LOAD, D>(products, k_tile, own, q_tile, step);
                    multiply_transposed<ROWS, LOAD, E>(pulls, v_tile, own, dout_tile, step);
                }
                UNROLL
                for (int s = 0; s < SLICES; s++) {
                    if (masked || bad)
                        UNROLL
                        for (int h = 0; h < 2; h++) {
                            const int row = first + own + 16 * s + 8 * h + row_of_lane();
                            bits[s][h].set(bits_of_row(p.lists, row < keys ? kind : NONE, row % TILE,
                                                       columns), tile_from + step);
                        }
                    UNROLL
                    for (int i = 0; i < STEP / 8; i++) {
                        const u32 column = (step + 8 * i + 2 * pair_of_lane()) * sizeof(Sum);
                        UNROLL
                        for (int e = 0; e < 2; e++) {
                            const u32 at = slot * ROW_SIZE + column + e * sizeof(Sum);
                            const Sum shift = shift_of(load_shared<Sum>(lse_rows + at));
                            const Sum delta = load_shared<Sum>(delta_rows + at);
                            const QueryOfTerms terms = {
                                batch, here, query + step + 8 * i + 2 * pair_of_lane() + e};
                            UNROLL
                            for (int h = 0; h < 2; h++) {
                                const int key = first + own + 16 * s + 8 * h + row_of_lane();
                                RowBits<STEP>& seen = bits[s][h];
                                Sum& product = products[s][i][2 * h + e];
                                Sum& pull = pulls[s][i][2 * h + e];
                                bool allowed = true;
                                if (masked || bad)
                                    allowed = seen.get(i, e) && shift != INFINITE;
                                const Pair pair = pair_of(p.scores, terms, key, allowed, product,
                                                          scale, shift, pull, delta);
                                if ((masked || bad) && !pair.seen)
                                    seen.hide(i, e);
                                product = pair.weight;
                                pull = pair.dscore * pair.slope * scale;
                            }
                        }
                    }
                    hold(weights[s], products[s]);
                    hold(dscores[s], pulls[s]);
                }
            }
            if (bad) {
                // see nonfinite.cuh
                if (met)
                    add_by_weight(words, bits, weights, [&](bool vanished) {
#if DV
                        add_bad<LOAD, DV>(dv, dout_tile + dv_panel, step, STEP, words, vanished);
#endif
#if DK
                        add_bad<LOAD, DK>(dk, q_tile + dk_panel, step, STEP, words, true);
#endif
                    });
                __syncthreads();
                clean<LOAD, E>(dout_tile, step, STEP);
                clean<LOAD, D>(q_tile, step, STEP);
                __syncthreads();
            }
            if (met) {
                // dv += weights dout, dk += dscores q
#if DV
                    multiply_weights<LOAD, DV>(dv, weights, dout_tile + dv_panel, step);
#endif
#if DK
                    multiply_weights<LOAD, DK>(dk, dscores, q_tile + dk_panel, step);
#endif
            }
        }
        __syncthreads();            // the next load overwrites what was just read
    }
    wait_copies<0>();
#if DK
        write(p, a.dk, a.wide_dk, a.dk_width, batch, group, first + own, keys, dk, a.dk_from, p.d);
#endif
#if DV
        write(p, a.dv, a.wide_dv, a.dv_width, batch, group, first + own, keys, dv, a.dv_from, p.e);
#endif
}
