// linear.cuh -- tiles of tokens and states, as the passes of linear attention read and write them.
// linear.py has the same structs as NumPy dtypes.
//
// HALF: arrays are fp16 and tiles fp32, of which a product takes 16 bits: more than fp16 has, and
// sums over keys and shares of them may leave its range.
//
// PASS, READS, CAUSAL, KIND, PROJECTED and DEEP are constants of a kernel, or with GENERIC what its
// arguments say. Features of kind EXP are always projected. DEEP: the tokens that are projected are
// wider than a tile, and come in parts of SIDE columns, with as much of the projection.
#pragma once
#include "nonfinite.cuh"

#if GENERIC
#define PASS a.pass
#define READS a.reads
#define CAUSAL a.causal
#define KIND a.kind
#define PROJECTED a.projected
#define DEEP (a.d > SIDE)
#endif

enum { IDENTITY = 0, ELU1 = 1, RELU = 2, EXP = 3 };
enum { OUT = 0, DQ = 1, DV = 2, DK = 3 };

enum {
    WARPS = THREADS / 32,
    ROW_WARPS = TOKENS / 16,            // warps that share out the rows of a step
    PARTS = WARPS / ROW_WARPS,          // and the columns of the result
    RESULT = SIDE / PARTS,
    TOKEN_TILE = TileSize<TOKENS, SIDE>::SIZE,
    STATE_TILE = TileSize<SIDE, SIDE>::SIZE
};
static_assert(PARTS == 1 || RESULT % PANEL == 0, "parts of a tile are whole panels");

#if HALF
typedef u16 Raw;

DEVICE Sum raw_number(Raw x) {
    return unpack_f16(x);
}
#else
typedef Stored Raw;

DEVICE Sum raw_number(Raw x) {
    return number(x);
}
#endif

enum { RAW_CHUNK = 16 / sizeof(Raw), RAW_TILE = TOKENS * SIDE * sizeof(Raw) };

// (batch, heads, tokens, width), as Operand, of numbers as they lie in memory.
struct Array {
    Raw* at;
    i64 b, h, n;

    __device__ __forceinline__ i64 place(int batch, int head, int number) const {
        return batch * b + head * h + number * n;
    }

    __device__ __forceinline__ Raw* token(int batch, int head, int number) const {
        return at + place(batch, head, number);
    }
};

// States of pairs of an item and a key/value head: (pairs, spans, F, E), and for the normaliser
// a vector (pairs, spans, F). at = 0: there are none.
struct States {
    Sum* at;
    i64 pair, span;             // strides, of these two and of the rows
    int row, last, last_row;    // the vector begins at `last`

    __device__ __forceinline__ Sum* of(int pair_number, int span_number) const {
        return at + pair_number * pair + span_number * span;
    }
};

#if ELEMENT == F64
typedef double2 SumPair;
#else
typedef float2 SumPair;
#endif

DEVICE Sum exponential(Sum x) {
#if ELEMENT == F64
    return exp(x);
#else
    return expf(x);
#endif
}

DEVICE void load_pair(const Raw* from, Sum& x, Sum& y) {
    if constexpr (sizeof(Raw) == 2) {
        const u32 pair = *(const u32*)from;
        x = raw_number(Raw(pair & 0xffff));
        y = raw_number(Raw(pair >> 16));
    } else {
        x = raw_number(from[0]);
        y = raw_number(from[1]);
    }
}

DEVICE void store_raw_pair(Raw* to, Sum x, Sum y) {
#if HALF
    *(u32*)to = pack_f16(x, y);
#else
    store_pair(to, x, y);
#endif
}

union Chunk {
    uint4 all;
    u32 word[4];
    Stored stored[CHUNK];
};

union RawChunk {
    uint4 all;
    Raw raw[RAW_CHUNK];
};

DEVICE void store_chunk(u32 to, const Sum* x) {
    Chunk chunk;
#if ELEMENT <= BF16
    UNROLL
    for (int i = 0; i < 4; i++)
        chunk.word[i] = pack(x[2 * i], x[2 * i + 1]);
#else
    UNROLL
    for (int i = 0; i < CHUNK; i++)
        chunk.stored[i] = x[i];
#endif
    store_shared(to, chunk.all);
}

