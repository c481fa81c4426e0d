// selected_bundle.cuh -- the rows of a block that owns queries, and the keys that they list.
//
// A bundle is some neighbouring tokens of a group: rows of a block are all heads of the group, for
// each token of the bundle. It walks every block of keys that one of its tokens lists, once.
//
//     2 tokens of 4 heads     row 0 to 3: token 0     row 4 to 7: token 1     row 8 to 15: nothing
//     token 0 lists 1, 5      token 1 lists 1, 3      walk: 1 (both), 3 (token 1), 5 (token 0)
//
// Where a group has more heads than a block has rows, a bundle is a token, in several slices.
#pragma once
#include "selected.cuh"

struct Bundles {
    const i64* start;       // (batch * groups, count + 1): where the entries of a bundle begin
    const int* block;       // ascending in a bundle
    const u32* who;         // bit i: whether token i of the bundle lists the block
    int count, tokens, slices;
};

struct Row {
    int head, token;
    int number;             // of the token in its bundle
    int seen;               // keys below this; 0 for rows that are not there
};

struct Bundle {
    int batch, group, first, tokens, slice;
    const int* block;
    const u32* who;
    int entries;
    u32 everyone;           // the bits of tokens that may see a key
    int least, most;        // the fewest keys that one of them may see, and the most
    int fit, parts, loads;  // blocks in a load, loads of a block, loads in all

    __device__ __forceinline__ void begin(const Problem& p, const Bundles& all) {
        const int number = blockIdx.x / all.slices % all.count;
        const int line = blockIdx.x / all.slices / all.count;
        slice = blockIdx.x % all.slices;
        batch = line / p.groups;
        group = line % p.groups;
        tokens = all.tokens;
        first = number * tokens;
        const i64* start = all.start + line * i64(all.count + 1) + number;
        block = all.block + start[0];
        who = all.who + start[0];
        entries = int(start[1] - start[0]);
        everyone = 0;
        least = p.m;
        most = 0;
        for (int i = 0; i < tokens; i++) {
            const int seen = first + i < p.n ? keys_seen(p, batch, first + i) : 0;
            if (seen > 0) {
                everyone |= 1u << i;
                least = min(least, seen);
                most = max(most, seen);
            }
        }
        fit = max(1, LOAD / p.block_size);
        parts = (p.block_size + LOAD - 1) / LOAD;
        loads = (entries + fit - 1) / fit;
        if (parts > 1 && entries > 0) {
            const int keys_of_last = min(p.block_size, most - block[entries - 1] * p.block_size);
            loads = (entries - 1) * parts + (keys_of_last + LOAD - 1) / LOAD;
        }
    }

    __device__ __forceinline__ Row row(const Problem& p, int place) const {
        const int heads = p.heads / p.groups;
        const int number = (slice * ROWS + place) / heads;
        const int token = first + number;
        const int head = group * heads + (slice * ROWS + place) % heads;
        if (number >= tokens || token >= p.n)
            return {head, p.n, 0, 0};
        return {head, token, number, keys_seen(p, batch, token)};
    }

    // Column `i` of a load: the key, or -1, and who lists it.
    __device__ __forceinline__ uint2 column(const Problem& p, int load, int i) const {
        const int entry = load / parts * fit + i / p.block_size;
        const int inside = load % parts * LOAD + i % p.block_size;
        if (i / p.block_size >= fit || inside >= p.block_size || entry >= entries)
            return {~0u, 0};
        const int key = block[entry] * p.block_size + inside;
        if (key >= most)
            return {~0u, 0};
        return {u32(key), who[entry]};
    }
};

enum { NOTE_SIZE = LOAD * 8 };

// Where the columns of a load are noted.
DEVICE u32 notes_of(u32 notes, int load) {
    return notes + load % NOTES * NOTE_SIZE;
}

// Begins to copy the rows of k or v that a load's columns name.
template<int WIDTH>
DEVICE void load_keys(u32 tile, u32 noted, const Stored* head, i64 stride, int width) {
    load_tile<LOAD, WIDTH>(tile, width, [&](int column) -> const Stored* {
        const int key = int(load_shared<u32>(noted + 8 * column));
        return key < 0 ? 0 : head + key * stride;
    });
}

// Keys and values of a bundle on their way: columns are looked up two loads ahead, and their rows
// are copied one load ahead, of those in use.
struct Keys {
    enum { K_SIZE = TileSize<LOAD, D>::SIZE, V_SIZE = TileSize<LOAD, E>::SIZE };
    const Stored* k;
    const Stored* v;
    u32 k_tiles, v_tiles, notes;

    __device__ __forceinline__ Keys(const Problem& p, const Bundle& bundle, u32 space)
        : k(p.k.head(bundle.batch, bundle.group)), v(p.v.head(bundle.batch, bundle.group)),
          k_tiles(space), v_tiles(k_tiles + 2 * K_SIZE), notes(v_tiles + 2 * V_SIZE) {}

    __device__ __forceinline__ u32 k_tile(int number) const {
        return k_tiles + (number & 1) * K_SIZE;
    }

    __device__ __forceinline__ u32 v_tile(int number) const {
        return v_tiles + (number & 1) * V_SIZE;
    }

    // The first byte behind.
    __device__ __forceinline__ u32 end() const {
        return notes + NOTES * NOTE_SIZE;
    }

    __device__ __forceinline__ void note(int number, uint2 column) const {
        if (threadIdx.x < LOAD)
            store_shared(notes_of(notes, number) + 8 * threadIdx.x, column);
    }

    // Has a load copied, if there is such a one: a group of copies of its own.
    __device__ __forceinline__ void copy(const Problem& p, const Bundle& bundle, int number) const {
        if (number < bundle.loads) {
            load_keys<D>(k_tile(number), notes_of(notes, number), k, p.k.n, p.d);
            load_keys<E>(v_tile(number), notes_of(notes, number), v, p.v.n, p.e);
        }
        commit_copies();
    }

    __device__ __forceinline__ void begin(const Problem& p, const Bundle& bundle) const {
        note(0, bundle.column(p, 0, threadIdx.x));
        note(1, bundle.column(p, 1, threadIdx.x));
        __syncthreads();
        copy(p, bundle, 0);
    }
};

// Whether some token may not see some column of a load.
DEVICE bool any_hidden(const Bundle& bundle, u32 noted) {
    bool found = false;
    for (int i = lane_number(); i < LOAD; i += 32) {
        const uint2 column = load_shared<uint2>(noted + 8 * i);
        found |= column.y != bundle.everyone || int(column.x) >= bundle.least;
    }
    return __any_sync(~0u, found);
}

// Which columns of a step the thread's two rows may meet.
DEVICE void find_seen(RowBits<STEP> (&bits)[2], const Row (&rows)[2], u32 noted, int column) {
    UNROLL
    for (int h = 0; h < 2; h++)
        bits[h].set(~u64(0), 0);
    UNROLL
    for (int i = 0; i < STEP / 8; i++)
        UNROLL
        for (int e = 0; e < 2; e++) {
            const uint2 x = load_shared<uint2>(
                noted + 8 * (column + 8 * i + 2 * pair_of_lane() + e));
            UNROLL
            for (int h = 0; h < 2; h++)
                if (!(x.y >> rows[h].number & 1) || int(x.x) >= rows[h].seen)
                    bits[h].hide(i, e);
        }
}
