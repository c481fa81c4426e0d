// softmax_forward.cu -- flash attention, forward: softmax over the tiles that a BlockMask lists.
//
// A block of WARPS warps owns ROWS queries of a head, a warp 16 SLICES of them. Tiles of keys and
// values come by cp.async, LOAD keys at a time, while those before are worked on, STEP at a time:
//
//     keys ->  [LOAD][LOAD]...        scores (ROWS x STEP)  = q k^T       in registers
//     queries  [ROWS]                 sums   (ROWS x E)    += weights v   in registers
//
// Of each row a thread keeps the largest score so far and the sum of exp(score - largest), of its
// own columns; four threads share a row and meet at the end. With PACKED the rows of a block are
// all queries of all heads of a group, so that keys are read once for a group: for short queries.
// If these are few the tiles of a line can be split among blocks; softmax_join.cu joins what they
// find.
#include "softmax.cuh"

enum {
    ROWS = 16 * SLICES * WARPS,
    TILES_OF_ROWS = ROWS > TILE ? ROWS / TILE : 1,
    Q_SIZE = TileSize<ROWS, D>::SIZE,
    K_SIZE = TileSize<LOAD, D>::SIZE,
    V_SIZE = TileSize<LOAD, E>::SIZE
};

struct ForwardArguments {
    Problem problem;
    Operand out;
    Sum* wide_out;          // (splits, batch, heads, n, width) where not 0: instead of out
    Sum* lse;               // (splits, batch, heads, n)
    const Sum* sinks;       // (heads,), or 0
    int splits, tiles_of_split, width;
};

struct Row {
    int head, query;
    bool live;
};

// What a block knows of its work.
struct Block {
    int batch, group, head, first, queries, keys;

    __device__ __forceinline__ Row row(const Problem& p, int number) const {
#if PACKED
        const int query = number % p.n;
        return {head + number / p.n, query, number < p.heads / p.groups * p.n && query < queries};
#else
        return {head, first + number, first + number < queries};
#endif
    }
};

// What a warp keeps of its rows while it walks the keys.
struct State {
    Sum sums[SLICES][E / 8][4];
    Sum largest[SLICES][2];
    Sum total[SLICES][2];
};

// Products become scores, but for a factor that is returned; pairs that bias or gate mask lose their
// bit.
DEVICE Sum change_row(const Problem& p, const Block& block, const Row& row, int key,
                      Sum (&scores)[STEP / 8][4], int h, RowBits<STEP>& bits) {
    if (!row.live) {
        UNROLL
        for (int i = 0; i < STEP / 8; i++)
            scores[i][2 * h] = scores[i][2 * h + 1] = -INFINITE;
        return 1;
    }
    const Sum scale = p.scores.scale[row.head];
#if TERMS
    const QueryOfTerms query = {block.batch, row.head, row.query};
    UNROLL
    for (int i = 0; i < STEP / 8; i++)
        UNROLL
        for (int e = 0; e < 2; e++) {
            const int column = key + 8 * i + 2 * pair_of_lane() + e;
            bool hidden = column >= block.keys;
            Sum slope;
            Sum& score = scores[i][2 * h + e];
            if (!hidden)
                score = score_of(p.scores, query, column, score, scale, slope, hidden);
            if (HAS(GATE) && p.scores.gate.at && !hidden) {
                bool rises;
                hidden = gate_of(p.scores, query, column, rises) == 0;
            }
            if (hidden)
                bits.hide(i, e);
        }
    return 1;
#else
    if (scale > 0)
        return scale;
    // the largest product is not the largest score
    UNROLL
    for (int i = 0; i < STEP / 8; i++) {
        scores[i][2 * h] *= scale;
        scores[i][2 * h + 1] *= scale;
    }
    return 1;
#endif
}

