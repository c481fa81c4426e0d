// What the attention kernels for Hopper share: the steps that a block walks (walk.py makes them),
// which pairs of a step a row may meet, bad numbers behind a mask, and how rows are written.
//
// Macros: BRAIN (1: bf16, 0: fp16), D (64 or 128), the width of q, k and v.
#pragma once
#include "hopper.cuh"

enum {
    TILE = 64,
    FULL = -1,
    NONE = -2,
    WARP = 32,
    GROUP = 128,                // threads of a warpgroup
    PANELS = D / PANEL_COLUMNS,
    ROW_BYTES = 2 * D,
    CHUNKS = D / 8,             // 16 bytes each
    OUT_OF_WARP = 16 * ROW_BYTES,
    INSPECTORS = 3              // warps beside the one that loads
};

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

DEVICE int lane_number() {
    return threadIdx.x & 31;
}

// The first of a thread's two rows among the 64 of its warpgroup; the other is 8 further.
DEVICE int row_of_thread() {
    return (threadIdx.x & 127) / 32 * 16 + lane_number() / 4;
}

// The first of a thread's two columns of eight.
DEVICE int column_of_thread() {
    return 2 * (threadIdx.x & 3);
}

DEVICE u32 pack(float low, float high) {
    return BRAIN ? pack_bf16(low, high) : pack_f16(low, high);
}

DEVICE float unpack(u32 low16) {
    return BRAIN ? unpack_bf16(low16) : unpack_f16(low16);
}

// ---- work

// Steps of R x C tiles for every line of R tiles, see walk.py.
struct StepLists {
    const i64* start;       // (layouts, lines + 1)
    const int* first;
    const int* count;
    const int* at;          // (runs, R C)
    const int* names;
    const u64* bits;        // (numbers, 64)
    const int* layout;      // (batch, heads)
    int lines;
};

// A line of a head; items are listed in the order in which blocks take them.
struct Item {
    int line, batch, head;
};

DEVICE Item item_of(const int* items, int number, int heads) {
    const int both = items[2 * number + 1];
    return {items[2 * number], both / heads, both % heads};
}

// The steps of a line, in order, as long as they begin before `end`.
template <int R, int C>
struct Walk {
    const StepLists& lists;
    i64 run, stop;
    int end, step, left, on;
    int at[R * C];

    __device__ __forceinline__ Walk(const StepLists& given, int layout, int line, int tokens)
        : lists(given), end((tokens + C * TILE - 1) / (C * TILE)), step(0), left(0), on(0) {
        const i64* start = given.start + i64(layout) * (given.lines + 1) + line;
        run = start[0];
        stop = start[1];
    }

    __device__ __forceinline__ bool next() {
        if (left > 0) {
            step++;
            on += C;
        } else {
            if (run == stop)
                return false;
            step = lists.first[run];
            left = lists.count[run];
            on = 0;
            UNROLL
            for (int i = 0; i < R * C; i++)
                at[i] = lists.at[run * (R * C) + i];
            run++;
        }
        left--;
        return step < end;
    }

    // Whether a pair of the step is masked, if only so many tokens are there.
    __device__ __forceinline__ bool partial(int tokens) const {
        bool found = (step + 1) * C * TILE > tokens;
        UNROLL
        for (int i = 0; i < R * C; i++)
            found |= at[i] != FULL;
        return found;
    }

    // FULL, NONE, or where in names the number of the tile's bits is.
    __device__ __forceinline__ int kind(int place) const {
        return at[place] < 0 ? at[place] : at[place] + on;
    }
};

DEVICE u64 first_bits(int count) {
    return count >= 64 ? ~u64(0) : count <= 0 ? u64(0) : (u64(1) << count) - 1;
}

// The columns of a tile that its row may meet, if `columns` of them are there.
DEVICE u64 bits_of_row(const StepLists& lists, int kind, int row, int columns) {
    u64 bits = kind == FULL ? ~u64(0) : u64(0);
    if (kind >= 0)
        bits = lists.bits[i64(lists.names[kind]) * TILE + row];
    return bits & first_bits(columns);
}

// ---- stages: what the loading warp fills and the others empty, in turn

template <int COUNT>
struct Turn {
    int stage;
    u32 parity;

    __device__ __forceinline__ Turn() : stage(0), parity(0) {}

