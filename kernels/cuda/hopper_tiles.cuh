// What the attention kernels for Hopper share: the steps that a block walks (walk.py makes them),
// which pairs of a step a row may meet, bad numbers behind a mask, and how rows are written.
//
// The first warpgroup of a block serves the others, which compute. Of its warps one loads tiles,
// one scouts (it walks the lists and notes in shared memory what each step is), and two inspect.
//
// Macros: BRAIN (1: bf16, 0: fp16); D (64 or 128), the width of q, k and v; GROUPS, the warpgroups
// that compute, each for 64 rows of a block; STAGES; SETTLE, whether `settle` is used.
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
    ROWS = TILE * GROUPS,
    THREADS = GROUP * (1 + GROUPS),
    COMPUTING_WARPS = 4 * GROUPS,
    NOTE = 16                   // bytes that tell what a step is
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

// A line of a head (or group of heads), and how many steps it has.
struct Item {
    int line, batch, head, steps;
};

DEVICE Item item_of(const int4* items, int number) {
    const int4 found = items[u32(number)];
    return {found.x, found.y, found.z, found.w};
}

DEVICE u64 first_bits(int count) {
    return count >= 64 ? ~u64(0) : count <= 0 ? u64(0) : (u64(1) << count) - 1;
}

// The steps of a line, in order. How many there are, its item tells.
template <int R, int C>
struct Walk {
    const StepLists& lists;
    int run, step, left;
    int at[R * C];      // FULL, NONE, or where in names the number of the tile's bits is

    __device__ __forceinline__ explicit Walk(const StepLists& given) : lists(given) {}

    __device__ __forceinline__ void restart(int layout, int line) {
        run = int(lists.start[i64(layout) * (lists.lines + 1) + line]);
        step = left = 0;
    }

    __device__ __forceinline__ void next() {
        if (left > 0) {
            step++;
            UNROLL
            for (int i = 0; i < R * C; i++)
                at[i] += at[i] < 0 ? 0 : C;
        } else {
            step = lists.first[run];
            left = lists.count[run];
            UNROLL
            for (int i = 0; i < R * C; i++)
                at[i] = lists.at[i64(run) * (R * C) + i];
            run++;
        }
        left--;
    }

    // The tokens of the step that are there, if only so many are in all.
    __device__ __forceinline__ void there(u64 (&bits)[C], int tokens) const {
        UNROLL
        for (int i = 0; i < C; i++)
            bits[i] = first_bits(tokens - (step * C + i) * TILE);
    }

    // Whether a pair of the step is masked.
    __device__ __forceinline__ bool partial() const {
        bool found = false;
        UNROLL
        for (int i = 0; i < R * C; i++)
            found |= at[i] != FULL;
        return found;
    }

    // The same if only so many tokens are there.
    __device__ __forceinline__ bool partial(int tokens) const {
        return partial() || (step + 1) * C * TILE > tokens;
    }
};

// A scout, all its lanes, writes the bits of a step: C words for each of the block's rows, of which
// only those tokens count that `live` has.
template <int R, int C>
DEVICE void write_bits(u32 to, const Walk<R, C>& walk, const u64 (&live)[C]) {
    UNROLL
    for (int i = 0; i < R * C; i++) {
        const int kind = walk.at[i];
        const int name = kind < 0 ? 0 : walk.lists.names[kind];
        KEEP_ROLLED
        for (int row = lane_number(); row < TILE; row += WARP) {
            u64 word = kind == FULL ? ~u64(0) : u64(0);
            if (kind >= 0)
                word = walk.lists.bits[i64(name) * TILE + row];
            store_shared(to + ((i / C * TILE + row) * C + i % C) * 8, word & live[i % C]);
        }
    }
}

// What a scout tells of a step: the first token walked, whether pairs are masked, the head.
struct Note {
    int first, masked, head;
};

