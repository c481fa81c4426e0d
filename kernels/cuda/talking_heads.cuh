// talking_heads.cuh -- what the kernels of talking-heads attention share: the problem, products of
// all heads, and the mixes of their pairs.
//
// A block owns ROWS tokens of a batch item, with all heads, and meets STEP tokens at a time. Three
// kinds of work take turns, with a barrier between them; here those of the forward:
//
//     warps, by head      strips_h = q_h k_h^T            tensor cores; sums go to shared memory
//     threads, by pair    scores_s = scale * sum_h strips_h w_pre[h, s]
//                         weights_s = exp(scores_s - lse_s)
//                         strips_v = sum_s weights_s w_post[s, v] + b_post[v]
//     warps, by head      out_v += strips_v v             tensor cores; sums stay in registers
//
// A *strip* has the pairs of one head, in the order in which threads hold the sums of a product:
// four numbers of a lane, lanes, tiles of 8 columns, slices of 16 rows. So a warp writes and reads
// strips 16 bytes a lane, and a thread has OWN neighbouring pairs of one row in all strips, which it
// may overwrite without asking anyone. Mixes are fp32 (or fp64), whatever the dtype.
//
// What warps multiply comes by cp.async, WIDE columns at a time, into two slots of the warp's own:
// no other warp waits for it, and shared memory does not grow with the widths. The ROWS tokens stay
// in shared memory where there is room for them, else they come again at each step.
#pragma once
#include "nonfinite.cuh"
#include "walk.cuh"

enum {
    ROWS = 16 * SLICES,
    STEP = 16,
    TILES = STEP / 8,
    WIDE = PANEL,
    WARPS = THREADS / 32,
    OWN = ROWS * STEP / THREADS,
    // the odd 64 bytes keep fragments that take neighbouring heads from meeting in a bank
    STRIP = ROWS * STEP * sizeof(Sum) + 64,
    PACK = 16 / sizeof(Sum),
    ROWS_SIZE = TileSize<ROWS, WIDE>::SIZE,
    STEP_SIZE = TileSize<STEP, WIDE>::SIZE
};

struct Problem {
    Operand q, k, v;
    TileLists lists;        // lines of queries, or of keys for the kernel that owns keys
    const Sum* w_pre;       // (heads_in, HEADS), 0 for heads too many
    const Sum* w_post;      // (heads_out, HEADS): transposed
    const Sum* b_post;      // (heads_out,), or 0
    const int* q_lengths;   // (batch,)
    const int* kv_lengths;
    Sum scale;
    int batch, heads_in, heads, heads_out, k_groups, v_groups, n, m, d, e;
    int resident;           // whether the tokens that a block owns stay in shared memory
};

// Rows of Sum's (batch, heads, tokens, width): strides in numbers.
struct WideOperand {
    Sum* at;
    i64 b, h, n;

    __device__ __forceinline__ Sum* head(int batch, int head) const {
        return at + batch * b + head * h;
    }
};

struct Pack {
    Sum x[PACK];
};

struct Own {
    Sum x[OWN];
};

DEVICE int warp_number() {
    return threadIdx.x / 32;
}

DEVICE int parts_of(int width) {
    return (width + WIDE - 1) / WIDE;
}

// ---- the block's work

struct Place {
    int batch, chunk;       // which of the blocks that share one walk
    int first;              // the first token that the block owns
    int rows, columns;      // how many tokens there are on its side, and on the other
};

DEVICE Place place_of_queries(const Problem& p, int chunks) {
    const int lines = (p.n + ROWS - 1) / ROWS;
    const int line = blockIdx.x / chunks % lines;
    const int batch = blockIdx.x / chunks / lines;
    // the last lines first: under a causal mask they take longest
    const int first = (lines - 1 - line) * ROWS;
    const int queries = p.q_lengths[batch];
    return {batch, int(blockIdx.x % chunks), first, queries,
            first < queries ? p.kv_lengths[batch] : 0};
}

// The steps of a block along its line of tiles.
struct Steps {
    Walk<1> walk;
    int from;               // the column of the tile that the step begins at
    int columns;            // how many the line has

    __device__ __forceinline__ void begin(const Problem& p, const Place& block) {
        columns = block.columns;
        from = 0;
        walk.begin(p.lists, p.lists.layout[block.batch], block.first / TILE, 0);
    }

    __device__ __forceinline__ bool here() const {
        return walk.here((columns + TILE - 1) / TILE);
    }