DEVICE void store_tile_pair(u32 to, Sum x, Sum y) {
#if ELEMENT >= F32
    store_shared(to, SumPair{x, y});
#else
    store_shared(to, pack(x, y));
#endif
}

// What a product makes of a number.
DEVICE Sum as_taken(Sum x) {
#if ELEMENT <= BF16
    return unpack(pack(x, 0) & 0xffff);
#elif HALF
    return cut(x) + cut(x - cut(x));
#else
    return x;
#endif
}

// ---- tokens on their way: from an array by cp.async to `raw`, from there to a tile. A thread
// takes the chunks that it fetched, so there is no barrier between the two, and the next tokens can
// be fetched as soon as these are taken.

enum { RAW_ACROSS = SIDE / RAW_CHUNK, RAW_CHUNKS = TOKENS * RAW_ACROSS };

// `count` tokens from `first` on, and of each `width` numbers from `begin` on; zeros for the rest.
DEVICE void fetch(u32 raw, const Array& from, int batch, int head, int first, int count,
                  int width, int begin = 0) {
    const Raw* start = from.token(batch, head, first) + begin;
    _Pragma("unroll 2")
    for (int i = threadIdx.x; i < RAW_CHUNKS; i += THREADS) {
        const int row = i / RAW_ACROSS;
        const int column = i % RAW_ACROSS * RAW_CHUNK;
        copy_async<16>(raw + 16 * i, start + row * from.n + column, row < count && column < width);
    }
}

// Writes map(row, x) for each number x of these tokens, and returns whether all that this thread
// wrote is finite.
template<class Map> DEVICE bool take(u32 tile, u32 raw, int count, int width, Map map) {
    bool finite = true;
    _Pragma("unroll 1")
    for (int i = threadIdx.x; i < RAW_CHUNKS; i += THREADS) {
        const int row = i / RAW_ACROSS;
        const int column = i % RAW_ACROSS * RAW_CHUNK;
        RawChunk chunk;
        chunk.all = load_shared<uint4>(raw + 16 * i);
        Sum x[RAW_CHUNK];
        UNROLL
        for (int c = 0; c < RAW_CHUNK; c++) {
            const bool there = row < count && column + c < width;
            x[c] = there ? map(row, raw_number(chunk.raw[c])) : Sum(0);
            finite &= is_finite(x[c]);
        }
        UNROLL
        for (int c = 0; c < RAW_CHUNK; c += CHUNK)
            store_chunk(place<TOKENS>(tile, row, column + c), x + c);
    }
    return finite;
}

// ---- products

// Two of B from columns of a tile, taken as A from these columns as rows: the same numbers.
DEVICE void columns_as_a(A& a, const B (&b)[2]) {
    UNROLL
    for (int i = 0; i < 4; i++) {
#if ELEMENT == F64
        a.x[i >> 1][i & 1] = b[i & 1].x[i >> 1];
#elif ELEMENT == F32
        UNROLL
        for (int part = 0; part < 3; part++)
            a.x[part][i] = b[i & 1].x[part][i >> 1];
#else
        a.x[i] = b[i & 1].x[i >> 1];
#endif
    }
}

template<int ROWS> DEVICE RowsOfB moved_rows(RowsOfB from, int column) {
#if ELEMENT >= F32
    from.at[0] = moved<ROWS>(from.at[0], column);
    from.at[1] = moved<ROWS>(from.at[1], column);
#else
    from.at = moved<ROWS>(from.at, column);
#endif
    return from;
}

// C (16 x 8 TILES) += X Y^T for rows from `row` on of tile x and from `column` on of tile y, both
// SIDE wide. As multiply_transposed, but not all of it at once: registers are for the state.
template<int Y_ROWS, int TILES>
DEVICE void multiply_rows(Sum (&c)[1][TILES][4], u32 x, int row, u32 y, int column) {
    const u32 from_x = place_of_a<TOKENS>(x, row);
    const u32 from_y = place_of_columns<Y_ROWS>(y, column);
#if ELEMENT >= F32
    _Pragma("unroll 1")
#else
    _Pragma("unroll 2")
#endif
    for (int depth = 0; depth < SIDE; depth += DEPTH) {
        A a;
        load_a(a, moved<TOKENS>(from_x, depth));
        const u32 from = moved<Y_ROWS>(from_y, depth);
        UNROLL
        for (int i = 0; i < TILES; i += 2) {
            B b[2];
            load_rows_as_columns(b, from + i * 8 * 128);
            multiply(c[0][i], a, b[0]);
            multiply(c[0][i + 1], a, b[1]);
        }
    }
}

