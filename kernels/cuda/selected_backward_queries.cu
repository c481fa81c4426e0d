// selected_backward_queries.cu -- selected attention, backward: gradients of queries.
//
// A block owns a bundle of tokens and walks the keys that they list, as in the forward:
//
//     weights (16 x STEP) = exp(q k^T - lse)
//     dscores             = weights (dout v^T - delta)        dq (16 x D) += dscores k
//
// A launch sums DQ columns of dq, where registers have no room for all.
#include "selected_bundle.cuh"

enum {
    Q_SIZE = TileSize<ROWS, D>::SIZE,
    DOUT_SIZE = TileSize<ROWS, E>::SIZE
};

struct QueriesArguments {
    Problem problem;
    Bundles bundles;
    Operand dout, dq;
    const Sum* lse;         // (batch, heads, n)
    const Sum* delta;
    int dq_from;            // the first column that this launch sums, at the beginning of a panel
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
selected_backward_queries(const __grid_constant__ QueriesArguments a) {
    const Problem& p = a.problem;
    Bundle bundle;
    bundle.begin(p, a.bundles);

    const u32 q_tile = shared_base();
    const u32 dout_tile = q_tile + Q_SIZE;
    const Keys keys(p, bundle, dout_tile + DOUT_SIZE);
    const u32 words = keys.end() + warp_number() * 16 * 8;    // for nonfinite.cuh
    const u32 dq_panel = a.dq_from / PANEL * LOAD * 128;

    Sum dq[1][DQ / 8][4];
    Row rows[2];
    Sum scale[2], shift[2], delta[2];
    clear(dq);
    UNROLL
    for (int h = 0; h < 2; h++) {
        rows[h] = bundle.row(p, own_row() + 8 * h + row_of_lane());
        scale[h] = p.scale[rows[h].head];
        const i64 place = (i64(bundle.batch) * p.heads + rows[h].head) * p.n + rows[h].token;
        shift[h] = rows[h].seen > 0 ? shift_of(a.lse[place]) : INFINITE;
        delta[h] = rows[h].seen > 0 ? a.delta[place] : Sum(0);
    }

    load_tile<ROWS, D>(q_tile, p.d, [&](int place) -> const Stored* {
        const Row row = bundle.row(p, place);
        return row.seen > 0 ? p.q.head(bundle.batch, row.head) + row.token * p.q.n : 0;
    });
    load_tile<ROWS, E>(dout_tile, p.e, [&](int place) -> const Stored* {
        const Row row = bundle.row(p, place);
        return row.seen > 0 ? a.dout.head(bundle.batch, row.head) + row.token * a.dout.n : 0;
    });
    if (ELEMENT == F32)
        commit_copies();

    keys.begin(p, bundle);
    bool bad_queries = false;
    if (ELEMENT == F32) {
        wait_copies<1>();
        bad_queries = any_bad<ROWS, D>(q_tile) | any_bad<ROWS, E>(dout_tile);
    }

    for (int number = 0; number < bundle.loads; number++) {
        // looked up early, noted late: it takes its time
        const uint2 later = bundle.column(p, number + 2, threadIdx.x);
        keys.copy(p, bundle, number + 1);
        wait_copies<1>();

        const u32 noted = notes_of(keys.notes, number);
        const u32 k_tile = keys.k_tile(number);
        const u32 v_tile = keys.v_tile(number);
        const bool masked = any_hidden(bundle, noted);
        bool bad = false;
        if (ELEMENT == F32)
            bad = __syncthreads_or(bad_queries | any_bad<LOAD, D>(k_tile)
                                   | any_bad<LOAD, E>(v_tile));
        else if (masked)
            bad = __syncthreads_or(any_bad<LOAD, D>(k_tile));
        else
            __syncthreads();

        _Pragma("unroll 1")
        for (int step = 0; step < SHARE; step += STEP) {
            const int column = own_share() * SHARE + step;
            Sum products[1][STEP / 8][4];
            Sum pulls[1][STEP / 8][4];
            Weights<STEP / 8> dscores[1];
            RowBits<STEP> bits[2];
            // forward: scores = q k^T, out = weights v
            clear(products);
            clear(pulls);
            if (ELEMENT == F32 && bad) {
                multiply_numbers<ROWS, LOAD, D>(products, q_tile, own_row(), k_tile, column);
                multiply_numbers<ROWS, LOAD, E>(pulls, dout_tile, own_row(), v_tile, column);
            } else {
                multiply_transposed<ROWS, LOAD, D>(products, q_tile, own_row(), k_tile, column);
                multiply_transposed<ROWS, LOAD, E>(pulls, dout_tile, own_row(), v_tile, column);
            }
            if (masked || bad)
                find_seen(bits, rows, noted, column);
            UNROLL
            for (int h = 0; h < 2; h++)
                UNROLL
                for (int i = 0; i < STEP / 8; i++)
                    UNROLL
                    for (int e = 0; e < 2; e++) {
                        const bool allowed = shift[h] != INFINITE
                            && (!(masked || bad) || bits[h].get(i, e));
                        differentiate(p, allowed, scale[h], shift[h], delta[h],
                                      products[0][i][2 * h + e], pulls[0][i][2 * h + e]);
                    }
            hold(dscores[0], pulls[0]);
            if (bad) {
                // see nonfinite.cuh; a row that sees no key takes nothing
                UNROLL
                for (int h = 0; h < 2; h++) {
                    if (shift[h] == INFINITE)
                        bits[h].set(0, 0);
                    bits[h].share(words + 8 * (8 * h + row_of_lane()));
                }
                __syncwarp();
                add_bad<LOAD, DQ>(dq, k_tile + dq_panel, column, STEP, words, true);
                __syncthreads();
                clean_step<D>(k_tile, step);
                __syncthreads();
            }
            // dq += dscores k
            multiply_weights<LOAD, DQ>(dq, dscores, k_tile + dq_panel, column);
        }
        keys.note(number + 2, later);
        __syncthreads();            // the next load overwrites what was just read
    }
    wait_copies<0>();
    join(dq, keys.k_tiles);
    if (own_share() > 0)
        return;
    UNROLL
    for (int h = 0; h < 2; h++) {
        const Row& row = rows[h];
        if (row.token >= p.n)
            continue;
        if (shift[h] == INFINITE)
            UNROLL
            for (int i = 0; i < DQ / 8; i++)
                dq[0][i][2 * h] = dq[0][i][2 * h + 1] = 0;
        store_row(a.dq.head(bundle.batch, row.head) + row.token * a.dq.n + a.dq_from, dq[0], 2 * h,
                  scale[h], p.d - a.dq_from);
    }
}
