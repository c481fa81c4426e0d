// selected_forward.cu -- softmax over the blocks of keys that each token lists, forward.
//
// A block owns a bundle of tokens, with all heads of a group (selected_bundle.cuh). Keys and values
// come by cp.async, LOAD at a time, while those before are worked on:
//
//     keys    ->  [LOAD][LOAD]...     scores (16 x STEP)  = q k^T       in registers
//     bundle  [ROWS]                  sums   (16 x E)    += weights v   in registers
//
// Each warp has its own largest scores and totals, of its own columns; in the end they meet.
#include "selected_bundle.cuh"

enum {
    Q_SIZE = TileSize<ROWS, D>::SIZE
};

struct ForwardArguments {
    Problem problem;
    Bundles bundles;
    Operand out;
    Sum* lse;               // (batch, heads, n)
};

typedef Online<E> State;

// Joins what the warps of the same rows have, in the first of them. `rows` has room for two numbers
// for each row of each warp.
DEVICE void meet(State& x, u32 rows, u32 space) {
    UNROLL
    for (int h = 0; h < 2; h++) {
        x.total[h] += __shfl_xor_sync(~0u, x.total[h], 1);
        x.total[h] += __shfl_xor_sync(~0u, x.total[h], 2);
    }
    if (COLUMN_WARPS == 1)
        return;
    const auto place_of = [&](int share, int h, int what) {
        const int row = share * ROWS + own_row() + 8 * h + row_of_lane();
        return rows + (row * 2 + what) * sizeof(Sum);
    };
    UNROLL
    for (int h = 0; h < 2; h++)
        if (pair_of_lane() == 0)
            store_shared(place_of(own_share(), h, 0), x.largest[h]);
    __syncthreads();
    UNROLL
    for (int h = 0; h < 2; h++) {
        Sum largest = -INFINITE;
        UNROLL
        for (int share = 0; share < COLUMN_WARPS; share++)
            largest = larger(largest, load_shared<Sum>(place_of(share, h, 0)));
        const bool none = x.largest[h] == -INFINITE;
        const Sum decay = none ? Sum(0) : power((x.largest[h] - largest) * TO_BASE);
        UNROLL
        for (int i = 0; i < E / 8; i++) {
            x.sums[0][i][2 * h] *= decay;
            x.sums[0][i][2 * h + 1] *= decay;
        }
        x.total[h] *= decay;
        x.largest[h] = largest;
        if (pair_of_lane() == 0)
            store_shared(place_of(own_share(), h, 1), x.total[h]);
    }
    join(x.sums, space);
    UNROLL
    for (int h = 0; h < 2; h++)
        for (int share = 1; share < COLUMN_WARPS; share++)
            x.total[h] += load_shared<Sum>(place_of(share, h, 1));
}

// Divides by the totals, and writes out and lse.
DEVICE void finish(const ForwardArguments& a, const Bundle& bundle, const Row (&rows)[2],
                   State& x) {
    const Problem& p = a.problem;
    UNROLL
    for (int h = 0; h < 2; h++) {
        const Row& row = rows[h];
        if (row.token >= p.n)
            continue;
        const bool seen = row.seen > 0 && x.total[h] != 0;
        if (!seen)
            // it may have met what is not finite
            UNROLL
            for (int i = 0; i < E / 8; i++)
                x.sums[0][i][2 * h] = x.sums[0][i][2 * h + 1] = 0;
        if (pair_of_lane() == 0)
            a.lse[(i64(bundle.batch) * p.heads + row.head) * p.n + row.token]
                = seen ? x.largest[h] + natural_logarithm(x.total[h]) : -INFINITE;
        store_row(a.out.head(bundle.batch, row.head) + row.token * a.out.n, x.sums[0], 2 * h,
                  seen ? 1 / x.total[h] : Sum(0), p.e);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
selected_forward(const __grid_constant__ ForwardArguments a) {
    const Problem& p = a.problem;
    Bundle bundle;
    bundle.begin(p, a.bundles);

    const u32 q_tile = shared_base();
    const Keys keys(p, bundle, q_tile + Q_SIZE);
    const u32 of_rows = keys.end();
    const u32 words = of_rows + warp_number() * 16 * 8;     // for nonfinite.cuh

    State x;
    clear(x.sums);
    Row rows[2];
    Sum scale[2];
    UNROLL
    for (int h = 0; h < 2; h++) {
        x.largest[h] = -INFINITE;
        x.total[h] = 0;
        rows[h] = bundle.row(p, own_row() + 8 * h + row_of_lane());
        scale[h] = p.scale[rows[h].head];
    }

    load_tile<ROWS, D>(q_tile, p.d, [&](int place) -> const Stored* {
        const Row row = bundle.row(p, place);
        return row.seen > 0 ? p.q.head(bundle.batch, row.head) + row.token * p.q.n : 0;
    });
    if (ELEMENT == F32)
        commit_copies();

    keys.begin(p, bundle);
    bool bad_queries = false;
    if (ELEMENT == F32) {
        wait_copies<1>();
        bad_queries = any_bad<ROWS, D>(q_tile);
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
            bad = __syncthreads_or(any_bad<LOAD, E>(v_tile));
        else
            __syncthreads();

        _Pragma("unroll 1")
        for (int step = 0; step < SHARE; step += STEP) {
            const int column = own_share() * SHARE + step;
            Sum scores[1][STEP / 8][4];
            Weights<STEP / 8> weights[1];
            RowBits<STEP> bits[2];
            // scores = q k^T
            clear(scores);
            if (ELEMENT == F32 && bad)
                multiply_numbers<ROWS, LOAD, D>(scores, q_tile, own_row(), k_tile, column);
            else
                multiply_transposed<ROWS, LOAD, D>(scores, q_tile, own_row(), k_tile, column);
            if (masked || bad)
                find_seen(bits, rows, noted, column);
            UNROLL
            for (int h = 0; h < 2; h++) {
                UNROLL
                for (int i = 0; i < STEP / 8; i++)
                    UNROLL
                    for (int e = 0; e < 2; e++) {
                        Sum slope;
                        Sum& score = scores[0][i][2 * h + e];
                        score = score_of(p, score, scale[h], slope);
                        if ((masked || bad) && !bits[h].get(i, e))
                            score = -INFINITE;
                    }
                weigh(scores[0], x, h);
            }
            hold(weights[0], scores[0]);
            if (bad) {
                // see nonfinite.cuh
                add_by_weight(words, bits, weights, [&](bool vanished) {
                    add_bad<LOAD, E>(x.sums, v_tile, column, STEP, words, vanished);
                });
                __syncthreads();
                clean_step<E>(v_tile, step);
                __syncthreads();
            }
            // sums += weights v
            multiply_weights<LOAD, E>(x.sums, weights, v_tile, column);
        }
        keys.note(number + 2, later);
        __syncthreads();            // the next load overwrites what was just read
    }
    wait_copies<0>();
    meet(x, of_rows, keys.k_tiles);
    if (own_share() == 0)
        finish(a, bundle, rows, x);
}