// Scores become weights; sums and totals shrink where a row's largest score has grown.
DEVICE void weigh(const Problem& p, const Block& block, const Row& row, int key, Sum unit,
                  Sum (&scores)[STEP / 8][4], State& x, int s, int h) {
    const Sum before = x.largest[s][h];
    Sum largest = before;
    UNROLL
    for (int i = 0; i < STEP / 8; i++)
        largest = larger(largest, larger(scores[i][2 * h], scores[i][2 * h + 1]));
    largest = larger(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = larger(largest, __shfl_xor_sync(~0u, largest, 2));
    x.largest[s][h] = largest;
    const Sum base = largest == -INFINITE ? Sum(0) : largest;
    const Sum factor = unit * TO_BASE;
    const Sum shift = base * factor;
    const Sum decay = before == -INFINITE ? Sum(0) : power((before - base) * factor);
    UNROLL
    for (int i = 0; i < E / 8; i++) {
        x.sums[s][i][2 * h] *= decay;
        x.sums[s][i][2 * h + 1] *= decay;
    }
    Sum total = 0;
    UNROLL
    for (int i = 0; i < STEP / 8; i++)
        UNROLL
        for (int e = 0; e < 2; e++) {
            Sum& weight = scores[i][2 * h + e];
            const bool hidden = weight == -INFINITE;
            // the difference first where its last bits count; else it is one instruction less
            weight = ELEMENT >= F32 ? power((weight - base) * factor)
                                    : power(times_plus(weight, factor, -shift));
#if TERMS
            const int column = key + 8 * i + 2 * pair_of_lane() + e;
            if (HAS(GATE) && p.scores.gate.at && !hidden) {
                bool rises;
                weight *= gate_of(p.scores, {block.batch, row.head, row.query}, column, rises);
            }
            total += weight;
            if (HAS(DROPOUT) && p.scores.threshold && !hidden)
                weight *= kept(p.scores, {block.batch, row.head, row.query}, column);
#else
            total += weight;
#endif
        }
    x.total[s][h] = x.total[s][h] * decay + total;
}

// Divides by the totals, lets the sink join, and writes out and lse.
DEVICE void finish(const ForwardArguments& a, const Block& block, State& x, int own, int split) {
    const Problem& p = a.problem;
    UNROLL
    for (int s = 0; s < SLICES; s++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            Sum total = x.total[s][h];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            const int number = own + 16 * s + 8 * h + row_of_lane();
            const Row row = block.row(p, number);
            const int heads_here = PACKED ? p.heads / p.groups : 1;
            if (row.head >= block.head + heads_here || row.query >= p.n)
                continue;
            const Sum scale = p.scores.scale[row.head];
            const Sum unit = TERMS || !(scale > 0) ? Sum(1) : scale;
            const bool seen = row.live && total != 0;
            Sum share = seen ? 1 / total : Sum(0);
            Sum lse = seen ? x.largest[s][h] * unit + natural_logarithm(total) : -INFINITE;
            const i64 place = (i64(block.batch) * p.heads + row.head) * p.n + row.query;
            const i64 apart = split * i64(p.batch) * p.heads * p.n;
            if (a.sinks) {
                const Sum sink = a.sinks[row.head];
                share *= share_beside(lse, sink);
                lse = log_of_sum(lse, sink);
            }
            // what a padded query has met is not looked at, nor what one without a finite score has
            if (!seen)
                UNROLL
                for (int i = 0; i < E / 8; i++)
                    x.sums[s][i][2 * h] = x.sums[s][i][2 * h + 1] = 0;
            if (pair_of_lane() == 0)
                a.lse[apart + place] = lse;
            if (a.wide_out)
                store_wide_row(a.wide_out + (apart + place) * a.width, x.sums[s], 2 * h, share, p.e);
            else
                store_row(a.out.head(block.batch, row.head) + row.query * a.out.n, x.sums[s], 2 * h,
                          share, p.e);
        }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
softmax_forward(const __grid_constant__ ForwardArguments a) {
    const Problem& p = a.problem;
    Block block;
#if PACKED
    block.batch = blockIdx.x / p.groups;
    block.group = blockIdx.x % p.groups;
    block.head = block.group * (p.heads / p.groups);
    block.first = 0;
#else
    // the last lines first: under a causal mask they take longest
    const int lines = (p.n + ROWS - 1) / ROWS;
    block.first = (lines - 1 - int(blockIdx.x % lines)) * ROWS;
    block.head = blockIdx.x / lines % p.heads;
    block.batch = blockIdx.x / lines / p.heads;
    block.group = block.head / (p.heads / p.groups);
#endif
    block.queries = p.q_lengths[block.batch];
    block.keys = p.kv_lengths[block.batch];

    const u32 q_tile = shared_base();
    const u32 k_tiles = q_tile + Q_SIZE;
    const u32 v_tiles = k_tiles + 2 * K_SIZE;
    const Stored* k = p.k.head(block.batch, block.group);
    const Stored* v = p.v.head(block.batch, block.group);

    const int own = threadIdx.x / 32 * 16 * SLICES;         // the warp's first row
    const u32 words = v_tiles + 2 * V_SIZE + own * 8;       // for nonfinite.cuh

    State x;
    clear(x.sums);
    UNROLL
    for (int s = 0; s < SLICES; s++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            x.largest[s][h] = -INFINITE;
            x.total[s][h] = 0;
        }

    load_tile<ROWS, D>(q_tile, p.d, [&](int number) -> const Stored* {
        const Row row = block.row(p, number);
        return row.live ? p.q.head(block.batch, row.head) + row.query * p.q.n : 0;
    });
    if (ELEMENT == F32)
        commit_copies();

    const int split = blockIdx.y;
    const int begin = split * a.tiles_of_split;
    int end = (block.keys + TILE - 1) / TILE;
    if (a.splits > 1)
        end = min(end, begin + a.tiles_of_split);
    if (block.first >= block.queries)
        end = 0;
    Walk<TILES_OF_ROWS> walk;
    walk.begin(p.lists, p.lists.layout[block.batch * p.heads + block.head],
               block.first / (TILE * TILES_OF_ROWS), begin);
    int from = 0;               // which column of a tile a load begins at
    auto load = [&](int slot) {
        const int key = walk.tile * TILE + from;
        load_tokens<LOAD, D>(k_tiles + slot * K_SIZE, k, p.k.n, key, block.keys, p.d);
        load_tokens<LOAD, E>(v_tiles + slot * V_SIZE, v, p.v.n, key, block.keys, p.e);
    };
    if (walk.here(end))
        load(0);
    commit_copies();
    bool bad_queries = false;
    if (ELEMENT == F32) {
        wait_copies<1>();
        bad_queries = any_bad<ROWS, D>(q_tile);
    }

    for (int slot = 0; walk.here(end); slot ^= 1) {
        const int tile_from = from;
        const int key = walk.tile * TILE + from;
        const int columns = block.keys - walk.tile * TILE;
        const int kind = walk.kind(p.lists, own / TILE);
        bool partial = columns < TILE;
        UNROLL
        for (int r = 0; r < TILES_OF_ROWS; r++)
            partial |= walk.at[r] != FULL;
        const bool masked = partial || (HAS(BIAS) && p.scores.bias.at)
            || (HAS(GATE) && p.scores.gate.at);
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
            bad = __syncthreads_or(any_bad<LOAD, E>(v_tile));
        else
            __syncthreads();

        _Pragma("unroll 1")
        for (int step = 0; step < LOAD; step += STEP) {
            const bool met = kind != NONE && key + step < block.keys;
            RowBits<STEP> bits[SLICES][2];
            Weights<STEP / 8> weights[SLICES];
            if (met) {
                Sum scores[SLICES][STEP / 8][4];
                // scores = q k^T
                clear(scores);
                if (ELEMENT == F32 && bad)
                    multiply_numbers<ROWS, LOAD, D>(scores, q_tile, own, k_tile, step);
                else
                    multiply_transposed<ROWS, LOAD, D>(scores, q_tile, own, k_tile, step);
                UNROLL
                for (int s = 0; s < SLICES; s++)
                    UNROLL
                    for (int h = 0; h < 2; h++) {
                        const int number = own + 16 * s + 8 * h + row_of_lane();
                        const Row row = block.row(p, number);
                        RowBits<STEP>& seen = bits[s][h];
                        if (masked || bad)
                            seen.set(bits_of_row(p.lists, row.live ? kind : NONE, row.query % TILE,
                                                 columns), tile_from + step);
                        const Sum unit = change_row(p, block, row, key + step, scores[s], h, seen);
                        if (masked)
                            UNROLL
                            for (int i = 0; i < STEP / 8; i++)
                                UNROLL
                                for (int e = 0; e < 2; e++)
                                    if (!seen.get(i, e))
                                        scores[s][i][2 * h + e] = -INFINITE;
                        weigh(p, block, row, key + step, unit, scores[s], x, s, h);
                    }
                UNROLL
                for (int s = 0; s < SLICES; s++)
                    hold(weights[s], scores[s]);
            }
            if (bad) {
                // see nonfinite.cuh
                if (met)
                    add_by_weight(words, bits, weights, [&](bool vanished) {
                        add_bad<LOAD, E>(x.sums, v_tile, step, STEP, words, vanished);
                    });
                __syncthreads();
                clean<LOAD, E>(v_tile, step, STEP);
                __syncthreads();
            }
            // sums += weights v
            if (met)
                multiply_weights<LOAD, E>(x.sums, weights, v_tile, step);
        }
        __syncthreads();            // the next load overwrites what was just read
    }
    wait_copies<0>();
    finish(a, block, x, own, split);
}