    __device__ __forceinline__ int column() const {
        return walk.tile * TILE + from;
    }

    __device__ __forceinline__ void advance(const Problem& p) {
        from += STEP;
        if (from >= min(columns - walk.tile * TILE, int(TILE))) {
            from = 0;
            walk.advance(p.lists);
        }
    }

    // Writes which columns of the step each row may meet, 8 bytes a row. Returns whether some pair
    // of the step is masked.
    __device__ __forceinline__ bool note(const Problem& p, const Place& block, u32 words) const {
        const int first = block.first;
        const int rows = block.rows;
        const int kind = walk.kind(p.lists, 0);
        if (threadIdx.x < ROWS) {
            const int row = first + threadIdx.x;
            const u64 bits = bits_of_row(p.lists, row < rows ? kind : NONE, row % TILE,
                                         columns - walk.tile * TILE);
            store_shared(words + 8 * threadIdx.x, bits >> from & first_bits(STEP));
        }
        return kind != FULL || column() + STEP > columns || first + ROWS > rows;
    }
};

// ---- pairs

// Where four numbers of the thread are in a slice of a strip, those of tile i from `at` on.
DEVICE u32 place_in_strip(u32 strip, int slice, int i, int at) {
    return strip + (((slice * TILES + i) * 32 + lane_number()) * 4 + at) * sizeof(Sum);
}

DEVICE void write_slice(u32 strip, int slice, const Sum (&c)[TILES][4]) {
    UNROLL
    for (int i = 0; i < TILES; i++)
        UNROLL
        for (int at = 0; at < 4; at += PACK) {
            Pack own;
            UNROLL
            for (int x = 0; x < PACK; x++)
                own.x[x] = c[i][at + x];
            store_shared(place_in_strip(strip, slice, i, at), own);
        }
}

DEVICE void read_slice(u32 strip, int slice, Sum (&c)[TILES][4]) {
    UNROLL
    for (int i = 0; i < TILES; i++)
        UNROLL
        for (int at = 0; at < 4; at += PACK) {
            const Pack own = load_shared<Pack>(place_in_strip(strip, slice, i, at));
            UNROLL
            for (int x = 0; x < PACK; x++)
                c[i][at + x] = own.x[x];
        }
}

// The thread's row of the block, and the first of its OWN columns.
DEVICE int own_row() {
    const int number = OWN * threadIdx.x;
    return number / (128 * TILES) * 16 + number / 4 % 32 / 4 + number % 4 / 2 * 8;
}

DEVICE int own_column() {
    const int number = OWN * threadIdx.x;
    return number / 128 % TILES * 8 + number / 4 % 4 * 2 + number % 2;
}

// Bit o: whether the thread's pair number o is allowed.
DEVICE u32 own_bits(u32 words) {
    return load_shared<u32>(words + 8 * own_row()) >> own_column();
}

DEVICE Own load_own(u32 strip) {
    return load_shared<Own>(strip + threadIdx.x * sizeof(Own));
}

DEVICE void store_own(u32 strip, const Own& x) {
    store_shared(strip + threadIdx.x * sizeof(Own), x);
}

// Heads that are mixed at once: more would take registers.
enum { AT_ONCE = HEADS < 8 ? 2 : 1 };

// mixed_s = sum_h strips_h weights[h, s], for the thread's pairs.
DEVICE void mix(Sum (&mixed)[HEADS][OWN], u32 strips, int heads, u32 weights) {
    UNROLL
    for (int s = 0; s < HEADS; s++)
        UNROLL
        for (int o = 0; o < OWN; o++)
            mixed[s][o] = 0;
    _Pragma("unroll AT_ONCE")
    for (int h = 0; h < heads; h++) {
        const Own x = load_own(strips + h * STRIP);
        UNROLL
        for (int s = 0; s < HEADS; s += PACK) {
            const Pack w = load_shared<Pack>(weights + (h * HEADS + s) * sizeof(Sum));
            UNROLL
            for (int i = 0; i < PACK; i++)
                UNROLL
                for (int o = 0; o < OWN; o++)
                    mixed[s + i][o] = times_plus(x.x[o], w.x[i], mixed[s + i][o]);
        }
    }
}