// Multiplies what is in the columns of A by factors in shared memory, from that of `column` on.
DEVICE void scale_columns(A& a, u32 factors, int column) {
    UNROLL
    for (int i = 0; i < 4; i++) {
#if ELEMENT == F64
        a.x[i >> 1][i & 1] *= load_shared<double>(
            factors + (column + 2 * pair_of_lane() + (i >> 1)) * 8);
#else
        const float2 factor = load_shared<float2>(
            factors + (column + 2 * pair_of_lane() + (i >> 1) * 8) * 4);
        float x = 0;
        float y = 0;
#if ELEMENT == F32
        UNROLL
        for (int part = 2; part >= 0; part--) {
            x += unpack_bf16(a.x[part][i] & 0xffff);
            y += unpack_bf16(a.x[part][i] >> 16);
        }
        split(a.x[0][i], a.x[1][i], a.x[2][i], x * factor.x, y * factor.y);
#else
        x = unpack(a.x[i] & 0xffff);
        y = unpack(a.x[i] >> 16);
        a.x[i] = pack(x * factor.x, y * factor.y);
#endif
#endif
    }
}

// A as `load_rows_as_b` has the depth, from the place of the row's first pair.
DEVICE void load_a_in_pairs(A& a, u32 from) {
#if ELEMENT == F64
    UNROLL
    for (int r = 0; r < 2; r++) {
        const double2 x = load_shared<double2>(from + r * 1024);
        a.x[0][r] = x.x;
        a.x[1][r] = x.y;
    }
#else
    load_a(a, from);
#endif
}

// C (16 x 8 TILES) += X Y for rows from `row` on of tile x, and of Y, SIDE rows, the columns from
// `column` on.
template<int TILES>
DEVICE void multiply_by(Sum (&c)[1][TILES][4], u32 x, int row, u32 y, int column) {
#if ELEMENT == F64
    const u32 from_x = place<TOKENS>(x, row + row_of_lane(), 2 * pair_of_lane());
#else
    const u32 from_x = place_of_a<TOKENS>(x, row);
#endif
    const RowsOfB from_y = moved_rows<SIDE>(rows_of_b<SIDE>(y, 0), column);
    _Pragma("unroll 1")
    for (int depth = 0; depth < SIDE; depth += DEPTH) {
        A a;
        load_a_in_pairs(a, moved<TOKENS>(from_x, depth));
        UNROLL
        for (int i = 0; i < TILES; i += 2) {
            B b[2];
            load_rows_as_b<SIDE>(b, from_y, depth, 8 * i);
            multiply(c[0][i], a, b[0]);
            multiply(c[0][i + 1], a, b[1]);
        }
    }
}

// C (16 STRIPS x 8 TILES) += Z^T Y, over all tokens: of Z the columns from `column_of_z` on, of Y
// from `column_of_y` on. `factors` of tokens are in shared memory, or 0.
template<int STRIPS, int TILES>
DEVICE void multiply_columns(Sum (&c)[STRIPS][TILES][4], u32 z, int column_of_z, u32 y,
                             int column_of_y, u32 factors) {
    const RowsOfB rows_of_z = rows_of_b<TOKENS>(z, 0);
    const RowsOfB rows_of_y = moved_rows<TOKENS>(rows_of_b<TOKENS>(y, 0), column_of_y);
    _Pragma("unroll 1")
    for (int row = 0; row < TOKENS; row += DEPTH) {
        A a[STRIPS];
        UNROLL
        for (int s = 0; s < STRIPS; s++) {
            B turned[2];
            load_rows_as_b<TOKENS>(turned, rows_of_z, row, column_of_z + 16 * s);
            columns_as_a(a[s], turned);
            if (factors)
                scale_columns(a[s], factors, row);
        }
        UNROLL
        for (int i = 0; i < TILES; i += 2) {
            B b[2];
            load_rows_as_b<TOKENS>(b, rows_of_y, row, 8 * i);
            UNROLL
            for (int s = 0; s < STRIPS; s++) {
                multiply(c[s][i], a[s], b[0]);
                multiply(c[s][i + 1], a[s], b[1]);
            }
        }
    }
}

