// walk.cuh -- the tiles that a BlockMask lists for a line of 64 R rows; see walk.py.
//
// A run has `count` tiles side by side, and for each of the line's R rows of tiles what they are:
// FULL, NONE, or where in `names` the numbers of its bit tiles begin, one for each tile of the run.
#pragma once
#include "primitives.cuh"

enum { TILE = 64, FULL = -1, NONE = -2 };

struct TileLists {
    const i64* start;       // (layouts, lines + 1)
    const int* first;
    const int* count;
    const int* at;          // (runs, R)
    const int* names;
    const u64* bits;        // (numbers, 64): bit j of word i: whether row i may meet column j
    const int* layout;      // (batch, heads)
    int lines;
};

template<int R> struct Walk {
    int run, stop;              // runs from here on
    int tile, step, left;       // where it is: the tile, its number in its run, tiles left of that
    int at[R];

    // Goes to the first tile of a line that is not below `first`.
    __device__ __forceinline__ void begin(const TileLists& lists, int layout, int line, int first) {
        const i64* start = lists.start + layout * i64(lists.lines + 1) + line;
        run = int(start[0]);
        stop = int(start[1]);
        while (run < stop && lists.first[run] + lists.count[run] <= first)
            run++;
        enter(lists);
        if (tile < first && left > 0) {
            step = first - tile;
            left -= step;
            tile = first;
        }
    }

    __device__ __forceinline__ void enter(const TileLists& lists) {
        left = 0;
        tile = 0;
        step = 0;
        if (run >= stop)
            return;
        tile = lists.first[run];
        left = lists.count[run];
        UNROLL
        for (int r = 0; r < R; r++)
            at[r] = lists.at[run * R + r];
    }

    // Whether there is a tile, and it is below `end`.
    __device__ __forceinline__ bool here(int end) const {
        return left > 0 && tile < end;
    }

    __device__ __forceinline__ void advance(const TileLists& lists) {
        tile++;
        step++;
        left--;
        if (left == 0) {
            run++;
            enter(lists);
        }
    }

    // FULL, NONE, or the number of the bit tile that row of tiles `r` has here.
    __device__ __forceinline__ int kind(const TileLists& lists, int r) const {
        int found = at[0];
        UNROLL
        for (int other = 1; other < R; other++)
            found = r == other ? at[other] : found;
        return found < 0 ? found : lists.names[found + step];
    }
};

DEVICE u64 first_bits(int count) {
    return count >= 64 ? ~u64(0) : count <= 0 ? u64(0) : (u64(1) << count) - 1;
}

// The columns of a tile that a row of it may meet, if `columns` of them are there.
DEVICE u64 bits_of_row(const TileLists& lists, int kind, int row, int columns) {
    const u64 bits = kind >= 0 ? lists.bits[u32(kind) * TILE + row] : kind == FULL ? ~u64(0) : u64(0);
    return bits & first_bits(columns);
}