// sum_s x_s weights[h, s] of head h.
DEVICE Own mix_back(const Sum (&x)[HEADS][OWN], int h, u32 weights) {
    // two sums each, which do not wait for each other
    Sum sums[OWN][2] = {};
    UNROLL
    for (int s = 0; s < HEADS; s += PACK) {
        const Pack w = load_shared<Pack>(weights + (h * HEADS + s) * sizeof(Sum));
        UNROLL
        for (int i = 0; i < PACK; i++)
            UNROLL
            for (int o = 0; o < OWN; o++)
                sums[o][i % 2] = times_plus(x[s + i][o], w.x[i], sums[o][i % 2]);
    }
    Own found;
    UNROLL
    for (int o = 0; o < OWN; o++)
        found.x[o] = sums[o][0] + sums[o][1];
    return found;
}

// Mixed products become weights, 0 where not `seen` and in heads that are not there: these have
// products of 0, but NaN where a product is not finite. `shift_at(s, o)` is what is subtracted from
// a score.
template<class ShiftAt>
DEVICE void weigh(const Problem& p, Sum (&mixed)[HEADS][OWN], u32 seen, ShiftAt shift_at) {
    UNROLL
    for (int s = 0; s < HEADS; s++)
        UNROLL
        for (int o = 0; o < OWN; o++) {
            const Sum weight = power(times_plus(mixed[s][o], p.scale, -shift_at(s, o)) * TO_BASE);
            mixed[s][o] = s < p.heads && (seen >> o & 1) ? weight : Sum(0);
        }
}

// Weights become mixed weights, in strips of the heads of the output.
DEVICE void mix_weights(const Sum (&weights)[HEADS][OWN], u32 seen, u32 strips, int heads,
                        u32 w_post, const Sum* b_post) {
    _Pragma("unroll AT_ONCE")
    for (int h = 0; h < heads; h++) {
        Own mixed = mix_back(weights, h, w_post);
        const Sum bias = b_post ? b_post[h] : Sum(0);
        UNROLL
        for (int o = 0; o < OWN; o++)
            mixed.x[o] = seen >> o & 1 ? mixed.x[o] + bias : Sum(0);
        store_own(strips + h * STRIP, mixed);
    }
}

// ---- small arrays in shared memory, of the whole block

// Weights (heads, HEADS).
DEVICE void load_weights(u32 to, const Sum* from, int heads) {
    for (int i = threadIdx.x; i < heads * HEADS; i += THREADS)
        store_shared(to + i * sizeof(Sum), from[i]);
}

// Of each head of the softmax COUNT tokens from `first` on, of which `tokens` are there:
// [HEADS][COUNT]. `change(number)` is what becomes of one; where there is none stands `absent`.
template<int COUNT, class Change>
DEVICE void load_rows(u32 to, const Problem& p, const Sum* from, int batch, int first, int tokens,
                      Sum absent, Change change) {
    for (int i = threadIdx.x; i < HEADS * COUNT; i += THREADS) {
        const int head = i / COUNT;
        const int token = first + i % COUNT;
        Sum x = absent;
        if (head < p.heads && token < tokens)
            x = change(from[(i64(batch) * p.heads + head) * p.n + token]);
        store_shared(to + i * sizeof(Sum), x);
    }
}

// What is subtracted from scores, of a log-sum-exp. A row that sees no key has weights of 0.
DEVICE Sum shift_of(Sum lse) {
    return lse == -INFINITE ? INFINITE : lse;
}

// ---- what warps copy

// Tokens from `first` on, of `tokens`, a row of one head each; none if `from` is 0.
struct Tokens {
    const Stored* from;
    i64 stride;
    int first, tokens;
};

// What a warp needs in a slot.
struct Job {
    Tokens step;
    Tokens own;             // tokens of the block, if they are not resident
    int width;              // columns that are there

    __device__ __forceinline__ void begin(u32 slot) const {
        if (!step.from)
            return;
        load_tokens<STEP, WIDE, 32>(slot, step.from, step.stride, step.first, step.tokens, width);
        if (own.from)
            load_tokens<ROWS, WIDE, 32>(slot + STEP_SIZE, own.from, own.stride, own.first,
                                        own.tokens, width);
    }
};

// Two slots of a warp: what comes next arrives in the other one.
struct Ring {
    u32 slots;
    int size, slot;

    __device__ __forceinline__ u32 here() const {
        return slots + slot * size;
    }

    __device__ __forceinline__ u32 other() const {
        return slots + (slot ^ 1) * size;
    }
};

// ---- products of a warp

