// nonfinite.cuh -- NaN and inf behind a mask.
//
// A masked score is replaced, never added to, so what is bad in q or k cannot leak through scores.
// But a masked weight is 0, and 0 * NaN is NaN inside a product with v (or k, q, dout in a
// backward). So where pairs are masked, what a thread has copied of that operand it also looks at.
// If all is finite, as it nearly always is, nothing more happens. If not,
//
//     1. each row's bits of allowed pairs go to shared memory;
//     2. what is not finite is added to the results of the rows that may see it: inf stays inf, inf
//        beside -inf, inf with a weight of 0, and NaN become NaN, as they would in the product;
//     3. it becomes 0 in the tile, and the ordinary product follows.
#pragma once
#include "tile.cuh"

DEVICE bool is_finite(Sum x) {
    return x - x == 0;
}

// Whether any number that this thread copied is not finite.
template<int ROW_COUNT, int WIDTH, int COUNT = THREADS> DEVICE bool any_bad(u32 tile) {
    bool found = false;
    own_chunks<ROW_COUNT, WIDTH, COUNT>(tile, [&](int, int, u32 at) {
        const uint4 chunk = load_shared<uint4>(at);
        found |= (carried(chunk.y) | carried(chunk.w)) != 0;
        if (ELEMENT != F64)
            found |= (carried(chunk.x) | carried(chunk.z)) != 0;
    });
    return found;
}

// Sets to 0 what is not finite in rows `first` to `first` + `count` - 1, as far as this thread
// copied them.
template<int ROW_COUNT, int WIDTH, int COUNT = THREADS>
DEVICE void clean(u32 tile, int first, int count) {
    own_chunks<ROW_COUNT, WIDTH, COUNT>(tile, [&](int row, int, u32 at) {
        if (row < first || row >= first + count)
            return;
        UNROLL
        for (int i = 0; i < CHUNK; i++)
            if (!is_finite(number(load_shared<Stored>(at + i * BYTES))))
                store_shared(at + i * BYTES, Stored(0));
    });
}

// Which of the columns of a step a row may meet, as this thread's columns see them: bit
// 8 (i % 4) + e of word i / 4 for column 8 i + 2 t + e.
template<int COLUMNS> struct RowBits {
    u32 word[(COLUMNS + 31) / 32];

    // `bits`: of 64 columns, of which the step's begin at `from`.
    __device__ __forceinline__ void set(u64 bits, int from) {
        UNROLL
        for (int i = 0; i < (COLUMNS + 31) / 32; i++)
            word[i] = u32(bits >> (from + 32 * i)) >> 2 * pair_of_lane();
    }

    __device__ __forceinline__ bool get(int i, int e) const {
        return word[i / 4] >> (8 * (i % 4) + e) & 1;
    }

    __device__ __forceinline__ void hide(int i, int e) {
        word[i / 4] &= ~(1u << (8 * (i % 4) + e));
    }

    // Writes the row's bits of all columns to shared memory: the four threads of a row each have
    // some of them.
    __device__ __forceinline__ void share(u32 to) const {
        UNROLL
        for (int i = 0; i < (COLUMNS + 31) / 32; i++) {
            u32 all = (word[i] & 0x03030303u) << 2 * pair_of_lane();
            all |= __shfl_xor_sync(~0u, all, 1);
            all |= __shfl_xor_sync(~0u, all, 2);
            if (pair_of_lane() == 0)
                store_shared(to + 4 * i, all);
        }
    }
};

// Adds to `c` what its rows may see that is not finite in `count` rows of a tile, from `first` on:
// as it is, where weights are positive, or as NaN, where they are 0 or of either sign. `words`: what
// the warp's rows shared, 8 bytes each.
template<int ROW_COUNT, int WIDTH, int ROW_SLICES>
DEVICE void add_bad(Sum (&c)[ROW_SLICES][WIDTH / 8][4], u32 tile, int first, int count, u32 words,
                    bool as_nan) {
    _Pragma("unroll 1")
    for (int j = 0; j < count; j++) {
        bool sees[ROW_SLICES][2];
        UNROLL
        for (int s = 0; s < ROW_SLICES; s++)
            UNROLL
            for (int h = 0; h < 2; h++) {
                const u32 row = words + 8 * (16 * s + 8 * h + row_of_lane());
                sees[s][h] = load_shared<u32>(row + j / 32 * 4) >> j % 32 & 1;
            }
        const u32 from = place<ROW_COUNT>(tile, first + j, 0);
        UNROLL
        for (int i = 0; i < WIDTH / 8; i++)
            UNROLL
            for (int e = 0; e < 2; e++) {
                const int column = 8 * i + 2 * pair_of_lane() + e;
                Sum x = number(load_shared<Stored>(moved<ROW_COUNT>(from, column)
                                                   + column % CHUNK * BYTES));
                if (is_finite(x))
                    continue;
                if (as_nan)
                    x = NOT_A_NUMBER;
                UNROLL
                for (int s = 0; s < ROW_SLICES; s++)
                    UNROLL
                    for (int h = 0; h < 2; h++)
                        if (sees[s][h])
                            c[s][i][2 * h + e] += x;
            }
    }
}

// Whether a weight is 0 in the product that follows: number 2 h + e of tile i.
template<int TILES> DEVICE bool vanishes(const Weights<TILES>& w, int i, int h, int e) {
#if ELEMENT <= BF16
    return (w.x[i][h] >> 16 * e & 0x7fff) == 0;
#else
    return w.x[i][2 * h + e] == 0;
#endif
}

// For a product with `weights`, none of them negative: calls add(false) when the warp's rows have
// shared those of their `bits` whose weight is positive, and add(true) for those of 0, as 0 times inf
// is NaN.
template<int ROW_SLICES, int TILES, class Add>
DEVICE void add_by_weight(u32 words, const RowBits<8 * TILES> (&bits)[ROW_SLICES][2],
                          const Weights<TILES> (&weights)[ROW_SLICES], Add add) {
    RowBits<8 * TILES> now[ROW_SLICES][2], later[ROW_SLICES][2];
    UNROLL
    for (int s = 0; s < ROW_SLICES; s++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            now[s][h] = later[s][h] = bits[s][h];
            UNROLL
            for (int i = 0; i < TILES; i++)
                UNROLL
                for (int e = 0; e < 2; e++)
                    if (vanishes(weights[s], i, h, e))
                        now[s][h].hide(i, e);
                    else
                        later[s][h].hide(i, e);
        }
    _Pragma("unroll 1")
    for (int vanished = 0; vanished < 2; vanished++) {
        UNROLL
        for (int s = 0; s < ROW_SLICES; s++)
            UNROLL
            for (int h = 0; h < 2; h++) {
                now[s][h].share(words + 8 * (16 * s + 8 * h + row_of_lane()));
                now[s][h] = later[s][h];
            }
        __syncwarp();
        add(vanished != 0);
        __syncwarp();
    }
}

// The same for the 16 rows of one slice.
template<int TILES, class Add>
DEVICE void add_by_weight(u32 words, const RowBits<8 * TILES> (&bits)[2],
                          const Weights<TILES> (&weights)[1], Add add) {
    const RowBits<8 * TILES> rows[1][2] = {{bits[0], bits[1]}};
    add_by_weight(words, rows, weights, add);
}
