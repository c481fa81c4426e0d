// edges.cuh -- what the kernels of attention over listed keys share. edges.py has the same structs
// as NumPy dtypes.
//
// A warp does a row: a query, or a key where gradients of keys are summed. LANES lanes are a team,
// which reads a listed row 16 bytes a lane; the warp's teams take AT_ONCE entries of the row's list
// each, and all of what is listed there is asked for before any of it is looked at:
//
//     lanes 0-7      entries 0, 4,  8, 12        LANES 8, AT_ONCE 4: a step of 16 entries
//     lanes 8-15     entries 1, 5,  9, 13
//     lanes 16-23    entries 2, 6, 10, 14
//     lanes 24-31    entries 3, 7, 11, 15
//
// Each team sums on its own; in the end the warp adds the sums up, always in the same order. Rows
// with more than `most` entries are left to others: each piece of their lists has a warp, and what
// these find is put together by edges_join.cu.
#pragma once
#include "tile.cuh"

enum {
    WARPS = THREADS / 32,
    TEAMS = 32 / LANES,
    STEP = TEAMS * AT_ONCE,
    D_NUMBERS = D_CHUNKS * CHUNK,
    E_NUMBERS = E_CHUNKS * CHUNK
};

// Some of a row's entries.
struct Piece {
    int row;
    int member;                 // which of the lists the first one is in
    int skipped;                // those before it there
    int count;
};

// Rows with long lists, in pieces. A line is the lists that a warp walks for a row, its members.
struct Pieces {
    const Piece* pieces;
    const i64* start;           // (lines + 1,): offsets into `pieces`
    const i64* part_at;         // (batch, heads): where the sums of the first piece go
    int most;
    int slots;                  // pieces of a line, at most
};

// Heads that share a list, and their group's keys and values.
struct Run {
    int item, group, head, count, list;
};

struct Problem {
    Operand q, k, v;            // q.at = 0: the scores are the bias alone
    const i64* start;           // (lists, n + 1): offsets into `key`
    const int* key;
    const Run* runs;
    const Sum* bias;            // or 0; by item, head and edge
    i64 bias_b, bias_h;
    Pieces pieces;              // lines are lists
    Sum scale, softcap;         // softcap 0 for none
    int heads, n, d, e;
    int blocks;                 // of threads, for each run
};

// What a warp is to do.
struct Task {
    Piece of;                   // a piece, or the whole row
    int slot;                   // which piece of the line it is; -1: it is none
    i64 first;                  // entry of a query
};

// ---- rows

// Chunks of a row that a lane has; none needs an array, too.
template<int COUNT> struct Chunks {
    uint4 x[COUNT > 0 ? COUNT : 1];
};

template<int COUNT> struct Numbers {
    Sum x[COUNT > 0 ? COUNT : 1];
};

DEVICE int lane_of_team() {
    return threadIdx.x % LANES;
}

DEVICE int team_number() {
    return threadIdx.x % 32 / LANES;
}

// The first column of a lane's chunk.
DEVICE int column_of(int chunk) {
    return (chunk * LANES + lane_of_team()) * CHUNK;
}

template<int COUNT>
DEVICE void read_row(Chunks<COUNT>& chunks, const Stored* row, int width, bool there) {
    UNROLL
    for (int c = 0; c < COUNT; c++) {
        const uint4 none = {0, 0, 0, 0};
        chunks.x[c] = none;
        if (there && column_of(c) < width)
            chunks.x[c] = *(const uint4*)(row + column_of(c));
    }
}

DEVICE void unpack_chunk(Sum (&x)[CHUNK], const uint4& chunk) {
    const u32 words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    UNROLL
    for (int i = 0; i < 4; i++) {
#if ELEMENT <= BF16
        x[2 * i] = unpack(words[i] & 0xffff);
        x[2 * i + 1] = unpack(words[i] >> 16);
#elif ELEMENT == F32
        x[i] = __uint_as_float(words[i]);
#else
        if (i % 2 == 0)
            x[i / 2] = __longlong_as_double(i64(u64(words[i + 1]) << 32 | words[i]));
#endif
    }
}