// strips_h = x y^T: tokens of the block times those of a step, for all heads; heads of either side
// may share an array's. A warp does heads warp_number(), + WARPS, ..., each in parts of WIDE
// columns.
struct Products {
    const Stored* x;
    const Stored* y;                // of the batch item
    i64 x_h, x_n, y_h, y_n;
    int x_share, y_share;           // heads for one of the array
    int heads, width;
    int first, rows, columns;       // the block's first token; how many there are on either side
    u32 strips;
    u32 tiles;                      // where x is resident, else 0
    bool x_bad;                     // whether it holds what is not finite, if it is resident

    __device__ __forceinline__ void set(const Place& block, const Operand& x_, int x_share_,
                                        const Operand& y_, int y_share_, int heads_, int width_) {
        first = block.first;
        rows = block.rows;
        columns = block.columns;
        const int batch = block.batch;
        x = x_.at + batch * x_.b;
        x_h = x_.h;
        x_n = x_.n;
        x_share = x_share_;
        y = y_.at + batch * y_.b;
        y_h = y_.h;
        y_n = y_.n;
        y_share = y_share_;
        heads = heads_;
        width = width_;
        tiles = 0;
        x_bad = false;
    }

    __device__ __forceinline__ int jobs() const {
        return (heads + WARPS - 1 - warp_number()) / WARPS * parts_of(width);
    }

    __device__ __forceinline__ int head_of(int job) const {
        return warp_number() + job / parts_of(width) * WARPS;
    }

    // Begins to copy what stays, by all threads; returns its bytes.
    __device__ __forceinline__ u32 keep(u32 to) {
        tiles = to;
        const int count = heads / x_share * parts_of(width);
        for (int i = 0; i < count; i++) {
            const int column = i % parts_of(width) * WIDE;
            load_tokens<ROWS, WIDE>(to + i * ROWS_SIZE, x + i / parts_of(width) * x_h + column, x_n,
                                    first, rows, width - column);
        }
        return count * ROWS_SIZE;
    }

    // Whether this thread copied something there that is not finite.
    __device__ __forceinline__ bool any_kept_bad() const {
        bool found = false;
        for (int i = 0; tiles && i < heads / x_share * parts_of(width); i++)
            found |= any_bad<ROWS, WIDE>(tiles + i * ROWS_SIZE);
        return found;
    }

    // What a job with the step that begins at `column` multiplies.
    __device__ __forceinline__ Job job(int number, int column) const {
        if (number >= jobs())
            return {};
        const int head = head_of(number);
        const int part = number % parts_of(width) * WIDE;
        Job found = {{y + head / y_share * y_h + part, y_n, column, columns}, {}, width - part};
        if (!tiles)
            found.own = {x + head / x_share * x_h + part, x_n, first, rows};
        return found;
    }

    __device__ __forceinline__ u32 tile_of(int job, u32 slot) const {
        if (!tiles)
            return slot + STEP_SIZE;
        const int number = head_of(job) / x_share * parts_of(width) + job % parts_of(width);
        return tiles + number * ROWS_SIZE;
    }
};

// Copies the block's own tokens to `at` and waits for them, if they are to stay. Returns what is
// free behind them.
DEVICE u32 keep(const Problem& p, Products& x, u32 at) {
    if (p.resident) {
        at += x.keep(at);
        commit_copies();
        wait_copies<0>();
    }
    if (ELEMENT == F32)
        x.x_bad = __syncthreads_or(x.any_kept_bad());
    else
        __syncthreads();
    return at;
}

// The warp's slots, and what is free behind those of all warps.
DEVICE Ring ring_at(const Problem& p, u32& at) {
    const int size = p.resident ? int(STEP_SIZE) : int(STEP_SIZE) + int(ROWS_SIZE);
    const u32 slots = at + warp_number() * 2 * size;
    at += WARPS * 2 * size;
    return {slots, size, 0};
}

