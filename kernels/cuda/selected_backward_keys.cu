// selected_backward_keys.cu -- selected attention, backward: gradients of keys and values.
//
// A block owns ROWS keys of a listed block of keys, and walks tokens that list it, with all heads
// of the group: the columns. They come LOAD at a time, wherever they lie; keys are the rows, so
// that weights and their gradients go from the sums of one product into the next one's operand:
//
//     weights (16 x STEP) = exp(k q^T - lse)          dv (16 x E) += weights dout
//     dscores             = weights (v dout^T - delta)
//                                                     dk (16 x D) += dscores q
//
// The tokens that list a block of keys are cut into pieces of bounded length: there are blocks that
// every token lists. The first piece writes to the results, the others to sums of their own, which
// selected_join.cu adds to these, in order. So each sum has one order: no atomics, and the same
// bits in every run.
//
// A launch sums DK columns of dk and DV of dv, or none of one of them, where registers have no room
// for all.
#define LONG_SUMS 1
#include "selected.cuh"

enum {
    K_SIZE = TileSize<ROWS, D>::SIZE,
    V_SIZE = TileSize<ROWS, E>::SIZE,
    Q_SIZE = TileSize<LOAD, D>::SIZE,
    DOUT_SIZE = TileSize<LOAD, E>::SIZE,
    ROW_SIZE = LOAD * sizeof(Sum),
    NOTE_SIZE = LOAD * 16
};

// Some of the tokens that list a block of keys.
struct Piece {
    int line, block;        // line: batch * groups + group
    i64 first, last;        // of the tokens in all
    int part, unused;       // which sums of its own it writes, or -1: the results
};

struct KeysArguments {
    Problem problem;
    const int* tokens;      // line by line, block by block: those that list it
    const Piece* pieces;
    Operand dout;
    const Sum* lse;         // (batch, heads, n)
    const Sum* delta;
    Sum* dk;                // (batch, groups, m, dk_width)
    Sum* dv;
    Sum* dk_parts;          // (parts, block_size, dk_width)
    Sum* dv_parts;
    int dk_width, dv_width;
    int dk_from, dv_from;   // the first columns that this launch sums, at the beginning of a panel
    int tiles;              // of ROWS keys, in a block of keys
};

// What a block of threads does: a piece, and some keys of a block of keys, counted from its first.
struct Work {
    Piece piece;
    int batch, group, first;
    int key;            // the first of the block
    int there, live;    // how many keys it has, and how many of them are not padding

    __device__ __forceinline__ explicit Work(const KeysArguments& a) {
        const Problem& p = a.problem;
        piece = a.pieces[blockIdx.x / a.tiles];
        batch = piece.line / p.groups;
        group = piece.line % p.groups;
        first = blockIdx.x % a.tiles * ROWS;
        key = piece.block * p.block_size;
        there = min(p.block_size, p.m - key);
        live = min(there, p.kv_lengths[batch] - key);
    }
};