template<int COUNT, int SIZE>
DEVICE void unpack_row(Numbers<SIZE>& x, const Chunks<COUNT>& chunks, Sum factor) {
    UNROLL
    for (int c = 0; c < COUNT; c++) {
        Sum own[CHUNK];
        unpack_chunk(own, chunks.x[c]);
        UNROLL
        for (int i = 0; i < CHUNK; i++)
            x.x[c * CHUNK + i] = own[i] * factor;
    }
}

template<int COUNT, int SIZE> DEVICE Sum dot(const Numbers<SIZE>& x, const Chunks<COUNT>& chunks) {
    Sum sum = 0;
    UNROLL
    for (int c = 0; c < COUNT; c++) {
        Sum own[CHUNK];
        unpack_chunk(own, chunks.x[c]);
        UNROLL
        for (int i = 0; i < CHUNK; i++)
            sum = times_plus(x.x[c * CHUNK + i], own[i], sum);
    }
    return sum;
}

template<int COUNT, int SIZE>
DEVICE void add_row(Numbers<SIZE>& x, Sum weight, const Chunks<COUNT>& chunks) {
    UNROLL
    for (int c = 0; c < COUNT; c++) {
        Sum own[CHUNK];
        unpack_chunk(own, chunks.x[c]);
        UNROLL
        for (int i = 0; i < CHUNK; i++)
            x.x[c * CHUNK + i] = times_plus(weight, own[i], x.x[c * CHUNK + i]);
    }
}

template<int SIZE> DEVICE void clear(Numbers<SIZE>& x) {
    UNROLL
    for (int i = 0; i < SIZE; i++)
        x.x[i] = 0;
}

// Writes what the first team has; rows have room for whole chunks.
template<int COUNT, int SIZE>
DEVICE void write_row(Stored* row, const Numbers<SIZE>& x, int width) {
    if (team_number() > 0)
        return;
    UNROLL
    for (int c = 0; c < COUNT; c++) {
        if (column_of(c) >= width)
            continue;
        const Sum* own = x.x + c * CHUNK;
#if ELEMENT <= BF16
        const uint4 chunk = {pack(own[0], own[1]), pack(own[2], own[3]), pack(own[4], own[5]),
                             pack(own[6], own[7])};
        *(uint4*)(row + column_of(c)) = chunk;
#elif ELEMENT == F32
        const float4 chunk = {own[0], own[1], own[2], own[3]};
        *(float4*)(row + column_of(c)) = chunk;
#else
        const double2 chunk = {own[0], own[1]};
        *(double2*)(row + column_of(c)) = chunk;
#endif
    }
}

// The same as sums, for edges_join.cu.
template<int COUNT, int SIZE> DEVICE void write_part(Sum* row, const Numbers<SIZE>& x, int width) {
    if (team_number() > 0)
        return;
    UNROLL
    for (int c = 0; c < COUNT; c++) {
        if (column_of(c) >= width)
            continue;
        UNROLL
        for (int i = 0; i < CHUNK; i++)
            row[column_of(c) + i] = x.x[c * CHUNK + i];
    }
}

// ---- sums of lanes and of teams

DEVICE Sum sum_of_team(Sum x) {
    UNROLL
    for (int apart = LANES / 2; apart > 0; apart /= 2)
        x += __shfl_xor_sync(~0u, x, apart);
    return x;
}

DEVICE Sum sum_of_teams(Sum x) {
    UNROLL
    for (int apart = LANES; apart < 32; apart *= 2)
        x += __shfl_xor_sync(~0u, x, apart);
    return x;
}

template<int SIZE> DEVICE void sum_teams(Numbers<SIZE>& x) {
    UNROLL
    for (int i = 0; i < SIZE; i++)
        x.x[i] = sum_of_teams(x.x[i]);
}