DEVICE void write_note(u32 to, const Note& note) {
    if (lane_number() == 0)
        store_shared(to, uint4{u32(note.first), u32(note.masked), u32(note.head), 0});
}

DEVICE Note read_note(u32 from) {
    const uint4 found = load_shared<uint4>(from);
    return {int(found.x), int(found.y), int(found.z)};
}

// The bits of tile `c` of C that the thread's two rows have.
template <int C>
DEVICE void read_bits(u64 (&bits)[2], u32 from, int group, int c) {
    UNROLL
    for (int h = 0; h < 2; h++) {
        const int row = group * TILE + row_of_thread() + 8 * h;
        bits[h] = load_shared<u64>(from + (row * C + c) * 8);
    }
}

// Which of 64 columns the thread's two rows may meet, as this thread's columns see them.
struct TileBits {
    u32 words[2][2];

    __device__ __forceinline__ void set(const u64 (&bits)[2]) {
        UNROLL
        for (int h = 0; h < 2; h++) {
            const u64 mine = bits[h] >> column_of_thread();
            words[h][0] = u32(mine);
            words[h][1] = u32(mine >> 32);
        }
    }

    // For element 4 i + 2 h + e of 64 columns' sums.
    __device__ __forceinline__ bool get(int i, int h, int e) const {
        return words[h][i / 4] >> (8 * (i % 4) + e) & 1;
    }
};