// Writes rows `first` on, to `last`, of sums: columns from `from` on, of `width` in all.
template<int TILES>
DEVICE void write(Sum* to, int row_width, int first, int last, int live,
                  const Sum (&sums)[TILES][4], int from, int width) {
    UNROLL
    for (int h = 0; h < 2; h++) {
        const int row = first + 8 * h + row_of_lane();
        if (row >= last)
            continue;
        // what a padded key has met is not looked at
        Sum own[TILES][4];
        UNROLL
        for (int i = 0; i < TILES; i++)
            UNROLL
            for (int e = 0; e < 2; e++)
                own[i][2 * h + e] = row < live ? sums[i][2 * h + e] : Sum(0);
        store_wide_row(to + i64(row) * row_width + from, own, 2 * h, 1, width - from);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
selected_backward_keys(const __grid_constant__ KeysArguments a) {
    const Problem& p = a.problem;
    const Work work(a);
    const int heads = p.heads / p.groups;

    const u32 k_tile = shared_base();
    const u32 v_tile = k_tile + K_SIZE;
    const u32 q_tiles = v_tile + V_SIZE;
    const u32 dout_tiles = q_tiles + 2 * Q_SIZE;
    const u32 lse_rows = dout_tiles + 2 * DOUT_SIZE;
    const u32 delta_rows = lse_rows + 2 * ROW_SIZE;
    const u32 notes = delta_rows + 2 * ROW_SIZE;
    const u32 words = notes + NOTES * NOTE_SIZE + warp_number() * 16 * 8;   // for nonfinite.cuh
    const u32 dk_panel = a.dk_from / PANEL * LOAD * 128;
    const u32 dv_panel = a.dv_from / PANEL * LOAD * 128;

    Sum dk[1][DK ? DK / 8 : 1][4];
    Sum dv[1][DV ? DV / 8 : 1][4];
    clear(dk);
    clear(dv);

    const Stored* k = p.k.head(work.batch, work.group) + work.key * p.k.n;
    const Stored* v = p.v.head(work.batch, work.group) + work.key * p.v.n;
    load_tokens<ROWS, D>(k_tile, k, p.k.n, work.first, work.live, p.d);
    load_tokens<ROWS, E>(v_tile, v, p.v.n, work.first, work.live, p.e);
    if (ELEMENT == F32)
        commit_copies();

    const int tokens = int(work.piece.last - work.piece.first);
    const int columns = work.first < work.live ? tokens * heads : 0;
    const int loads = (columns + LOAD - 1) / LOAD;
    auto notes_of = [&](int number) {
        return notes + number % NOTES * NOTE_SIZE;
    };
    // A column of a load: its token or -1, its head, and how many keys of the block it sees.
    auto column_of = [&](int number) -> uint4 {
        const int column = number * LOAD + int(threadIdx.x);
        if (column >= columns)
            return {~0u, 0, 0, 0};
        const int token = a.tokens[work.piece.first + column / heads];
        return {u32(token), u32(work.group * heads + column % heads),
                u32(max(0, keys_seen(p, work.batch, token) - work.key)), 0};
    };
    auto note = [&](int number, uint4 column) {
        if (threadIdx.x < LOAD)
            store_shared(notes_of(number) + 16 * threadIdx.x, column);
    };
    auto load = [&](int number) {
        const int slot = number & 1;
        const u32 noted = notes_of(number);
        const auto row_of = [&](const Operand& x, int column) -> const Stored* {
            const uint2 it = load_shared<uint2>(noted + 16 * column);
            return int(it.x) < 0 ? 0 : x.head(work.batch, it.y) + i64(it.x) * x.n;
        };
        load_tile<LOAD, D>(q_tiles + slot * Q_SIZE, p.d, [&](int column) {
            return row_of(p.q, column);
        });
        load_tile<LOAD, E>(dout_tiles + slot * DOUT_SIZE, p.e, [&](int column) {
            return row_of(a.dout, column);
        });
        if (threadIdx.x < LOAD) {
            const uint2 it = load_shared<uint2>(noted + 16 * threadIdx.x);
            const bool valid = int(it.x) >= 0;
            const i64 place = valid ? (i64(work.batch) * p.heads + it.y) * p.n + it.x : 0;
            const u32 to = slot * ROW_SIZE + threadIdx.x * sizeof(Sum);
            copy_async<sizeof(Sum)>(lse_rows + to, a.lse + place, valid);
            copy_async<sizeof(Sum)>(delta_rows + to, a.delta + place, valid);
        }
    };
    note(0, column_of(0));
    note(1, column_of(1));
    __syncthreads();
    if (loads > 0)
        load(0);
    commit_copies();
    bool bad_keys = false;
    if (ELEMENT == F32) {
        wait_copies<1>();
        bad_keys = any_bad<ROWS, D>(k_tile) | any_bad<ROWS, E>(v_tile);
    }

    for (int number = 0; number < loads; number++) {
        // looked up early, noted late: it takes its time
        const uint4 later = column_of(number + 2);
        if (number + 1 < loads)
            load(number + 1);
        commit_copies();
        wait_copies<1>();

        const u32 noted = notes_of(number);
        const u32 q_tile = q_tiles + (number & 1) * Q_SIZE;
        const u32 dout_tile = dout_tiles + (number & 1) * DOUT_SIZE;
        bool hides = false;
        for (int i = lane_number(); i < LOAD; i += 32)
            hides |= int(load_shared<u32>(noted + 16 * i + 8))
                < min(work.first + int(ROWS), work.live);
        const bool masked = __any_sync(~0u, hides);
        bool bad = false;
        if (masked || ELEMENT == F32)
            bad = __syncthreads_or(bad_keys | any_bad<LOAD, D>(q_tile)
                                   | any_bad<LOAD, E>(dout_tile));
        else
            __syncthreads();
        // of a row whose scores are all -inf nothing is looked at, masked or not
        bool none = false;
        for (int i = lane_number(); i < LOAD; i += 32)
            none |= load_shared<Sum>(lse_rows + (number & 1) * ROW_SIZE + i * sizeof(Sum))
                == -INFINITE;
        bad |= bool(__any_sync(~0u, none));

        _Pragma("unroll 1")
        for (int step = 0; step < SHARE; step += STEP) {
            const int column = own_share() * SHARE + step;
            Sum products[1][STEP / 8][4];
            Sum pulls[1][STEP / 8][4];
            Weights<STEP / 8> weights[1], dscores[1];
            RowBits<STEP> bits[2];
            // forward: scores = q k^T, out = weights v
            clear(products);
            clear(pulls);
            if (ELEMENT == F32 && bad) {
                multiply_numbers<ROWS, LOAD, D>(products, k_tile, own_row(), q_tile, column);
                multiply_numbers<ROWS, LOAD, E>(pulls, v_tile, own_row(), dout_tile, column);
            } else {
                multiply_transposed<ROWS, LOAD, D>(products, k_tile, own_row(), q_tile, column);
                multiply_transposed<ROWS, LOAD, E>(pulls, v_tile, own_row(), dout_tile, column);
            }
            UNROLL
            for (int h = 0; h < 2; h++)
                bits[h].set(~u64(0), 0);
            UNROLL
            for (int i = 0; i < STEP / 8; i++)
                UNROLL
                for (int e = 0; e < 2; e++) {
                    const int own = column + 8 * i + 2 * pair_of_lane() + e;
                    const u32 at = (number & 1) * ROW_SIZE + own * sizeof(Sum);
                    const uint2 it = load_shared<uint2>(noted + 16 * own);
                    const int seen = int(load_shared<u32>(noted + 16 * own + 8));
                    const Sum shift = shift_of(load_shared<Sum>(lse_rows + at));
                    const Sum delta = load_shared<Sum>(delta_rows + at);
                    const Sum scale = p.scale[it.y];
                    UNROLL
                    for (int h = 0; h < 2; h++) {
                        const int row = work.first + own_row() + 8 * h + row_of_lane();
                        const bool allowed = row < seen && shift != INFINITE;
                        if (!allowed)
                            bits[h].hide(i, e);
                        Sum& pull = pulls[0][i][2 * h + e];
                        differentiate(p, allowed, scale, shift, delta,
                                      products[0][i][2 * h + e], pull);
                        pull *= scale;
                    }
                }
            hold(weights[0], products[0]);
            hold(dscores[0], pulls[0]);
            if (bad) {
                // see nonfinite.cuh
                add_by_weight(words, bits, weights, [&](bool vanished) {
#if DV
                    add_bad<LOAD, DV>(dv, dout_tile + dv_panel, column, STEP, words, vanished);
#endif
#if DK
                    add_bad<LOAD, DK>(dk, q_tile + dk_panel, column, STEP, words, true);
#endif
                });
                __syncthreads();
                clean_step<E>(dout_tile, step);
                clean_step<D>(q_tile, step);
                __syncthreads();
            }
            // dv += weights dout, dk += dscores q
#if DV
            multiply_weights<LOAD, DV>(dv, weights, dout_tile + dv_panel, column);
#endif
#if DK
            multiply_weights<LOAD, DK>(dk, dscores, q_tile + dk_panel, column);
#endif
        }
        note(number + 2, later);
        __syncthreads();            // the next load overwrites what was just read
    }
    wait_copies<0>();
    // looked up again: in between registers are dear
    const Work last(a);
    const bool whole = last.piece.part < 0;
    const i64 begin = whole ? i64(last.piece.line) * p.m + last.key
                            : i64(last.piece.part) * p.block_size;
    const int from = last.first + own_row();
#if DK
    join(dk, q_tiles);
    if (own_share() == 0)
        write((whole ? a.dk : a.dk_parts) + begin * a.dk_width, a.dk_width, from, last.there,
              last.live, dk[0], a.dk_from, p.d);
#endif
#if DV
    __syncthreads();
    join(dv, q_tiles);
    if (own_share() == 0)
        write((whole ? a.dv : a.dv_parts) + begin * a.dv_width, a.dv_width, from, last.there,
              last.live, dv[0], a.dv_from, p.e);
#endif
}
