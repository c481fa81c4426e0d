// tile.cuh -- tiles in shared memory: how they arrive, and the products of them that a warp does.
#pragma once
#include "element.cuh"

// An array (batch, heads, tokens, width): strides in numbers, those of a token side by side, and
// all of them multiples of 16 bytes.
struct Operand {
    Stored* at;
    i64 b, h, n;

    __device__ __forceinline__ Stored* head(int batch, int head) const {
        return at + batch * b + head * h;
    }
};

// What a thread copies it may also scan or change without a barrier: always the same chunks of a
// tile. `visit(row, column, place)` is called for each of them. COUNT threads share a tile: all of
// the block, or 32, where each warp has a tile of its own.
template<int ROWS, int WIDTH, int COUNT = THREADS, class Visit>
DEVICE void own_chunks(u32 tile, Visit visit) {
    enum { ACROSS = WIDTH / CHUNK, ALL = ROWS * ACROSS };
    const u32 thread = COUNT == THREADS ? threadIdx.x : threadIdx.x % COUNT;
    if (COUNT % ACROSS == 0 && COUNT / ACROSS % 8 == 0) {
        // rows of a thread lie a multiple of 8 apart: one swizzle for all
        enum { APART = COUNT / ACROSS };
        const int row = thread / ACROSS;
        const int column = thread % ACROSS * CHUNK;
        const u32 first = place<ROWS>(tile, row, column);
        _Pragma("unroll 4")
        for (int r = 0; r < ROWS; r += APART)
            if (ROWS % APART == 0 || row + r < ROWS)
                visit(row + r, column, first + r * 128);
    } else {
        _Pragma("unroll 1")
        for (int i = thread; i < ALL; i += COUNT) {
            const int row = i / ACROSS;
            const int column = i % ACROSS * CHUNK;
            visit(row, column, place<ROWS>(tile, row, column));
        }
    }
}

// ROWS rows of an array, of `width` numbers each; `row_at(row)` is where one begins, or 0 for zeros.
template<int ROWS, int WIDTH, int COUNT = THREADS, class RowAt>
DEVICE void load_tile(u32 tile, int width, RowAt row_at) {
    own_chunks<ROWS, WIDTH, COUNT>(tile, [&](int row, int column, u32 to) {
        const Stored* from = row_at(row);
        const bool there = from != 0 && column < width;
        copy_async<16>(to, from + column, there);
    });
}

// Rows from `first` on of the tokens of a head, of which `tokens` are there.
template<int ROWS, int WIDTH, int COUNT = THREADS>
DEVICE void load_tokens(u32 tile, const Stored* head, i64 stride, int first, int tokens, int width) {
    load_tile<ROWS, WIDTH, COUNT>(tile, width, [&](int row) {
        return first + row < tokens ? head + (first + row) * stride : 0;
    });
}

template<int ROW_SLICES, int TILES> DEVICE void clear(Sum (&c)[ROW_SLICES][TILES][4]) {
    UNROLL
    for (int s = 0; s < ROW_SLICES; s++)
        UNROLL
        for (int i = 0; i < TILES; i++)
            UNROLL
            for (int x = 0; x < 4; x++)
                c[s][i][x] = 0;
}

// C (16 ROW_SLICES x 8 TILES) += X Y^T for rows from `row` on of tile x and from `column` on of tile y,
// both WIDTH wide.
template<int X_ROWS, int Y_ROWS, int WIDTH, int ROW_SLICES, int TILES>
DEVICE void multiply_transposed(Sum (&c)[ROW_SLICES][TILES][4], u32 x, int row, u32 y, int column) {
    const u32 from_x = place_of_a<X_ROWS>(x, row);
    const u32 from_y = place_of_columns<Y_ROWS>(y, column);
    UNROLL
    for (int step = 0; step < WIDTH / DEPTH; step++) {
        A a[ROW_SLICES];
        UNROLL
        for (int s = 0; s < ROW_SLICES; s++)
            load_a(a[s], moved<X_ROWS>(from_x, step * DEPTH) + s * 16 * 128);
        UNROLL
        for (int i = 0; i < TILES; i += 2) {
            B b[2];
            load_rows_as_columns(b, moved<Y_ROWS>(from_y, step * DEPTH) + i * 8 * 128);
            UNROLL
            for (int s = 0; s < ROW_SLICES; s++) {
                multiply(c[s][i], a[s], b[0]);
                multiply(c[s][i + 1], a[s], b[1]);
            }
        }
    }
}