// ---- problem

// A launch does a part: F of the features, and E of the values' columns, at which operands and
// states begin. Results are sums over parts, of either or of both.
struct LinearArguments {
    Array x, y, z, out;
    Array tokens;               // DQ: q; DK: k
    Sum* partial;               // laid out as out: the results of the parts before, if this is not
                                // the first; and if it is not the final one, where to leave them
    Sum* den;                   // OUT: denominators, (batch, heads, n), likewise: here they are left,
    const Sum* den_before;      // and here are those before, or 0; without `vector` these are all
    const Sum* inverse;         // 1 / denominator, or 0 of empty rows; and the gradient of each
    const Sum* pull;            // denominator: (batch, heads, n); 0: not normalised
    States before, after;       // of spans; at = 0: zeros, and not wanted
    const Stored* projection;   // (F, D), rows `depth` apart and zeros up to multiples of SIDE; or 0
    const Sum* tops;            // kind EXP: stabilisers of keys, (pairs, m), and the largest before
    const Sum* running;         // each TOKENS keys and behind the last, (pairs, chunks + 1)
    const Sum* query_most;      // and where there are more features than here, the largest product
    const Sum* key_most;        // with the projection: (batch, heads, n) and (batch, groups, m)
    const int* q_lengths;       // (batch,)
    const int* kv_lengths;
    const int* offset;
    int batch, heads, groups, n, m, d, f, e;
    int each;                   // steps of a span
    int chunks, depth;
    int pass, reads, causal, kind, projected;
    int normalize, vector;      // whether there are denominators; whether this part has their sums
    int first, final;
    Sum scale, epsilon;         // of features
    Sum added, least;           // to denominators; and up to where these count as 0
};

// Query r of a step meets its key c iff c <= r + shift. Its rows and columns are its queries and
// keys, or the other way round; those that a kernel has no use for count 0.
struct Step {
    int query, queries, key, keys, shift, chunk;
    int row, rows, column, columns;
};

DEVICE int clipped(int x, int limit) {
    return min(max(x, 0), limit);
}

struct Sequence {
    int queries, keys, offset, first, steps;
    bool by_query;

    __device__ __forceinline__ Sequence(const LinearArguments& a, int batch) {
        queries = a.q_lengths[batch];
        keys = a.kv_lengths[batch];
        offset = a.offset[batch];
        by_query = PASS <= DQ;
        // of positions the first, a multiple of TOKENS, and how many steps there are from there on
        first = 0;
        int end = by_query == bool(READS) ? queries : keys;
        if (CAUSAL) {
            first = offset < 0 ? -((TOKENS - 1 - offset) / TOKENS * TOKENS) : 0;
            end = max(keys, queries + offset);
        }
        steps = (end - first + TOKENS - 1) / TOKENS;
    }

    __device__ __forceinline__ Step step(const LinearArguments& a, int number) const {
        const int start = first + number * TOKENS;
        const int shifted = CAUSAL ? start - offset : start;
        const int i = clipped(shifted, queries);
        const int i_count = clipped(shifted + TOKENS, queries) - i;
        const int j = clipped(start, keys);
        const int j_count = clipped(start + TOKENS, keys) - j;
        Step step = {i, i_count, j, j_count, i + offset - j, start / TOKENS};
        step.row = by_query ? i : j;
        step.rows = by_query ? i_count : j_count;
        step.column = by_query ? j : i;
        step.columns = by_query ? j_count : i_count;
        if (!CAUSAL && READS)
            step.columns = 0;
        if (!READS)
            step.rows = 0;
        return step;
    }
};

// Of h, what a feature map is given; of kind EXP less the largest of the token.
DEVICE Sum feature(const LinearArguments& a, Sum h) {
    if (KIND == ELU1)
        return h > 0 ? h + 1 : exponential(h);
    if (KIND == RELU)
        return (h < 0 ? Sum(0) : h) + a.epsilon;
    return KIND == EXP ? exponential(h) : h;
}

