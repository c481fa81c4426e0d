// linear.cuh -- tiles of tokens and states, as the passes of linear attention read and write them.
// linear.py has the same structs as NumPy dtypes.
//
// HALF: arrays are fp16 and tiles fp32, of which a product takes 16 bits: more than fp16 has, and sums
// over keys and shares of them may leave its range.
#pragma once
#include "nonfinite.cuh"

enum { IDENTITY = 0, ELU1 = 1, RELU = 2 };

enum { WARPS = THREADS / 32, TOKEN_TILE = TileSize<TOKENS, SIDE>::SIZE };

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

    __device__ __forceinline__ Raw* token(int batch, int head, int number) const {
        return at + batch * b + head * h + number * n;
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
#if ELEMENT == F64
    store_shared(to, double2{x, y});
#elif ELEMENT == F32
    store_shared(to, float2{x, y});
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

// ---- tokens on their way: from an array by cp.async to `raw`, from there to a tile. A thread takes
// the chunks that it fetched, so there is no barrier between the two, and the next tokens can be
// fetched as soon as these are taken.

enum { RAW_ACROSS = SIDE / RAW_CHUNK, RAW_CHUNKS = TOKENS * RAW_ACROSS };

// `count` tokens from `first` on, of `width` numbers each; zeros for the rest.
DEVICE void fetch(u32 raw, const Array& from, int batch, int head, int first, int count, int width) {
    const Raw* start = from.token(batch, head, first);
    _Pragma("unroll 4")
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
    _Pragma("unroll 2")
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

DEVICE RowsOfB moved_rows(RowsOfB from, int column) {
#if ELEMENT >= F32
    from.at[0] = moved<TOKENS>(from.at[0], column);
    from.at[1] = moved<TOKENS>(from.at[1], column);
#else
    from.at = moved<TOKENS>(from.at, column);
#endif
    return from;
}

// C (16 x 8 TILES) += X Y^T for rows from `row` on of tile x and from `column` on of tile y, both SIDE
// wide. As multiply_transposed, but not all of it at once: registers are for the state.
template<int Y_ROWS, int TILES>
DEVICE void multiply_rows(Sum (&c)[1][TILES][4], u32 x, int row, u32 y, int column) {
    const u32 from_x = place_of_a<TOKENS>(x, row);
    const u32 from_y = place_of_columns<Y_ROWS>(y, column);
    _Pragma("unroll 2")
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

// C (16 STRIPS x 8 TILES) += Z^T Y, over all tokens: of Z the columns from `column_of_z` on, of Y
// from `column_of_y` on.
template<int STRIPS, int TILES>
DEVICE void multiply_columns(Sum (&c)[STRIPS][TILES][4], u32 z, int column_of_z, u32 y,
                             int column_of_y) {
    const RowsOfB rows_of_z = rows_of_b<TOKENS>(z, 0);
    const RowsOfB rows_of_y = moved_rows(rows_of_b<TOKENS>(y, 0), column_of_y);
    _Pragma("unroll 1")
    for (int row = 0; row < TOKENS; row += DEPTH) {
        A a[STRIPS];
        UNROLL
        for (int s = 0; s < STRIPS; s++) {
            B turned[2];
            load_rows_as_b<TOKENS>(turned, rows_of_z, row, column_of_z + 16 * s);
            columns_as_a(a[s], turned);
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