// Does all products of the warp with the step that begins at `column`. The first job is on its way
// to the slot at hand; `next()` is what the warp is to do afterwards.
template<class Next>
DEVICE void multiply_all(const Products& x, int column, Ring& ring, Next next) {
    const int jobs = x.jobs();
    const int parts = parts_of(x.width);
    Sum c[SLICES][TILES][4];
    // once at least: what comes afterwards must be on its way
    _Pragma("unroll 1")
    for (int number = 0; number < max(jobs, 1); number++) {
        const Job later = number + 1 < jobs ? x.job(number + 1, column) : next();
        later.begin(ring.other());
        commit_copies();
        wait_copies<1>();
        if (jobs > 0) {
            const u32 rows = x.tile_of(number, ring.here());
            bool bad = false;
            if (ELEMENT == F32) {
                bad = x.x_bad | any_bad<STEP, WIDE, 32>(ring.here());
                if (!x.tiles)
                    bad |= any_bad<ROWS, WIDE, 32>(rows);
                bad = __any_sync(~0u, bad);
            }
            __syncwarp();
            if (number % parts == 0)
                clear(c);
            if (ELEMENT == F32 && bad)
                multiply_numbers<ROWS, STEP, WIDE>(c, rows, 0, ring.here(), 0);
            else
                multiply_transposed<ROWS, STEP, WIDE>(c, rows, 0, ring.here(), 0);
            if (number % parts == parts - 1)
                UNROLL
                for (int s = 0; s < SLICES; s++)
                    write_slice(x.strips + x.head_of(number) * STRIP, s, c[s]);
            __syncwarp();       // the next copy but one overwrites what was just read
        }
        ring.slot ^= 1;
    }
}

// ---- sums of a warp

// What a warp sums up: WIDE columns of rows of the block, over some heads.
struct Unit {
    const Stored* from;     // the first head's column
    i64 h, n;
    int width, tokens;      // columns that are there from that on; tokens
    u32 strips;             // of the first head
    int heads;              // 0: there is no such unit

    __device__ __forceinline__ Job job(int head, int column) const {
        if (head >= heads)
            return {};
        return {{from + head * h, n, column, tokens}, {}, width};
    }
};

typedef Sum Sums[SLICES][WIDE / 8][4];

// Adds a strip times the tokens of a tile. `bad`: these hold what is not finite; see nonfinite.cuh.
DEVICE void add_unit(Sums& sums, u32 strip, u32 tile, u32 words, bool bad) {
    if (bad) {
        add_bad<STEP, WIDE>(sums, tile, 0, STEP, words, true);
        __syncwarp();
        clean<STEP, WIDE, 32>(tile, 0, STEP);
        __syncwarp();
    }
    Weights<TILES> weights[SLICES];
    UNROLL
    for (int s = 0; s < SLICES; s++) {
        Sum c[TILES][4];
        read_slice(strip, s, c);
        hold(weights[s], c);
    }
    multiply_weights<STEP, WIDE>(sums, weights, tile, 0);
}

// The number of the warp's unit u, if blocks numbered by `chunk` share the units.
DEVICE int unit_number(int chunk, int u) {
    return (chunk * UNITS + u) * WARPS + warp_number();
}

// Adds to the sums of the warp's units strips times tokens from `column` on; as in multiply_all.
template<class UnitOf, class Next>
DEVICE void add_all(Sums (&sums)[UNITS], Ring& ring, UnitOf unit_of, int column, u32 words,
                    bool masked, Next next) {
    Unit unit = unit_of(0);
    int u = 0;
    int head = 0;
    bool more = true;
    _Pragma("unroll 1")
    while (more) {
        Unit following = unit;
        int then = head + 1;
        if (then >= unit.heads) {
            then = 0;
            following = unit_of(u + 1);
            if (u + 1 == UNITS)
                following.heads = 0;
        }
        more = following.heads > 0;
        const Job later = more ? following.job(then, column) : next();
        later.begin(ring.other());
        commit_copies();
        wait_copies<1>();
        if (unit.heads > 0) {
            const u32 tile = ring.here();
            const u32 strip = unit.strips + head * STRIP;
            bool bad = false;
            if (masked || ELEMENT == F32)
                bad = __any_sync(~0u, any_bad<STEP, WIDE, 32>(tile));
            __syncwarp();
            UNROLL
            for (int own = 0; own < UNITS; own++)
                if (own == u)
                    add_unit(sums[own], strip, tile, words, bad);
            __syncwarp();       // the next copy but one overwrites what was just read
        }
        u += then == 0;
        head = then;
        unit = following;
        ring.slot ^= 1;
    }
}

// ---- rows that several threads have a share of

enum { ROW_PARTS = TILES };

// Threads with pairs of one row: lanes that differ in these bits, and ROW_PARTS warps.
template<class Join> DEVICE void join_lanes(Join join) {
    if (OWN == 1) {
        join(1);
        join(4);
        join(8);
    } else {
        join(2);
        join(4);
    }
}

// Whether the thread is the one that speaks for its lanes, and which part of the row these have.
DEVICE bool speaks() {
    return own_column() % 8 == 0;
}

DEVICE int own_part() {
    return own_column() / 8;
}