    __device__ __forceinline__ void advance() {
        if (++stage == COUNT) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// The warp is done with what a barrier guards.
DEVICE void release(u32 barrier) {
    __syncwarp();
    if (lane_number() == 0)
        mbarrier_arrive(barrier);
}

// ---- NaN and inf behind a mask
//
// A masked score is replaced, so that bad rows cannot leak through scores. But its weight of 0 times
// NaN is NaN in the product that follows. So where a step has masked pairs, the inspecting warps
// look through that product's operand in shared memory, put 0 in place of what is not finite, and
// tell. Whoever takes sums of the product then adds, from global memory, what its rows may see.

DEVICE bool is_strange(u32 bits16) {
    const u32 exponent = BRAIN ? 0x7f80 : 0x7c00;
    return (bits16 & exponent) == exponent;
}

// Whether one of a pair is not finite: its exponent, plus its lowest bit, then carries.
DEVICE u32 strange_pair(u32 pair) {
    const u32 exponent = BRAIN ? 0x7f807f80 : 0x7c007c00;
    const u32 lowest = BRAIN ? 0x00800080 : 0x04000400;
    return (pair & exponent) + lowest;
}

DEVICE u32 cleaned_pair(u32 pair) {
    return (is_strange(pair & 0xffff) ? 0 : pair & 0xffff)
        | (is_strange(pair >> 16) ? 0 : pair & 0xffff0000);
}

DEVICE bool any_strange(const uint4& x) {
    const u32 carried = strange_pair(x.x) | strange_pair(x.y) | strange_pair(x.z)
        | strange_pair(x.w);
    return carried & 0x80008000;
}

// Whether a thread's part of `bytes` from `tile` on is not all finite. All INSPECTORS warps share it.
DEVICE bool find_strange(u32 tile, int bytes) {
    bool found = false;
    for (int at = 16 * (threadIdx.x - WARP); at < bytes; at += 16 * WARP * INSPECTORS)
        found |= any_strange(load_shared<uint4>(tile + at));
    return found;
}

DEVICE void clean(u32 tile, int bytes) {
    for (int at = 16 * (threadIdx.x - WARP); at < bytes; at += 16 * WARP * INSPECTORS) {
        uint4 x = load_shared<uint4>(tile + at);
        if (any_strange(x)) {
            x = {cleaned_pair(x.x), cleaned_pair(x.y), cleaned_pair(x.z), cleaned_pair(x.w)};
            store_shared(tile + at, x);
        }
    }
    async_proxy_fence();
}

// An operand where it lies: (batch, heads, rows, D) by strides in elements.
struct Rows {
    const u16* first;
    i64 batch, head, row;

    __device__ __forceinline__ const u16* at(int b, int h, int r) const {
        return first + b * batch + h * head + r * row;
    }
};

// Adds what is not finite in rows 0 to 63 of an operand to a thread's sums, where `bits` tell that
// its rows see them: as it is, or as NaN if what it was multiplied with has no known sign.
DEVICE void add_strange(float (&sums)[D / 2], const u16* rows, i64 stride, const u64 (&bits)[2],
                        bool signless) {
    const u64 seen = bits[0] | bits[1];
    for (int row = 0; row < TILE; row++) {
        if (!(seen >> row & 1))
            continue;
        const u32* pairs = (const u32*)(rows + row * stride + column_of_thread());
        UNROLL
        for (int i = 0; i < D / 8; i++) {
            const u32 pair = pairs[4 * i];
            if (!(strange_pair(pair) & 0x80008000))
                continue;
            UNROLL
            for (int e = 0; e < 2; e++) {
                const u32 half = e ? pair >> 16 : pair & 0xffff;
                const float found = signless ? FLOAT_NAN : unpack(half);
                UNROLL
                for (int h = 0; h < 2; h++)
                    if (is_strange(half) && (bits[h] >> row & 1))
                        sums[4 * i + 2 * h + e] += found;
            }
        }
    }
}

// ---- results

// Writes the 16 rows of a warp's sums, times `share` each, `rows` of them, to (rows, D) from `to` on;
// zeros where not `live`. `scratch` is the warp's own.
DEVICE void write_rows(u16* to, int rows, const float (&sums)[D / 2], const float (&share)[2],
                       const bool (&live)[2], u32 scratch) {
    const int row = lane_number() / 4;
    UNROLL
    for (int h = 0; h < 2; h++)
        UNROLL
        for (int i = 0; i < CHUNKS; i++) {
            const float low = sums[4 * i + 2 * h] * share[h];
            const float high = sums[4 * i + 2 * h + 1] * share[h];
            const u32 place = scratch + (row + 8 * h) * ROW_BYTES + ((i ^ row) << 4);
            store_shared(place + 2 * column_of_thread(), live[h] ? pack(low, high) : u32(0));
        }
    __syncwarp();
    for (int i = lane_number(); i < 16 * CHUNKS; i += WARP) {
        const int from = i / CHUNKS;
        const int chunk = i % CHUNKS;
        if (from < rows)
            *(uint4*)(to + from * D + 8 * chunk) = load_shared<uint4>(
                scratch + from * ROW_BYTES + ((chunk ^ (from & 7)) << 4));
    }
    __syncwarp();
}