// ---- what there is to do

// The warp's number among those of a run, or of a group: `blocks` blocks do one.
DEVICE int task_number(int blocks) {
    return blockIdx.x % blocks * WARPS + threadIdx.x / 32;
}

// Whether warp `number` of a line has a piece, which are the first to be done.
DEVICE bool find_piece(const Pieces& pieces, int line, int number, Task& task) {
    const i64 at = pieces.start[line] + number;
    if (at >= pieces.start[line + 1])
        return false;
    task.of = pieces.pieces[at];
    task.slot = number;
    return true;
}

// A piece of the list of a query, or all of a list that is not cut.
DEVICE bool find_query(const Problem& p, int list, Task& task) {
    const int number = task_number(p.blocks);
    const i64* start = p.start + i64(list) * (p.n + 1);
    if (number < p.pieces.slots) {
        if (!find_piece(p.pieces, list, number, task))
            return false;
        task.first = start[task.of.row] + task.of.skipped;
        return true;
    }
    const int query = number - p.pieces.slots;
    if (query >= p.n)
        return false;
    task.first = start[query];
    task.of = {query, 0, 0, int(start[query + 1] - task.first)};
    task.slot = -1;
    return task.of.count <= p.pieces.most;
}

// ---- scores

// The AT_ONCE entries of a step that a team has, and the keys' rows.
struct Listed {
    int entry[AT_ONCE];         // counted from the task's first
    bool there[AT_ONCE];
    Chunks<D_CHUNKS> k[AT_ONCE];
    Chunks<E_CHUNKS> v[AT_ONCE];
#if BIAS
    Sum bias[HEADS][AT_ONCE];
#endif
};

DEVICE void read_listed(Listed& listed, const Problem& p, const Run& run, const Task& task,
                        int from) {
    const int* keys = p.key + task.first;
    const Stored* k = p.k.head(run.item, run.group);
    const Stored* v = p.v.head(run.item, run.group);
    i64 key[AT_ONCE];
    UNROLL
    for (int u = 0; u < AT_ONCE; u++) {
        listed.entry[u] = from + u * TEAMS + team_number();
        listed.there[u] = listed.entry[u] < task.of.count;
        key[u] = listed.there[u] ? keys[listed.entry[u]] : 0;
    }
    UNROLL
    for (int u = 0; u < AT_ONCE; u++) {
        read_row(listed.k[u], k + key[u] * p.k.n, p.d, listed.there[u]);
        read_row(listed.v[u], v + key[u] * p.v.n, p.e, listed.there[u]);
    }
#if BIAS
    const Sum* bias = p.bias + run.item * p.bias_b + run.head * p.bias_h + task.first;
    UNROLL
    for (int r = 0; r < HEADS; r++)
        UNROLL
        for (int u = 0; u < AT_ONCE; u++) {
            listed.bias[r][u] = 0;
            if (p.bias && listed.there[u] && r < run.count)
                listed.bias[r][u] = bias[r * p.bias_h + listed.entry[u]];
        }
#endif
}

// The score of entry `u` for head `r` of the run, of whose scaled product a lane has a share; its
// `slope` by that product; and whether it is `seen`: if not, nothing of it may be looked at.
DEVICE Sum score_of(const Problem& p, const Listed& listed, int r, int u, Sum product, Sum& slope,
                    bool& seen) {
    Sum score = D_CHUNKS > 0 ? sum_of_team(product) : Sum(0);
    slope = 1;
#if SOFTCAP
    if (p.softcap > 0) {
        const Sum bent = hyperbolic_tangent(score / p.softcap);
        slope = 1 - bent * bent;
        score = p.softcap * bent;
    }
#endif
#if BIAS
    score += listed.bias[r][u];
    seen = seen && listed.bias[r][u] != -INFINITE;
#endif
    return score;
}