// Masked elements of 64 columns, from x[first] on, become `value`.
template <int COUNT>
DEVICE void mask(float (&x)[COUNT], int first, const u64 (&rows)[2], float value) {
    TileBits bits;
    bits.set(rows);
    UNROLL
    for (int i = 0; i < TILE / 8; i++)
        UNROLL
        for (int h = 0; h < 2; h++)
            UNROLL
            for (int e = 0; e < 2; e++)
                if (!bits.get(i, h, e))
                    x[first + 4 * i + 2 * h + e] = value;
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

// Loads `rows` rows of an operand, all its panels.
DEVICE void load_rows(u32 to, const TensorMap* map, u32 barrier, int rows, int first, int head,
                      int batch) {
    KEEP_ROLLED
    for (int panel = 0; panel < PANELS; panel++)
        tma_load_4d(to + panel * rows * PANEL_ROW, map, barrier, panel * PANEL_COLUMNS, first, head,
                    batch);
}

// ---- NaN and inf behind a mask
//
// A masked score is replaced, so that bad rows cannot leak through scores. But its weight of 0
// times NaN is NaN in the product that follows. So where a step has masked pairs, the inspecting
// warps look through that product's operand in shared memory, put 0 in place of what is not finite,
// and tell. Whoever takes the sums of the product then adds, from global memory, what its rows may
// see.

DEVICE bool is_strange(u32 bits16) {
    const u32 exponent = BRAIN ? 0x7f80 : 0x7c00;
    return (bits16 & exponent) == exponent;
}

// Bits 15 and 31 are set where a half of a pair is not finite: its exponent, plus its lowest bit,
// then carries.
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

// Whether a thread's part of `bytes` from `tile` on is not all finite. `threads` share it.
DEVICE bool find_strange(u32 tile, int bytes, int thread, int threads) {
    bool found = false;
    _Pragma("unroll 2")
    for (int at = 16 * thread; at < bytes; at += 16 * threads)
        found |= any_strange(load_shared<uint4>(tile + at));
    return found;
}

DEVICE void clean(u32 tile, int bytes, int thread, int threads) {
    KEEP_ROLLED
    for (int at = 16 * thread; at < bytes; at += 16 * threads) {
        uint4 x = load_shared<uint4>(tile + at);
        if (any_strange(x)) {
            x = {cleaned_pair(x.x), cleaned_pair(x.y), cleaned_pair(x.z), cleaned_pair(x.w)};
            store_shared(tile + at, x);
        }
    }
    async_proxy_fence();
}

// Looks through a stage for what is not finite, and tells. `thread` of `threads` in whole warps.
DEVICE bool inspect(u32 tile, int bytes, u32 found, int thread, int threads) {
    const bool any = __ballot_sync(~0u, find_strange(tile, bytes, thread, threads)) != 0;
    if (lane_number() == 0)
        store_shared(found + 4 * (thread / WARP), u32(any));
    return any;
}

// Whether one of so many inspecting warps has found something.
DEVICE bool told(u32 found, int inspectors) {
    u32 any = 0;
    for (int i = 0; i < inspectors; i++)
        any |= load_shared<u32>(found + 4 * i);
    return any != 0;
}

// An operand where it lies: (batch, heads, rows, D) by strides in elements.
struct Rows {
    const u16* first;
    i64 batch, head, row;

    __device__ __forceinline__ const u16* at(int b, int h, int r) const {
        return first + b * batch + h * head + r * row;
    }
};

// The columns of 64 whose weights are 0 in a thread's two rows, as products take them: those of
// weights[first] to weights[first + 3].
template <int COUNT>
DEVICE void find_vanished(u64 (&found)[2], const u32 (&weights)[COUNT][4], int first) {
    UNROLL
    for (int h = 0; h < 2; h++) {
        u32 words[2] = {0, 0};
        UNROLL
        for (int i = 0; i < TILE / 8; i++)
            UNROLL
            for (int e = 0; e < 2; e++)
                if (!(weights[first + i / 2][i % 2 * 2 + h] >> 16 * e & 0x7fff))
                    words[i / 4] |= 1u << (8 * (i % 4) + e);
        UNROLL
        for (int i = 0; i < 2; i++) {
            words[i] <<= column_of_thread();
            words[i] |= __shfl_xor_sync(~0u, words[i], 1);
            words[i] |= __shfl_xor_sync(~0u, words[i], 2);
        }
        found[h] = words[0] | u64(words[1]) << 32;
    }
}

// Adds what is not finite in rows 0 to 63 of an operand to a thread's sums, where `bits` tell that
// its rows see them: as it is, or as NaN where `as_nan` has a bit, as what it was multiplied with is
// 0 or of either sign.
DEVICE void add_strange(float (&sums)[D / 2], const u16* rows, i64 stride, const u64 (&bits)[2],
                        const u64 (&as_nan)[2]) {
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
                if (!is_strange(half))
                    continue;
                UNROLL
                for (int h = 0; h < 2; h++)
                    if (bits[h] >> row & 1)
                        sums[4 * i + 2 * h + e] += as_nan[h] >> row & 1 ? FLOAT_NAN : unpack(half);
            }
        }
    }
}

// ---- results

// Writes the 16 rows of a warp's sums, times `share` each, to (rows, D) from `to` on; zeros where
// not `live`. On the way they lie in rows of panels that are the warp's own, `panel_bytes` apart.
DEVICE void write_rows(u16* to, int rows, const float (&sums)[D / 2], const float (&share)[2],
                       const bool (&live)[2], u32 scratch, int panel_bytes) {
    const int row = lane_number() / 4;
    __syncwarp();
    UNROLL
    for (int i = 0; i < CHUNKS; i++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            const float low = sums[4 * i + 2 * h] * share[h];
            const float high = sums[4 * i + 2 * h + 1] * share[h];
            const u32 place = swizzled(scratch + i / 8 * panel_bytes, row + 8 * h, i % 8);
            store_shared(place + 2 * column_of_thread(), live[h] ? pack(low, high) : u32(0));
        }
    __syncwarp();
    for (int i = lane_number(); i < 16 * CHUNKS; i += WARP) {
        const int from = i / CHUNKS;
        const int chunk = i % CHUNKS;
        if (from < rows)
            *(uint4*)(to + from * D + 8 * chunk) = load_shared<uint4>(
                swizzled(scratch + chunk / 8 * panel_bytes, from, chunk % 8));
    }
}