DEVICE Sum slope(const LinearArguments& a, Sum h) {
    if (KIND == ELU1)
        return h > 0 ? Sum(1) : exponential(h);
    if (KIND == RELU)
        return h > 0 ? Sum(1) : Sum(0);
    return KIND == EXP ? exponential(h) : Sum(1);
}

// The larger; x if y is NaN.
DEVICE Sum larger_number(Sum x, Sum y) {
    return y > x ? y : x;
}

// A stabiliser that can be subtracted: before the first key it is -inf.
DEVICE Sum subtractable(Sum top) {
    return top == -INFINITE ? Sum(0) : top;
}

// What a block knows of its work, and where it keeps it.
struct Block {
    int batch, group, shared_heads, own, part, part_column;
    u32 x, y, z, state, raw_x, raw_y, raw_z, lasts, pulls, shares, words;
    u32 projection, raw_tokens, tops, bases, row_factors, column_factors, largest, totals;

    __device__ __forceinline__ Block(const LinearArguments& a) {
        batch = blockIdx.x / a.groups;
        group = blockIdx.x % a.groups;
        shared_heads = a.heads / a.groups;
        const int warp = threadIdx.x / 32;
        own = warp % ROW_WARPS * 16;
        part = warp / ROW_WARPS;
        part_column = part * RESULT;
        // a multiple of 128 each, up to the vectors
        x = shared_base();
        y = x + TOKEN_TILE;
        z = y + TOKEN_TILE;
        state = z + TOKEN_TILE;
        raw_x = state + STATE_TILE;
        raw_y = raw_x + RAW_TILE;
        raw_z = raw_y + RAW_TILE;
        lasts = raw_z + RAW_TILE;
        pulls = lasts + SIDE * sizeof(Sum);
        shares = pulls + TOKENS * sizeof(Sum);
        words = shares + TOKENS * sizeof(Sum) + warp * 16 * 8;
        // what follows is there only if features are projected
        projection = shares + TOKENS * sizeof(Sum) + WARPS * 16 * 8;
        raw_tokens = projection + STATE_TILE;
        tops = raw_tokens + RAW_TILE;
        bases = tops + TOKENS * sizeof(Sum);
        row_factors = bases + TOKENS * sizeof(Sum);
        column_factors = row_factors + TOKENS * sizeof(Sum);
        largest = column_factors + TOKENS * sizeof(Sum);
        totals = largest + PARTS * TOKENS * sizeof(Sum);
    }

    __device__ __forceinline__ int row(int h) const {
        return own + row_of_lane() + 8 * h;
    }
};

DEVICE Sum shared_sum(u32 from, int number) {
    return load_shared<Sum>(from + number * u32(sizeof(Sum)));
}

DEVICE void store_sum(u32 to, int number, Sum x) {
    store_shared(to + number * u32(sizeof(Sum)), x);
}

// ---- features of projected tokens

// SIDE rows of it from feature `first` on, and SIDE columns from `begin` on.
DEVICE void fetch_projection(const LinearArguments& a, const Block& block, int first, int begin) {
    const Stored* start = a.projection + i64(first) * a.depth + begin;
    for (int i = threadIdx.x; i < SIDE * SIDE / CHUNK; i += THREADS) {
        const int row = i / (SIDE / CHUNK);
        const int column = i % (SIDE / CHUNK) * CHUNK;
        copy_async<16>(place<SIDE>(block.projection, row, column),
                       start + i64(row) * a.depth + column, true);
    }
}

// Tokens of a step, and where they are from.
struct Tokens {
    const Array& from;
    int head, first, count;
    const Sum* most;            // of kind EXP the largest h of the first of them; 0: not known yet
};

// h = projection x for 16 rows of a step, and a part of the features. Of kind EXP h is less the
// largest of each row, which is in `most`.
struct Projected {
    Sum h[1][RESULT / 8][4];
    Sum most[2];
    int features;