// The same, number by number: for fp32 that is not finite, which cannot be split for products.
template<int X_ROWS, int Y_ROWS, int WIDTH, int ROW_SLICES, int TILES>
DEVICE void multiply_numbers(Sum (&c)[ROW_SLICES][TILES][4], u32 x, int row, u32 y, int column) {
    _Pragma("unroll 1")
    for (int d = 0; d < WIDTH; d++) {
        Sum own[ROW_SLICES][2];
        UNROLL
        for (int s = 0; s < ROW_SLICES; s++)
            UNROLL
            for (int h = 0; h < 2; h++)
                own[s][h] = number(load_shared<Stored>(
                    place<X_ROWS>(x, row + 16 * s + 8 * h + row_of_lane(), d)));
        UNROLL
        for (int i = 0; i < TILES; i++)
            UNROLL
            for (int e = 0; e < 2; e++) {
                const Sum other = number(load_shared<Stored>(
                    place<Y_ROWS>(y, column + 8 * i + 2 * pair_of_lane() + e, d)));
                UNROLL
                for (int s = 0; s < ROW_SLICES; s++)
                    UNROLL
                    for (int h = 0; h < 2; h++)
                        c[s][i][2 * h + e] = times_plus(own[s][h], other, c[s][i][2 * h + e]);
            }
    }
}

// C (16 ROW_SLICES x WIDTH) += P Y for P (16 ROW_SLICES x 8 TILES), and rows from `row` on of tile y.
template<int Y_ROWS, int WIDTH, int ROW_SLICES, int TILES>
DEVICE void multiply_weights(Sum (&c)[ROW_SLICES][WIDTH / 8][4],
                             const Weights<TILES> (&p)[ROW_SLICES], u32 y, int row) {
    const RowsOfB from = rows_of_b<Y_ROWS>(y, row);
    UNROLL
    for (int step = 0; step < TILES * 8 / DEPTH; step++) {
        A a[ROW_SLICES];
        UNROLL
        for (int s = 0; s < ROW_SLICES; s++)
            as_a(a[s], p[s], step);
        UNROLL
        for (int i = 0; i < WIDTH / 8; i += 2) {
            B b[2];
            load_rows_as_b<Y_ROWS>(b, from, step * DEPTH, 8 * i);
            UNROLL
            for (int s = 0; s < ROW_SLICES; s++) {
                multiply(c[s][i], a[s], b[0]);
                multiply(c[s][i + 1], a[s], b[1]);
            }
        }
    }
}

DEVICE void store_pair(Stored* to, Sum x, Sum y) {
#if ELEMENT <= BF16
    *(u32*)to = pack(x, y);
#else
    to[0] = x;
    to[1] = y;
#endif
}

// Writes a row of sums, of which this thread has columns 2 t and 2 t + 1 of each 8; `from` is 0 for
// the thread's first row and 2 for the one 8 further. Room is for an even number of columns.
template<int TILES>
DEVICE void store_row(Stored* to, const Sum (&c)[TILES][4], int from, Sum factor, int width) {
    UNROLL
    for (int i = 0; i < TILES; i++) {
        const int column = 8 * i + 2 * pair_of_lane();
        if (column < width)
            store_pair(to + column, c[i][from] * factor, c[i][from + 1] * factor);
    }
}

template<int TILES>
DEVICE void store_wide_row(Sum* to, const Sum (&c)[TILES][4], int from, Sum factor, int width) {
    UNROLL
    for (int i = 0; i < TILES; i++) {
        const int column = 8 * i + 2 * pair_of_lane();
        if (column < width) {
            to[column] = c[i][from] * factor;
            to[column + 1] = c[i][from + 1] * factor;
        }
    }
}