    // The tokens' first columns are in `raw`, and unless DEEP so is the projection in its place.
    // `visit()` is called whenever columns of the tokens, scaled, lie in `tile`.
    template<class Visit>
    __device__ __forceinline__ Projected(const LinearArguments& a, const Block& block, u32 tile,
                                         u32 raw, const Tokens& tokens, int first, Visit visit) {
        features = a.f - first;
        clear(h);
        _Pragma("unroll 1")
        for (int begin = 0; begin == 0 || (DEEP && begin < a.d); begin += SIDE) {
            if (DEEP) {
                __syncthreads();        // what was there has been read
                fetch_projection(a, block, first, begin);
                if (begin > 0)
                    fetch(raw, tokens.from, block.batch, tokens.head, tokens.first, tokens.count,
                          a.d - begin, begin);
                commit_copies();
                wait_copies<0>();
            }
            take(tile, raw, tokens.count, a.d - begin, [&](int, Sum x) { return a.scale * x; });
            __syncthreads();
            multiply_rows<SIDE>(h, tile, block.own, block.projection, block.part_column);
            visit();
        }
        if (KIND == EXP)
            subtract_most(block, tokens);
    }

    __device__ __forceinline__ Projected(const LinearArguments& a, const Block& block, u32 tile,
                                         u32 raw, const Tokens& tokens)
        : Projected(a, block, tile, raw, tokens, 0, [] {}) {}

    __device__ __forceinline__ void subtract_most(const Block& block, const Tokens& tokens) {
        if (tokens.most) {
            UNROLL
            for (int r = 0; r < 2; r++) {
                const int row = block.row(r);
                most[r] = row < tokens.count ? tokens.most[row] : Sum(0);
                each(block, r, [&](int, Sum& x) { x -= most[r]; });
            }
            return;
        }
        UNROLL
        for (int r = 0; r < 2; r++) {
            most[r] = -INFINITE;
            each(block, r, [&](int, Sum& x) { most[r] = larger_number(most[r], x); });
            most[r] = larger_number(most[r], __shfl_xor_sync(~0u, most[r], 1));
            most[r] = larger_number(most[r], __shfl_xor_sync(~0u, most[r], 2));
            if (pair_of_lane() == 0)
                store_sum(block.largest, block.part * TOKENS + block.row(r), most[r]);
        }
        __syncthreads();
        UNROLL
        for (int r = 0; r < 2; r++) {
            UNROLL
            for (int part = 0; part < PARTS; part++)
                most[r] = larger_number(most[r],
                                        shared_sum(block.largest, part * TOKENS + block.row(r)));
            each(block, r, [&](int, Sum& x) { x -= most[r]; });
        }
    }

    // visit(number of the feature, reference) for what this thread has of its row r, 0 or 1.
    template<class Each>
    __device__ __forceinline__ void each(const Block& block, int r, Each visit) {
        UNROLL
        for (int i = 0; i < RESULT / 8; i++)
            UNROLL
            for (int c = 0; c < 2; c++) {
                const int f = block.part_column + 8 * i + 2 * pair_of_lane() + c;
                if (f < features)
                    visit(f, h[0][i][2 * r + c]);
            }
    }

    // Writes what has become of h where the tokens are, when all have read these; zeros for rows
    // from `count` on. Returns whether all is finite.
    __device__ __forceinline__ bool store(const Block& block, u32 tile, int count) const {
        bool fine = true;
        __syncthreads();
        UNROLL
        for (int r = 0; r < 2; r++)
            UNROLL
            for (int i = 0; i < RESULT / 8; i++) {
                const int column = block.part_column + 8 * i + 2 * pair_of_lane();
                const bool there = block.row(r) < count;
                const Sum x = there && column < features ? h[0][i][2 * r] : Sum(0);
                const Sum y = there && column + 1 < features ? h[0][i][2 * r + 1] : Sum(0);
                fine &= is_finite(x) && is_finite(y);
                store_tile_pair(place<TOKENS>(tile, block.row(r), column), x, y);
            }
        return fine;
    }
};

// Half the square of the tokens in a tile, of one row, added up by the four threads of the row.
DEVICE Sum half_square(u32 tile, int row) {
    Sum sum = 0;
    for (int chunk = pair_of_lane(); chunk < SIDE / CHUNK; chunk += 4) {
        Chunk x;
        x.all = load_shared<uint4>(place<TOKENS>(tile, row, chunk * CHUNK));
        UNROLL
        for (int c = 0; c < CHUNK; c++)
            sum = times_plus(number(x.stored[c]), number(x.stored[c]), sum);
    }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return sum / 2;
}
