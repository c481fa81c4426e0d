// additive.cuh -- what the kernels of additive attention share: scores that are sums of tanhs.
//
//     score_ij = sum_f w_f tanh(a_if + c_jf)
//
// With x = exp(2 a) and y = exp(2 c), made once for each token (additive_prepare.cu),
//
//     tanh(a + c) = 1 - 2 / d,  d = 1 + x y
//     w / d + u / e - (w + u) / 2 = (w e + u d - (w + u) / 2 d e) / (d e)
//
// so a pair of tokens has no exponential of its own, and two features share a reciprocal: half of
// one and 3.5 other instructions for each tanh. That is half of what the hardware's own tanh would
// take, which has 11 bits. No product may overflow: features of which a tile holds something beyond
// +-WILD (additive_prepare.cu), inf and NaN are summed by tanh itself, and so is all fp64.
//
// Features come FEATURES at a time, as planes: a line of TILE tokens for each feature.
#pragma once
#include "nonfinite.cuh"
#include "online.cuh"
#include "walk.cuh"

enum {
    PREPARED = ELEMENT != F64,
    FEATURES = 32,
    PLANE = FEATURES * TILE,
    // numbers of a line in shared memory: lanes that read 16 bytes of lines side by side meet no
    // bank conflict
    LINE = TILE + 4,
    PLANE_SIZE = FEATURES * LINE * 4,
    // two planes at a time, and two that are on their way
    PLANES_SIZE = 4 * PLANE_SIZE,
    // of the features as they are, in place of planes: lanes read numbers of lines side by side
    NUMBERS_LINE = TILE + 1,
    NUMBERS_SIZE = FEATURES * NUMBERS_LINE * sizeof(Sum)
};

// Queries or keys: (batch, heads, tokens, features), and what was prepared of them.
struct Features {
    const Sum* at;
    i64 b, h, n;
    const float* powers;    // (batch, heads, tiles, chunks, FEATURES, TILE): exp(2 x)
    const float* rises;     // likewise: exp(2 x) - 1
    const u32* wild;        // (batch, heads, tiles, chunks): bit f: some |x| > WILD, or NaN
    const u32* large;       // likewise: some |x| > LARGE
    int heads, tiles;
};

struct Problem {
    Features q, k;
    Operand v;
    TileLists lists;        // lines of queries, or of keys for the kernel that owns keys
    const Sum* w;           // (heads, chunks * FEATURES), 0 beyond the features
    const int* q_lengths;   // (batch,)
    const int* kv_lengths;
    int batch, heads, groups, n, m, a, e;

    __device__ __forceinline__ int chunks() const {
        return (a + FEATURES - 1) / FEATURES;
    }
};

// A tile of tokens.
struct Tokens {
    const Features& x;
    const Sum* at;
    i64 chunk;              // the first of its chunks
    int there;              // how many tokens there are
};

DEVICE Tokens tokens_of(const Problem& p, const Features& x, int batch, int head, int tile,
                        int tokens) {
    return {x, x.at + batch * x.b + head * x.h + tile * TILE * x.n,
            ((i64(batch) * x.heads + head) * x.tiles + tile) * p.chunks(),
            min(tokens - tile * TILE, int(TILE))};
}

// Which features of a chunk are too large, in one of two tiles: for exponentials, or for small ones.
DEVICE u32 wild_of(const Tokens& rows, const Tokens& columns, int chunk) {
    if (!PREPARED)
        return ~0u;
    return rows.x.wild[rows.chunk + chunk] | columns.x.wild[columns.chunk + chunk];
}

DEVICE u32 large_of(const Tokens& rows, const Tokens& columns, int chunk) {
    return rows.x.large[rows.chunk + chunk] | columns.x.large[columns.chunk + chunk];
}

DEVICE void load_plane(u32 to, const float* from) {
    for (int i = threadIdx.x; i < PLANE / 4; i += THREADS)
        copy_async<16>(to + (i / (TILE / 4) * LINE + i % (TILE / 4) * 4) * 4, from + 4 * i, true);
}

// The planes of a chunk in shared memory.
DEVICE u32 planes_of(u32 planes, int chunk) {
    return planes + (PREPARED ? (chunk & 1) * 2 * PLANE_SIZE : 0);
}

// The features of a chunk as they are, of the rows and then of the columns.
DEVICE void load_numbers(u32 to, const Problem& p, const Tokens& rows, const Tokens& columns,
                         int chunk) {
    const int feature = chunk * FEATURES + lane_number();
    for (int token = threadIdx.x / 32; token < TILE; token += THREADS / 32) {
        const u32 at = to + (lane_number() * NUMBERS_LINE + token) * sizeof(Sum);
        const bool known = feature < p.a;
        store_shared(at, known && token < rows.there ? rows.at[token * rows.x.n + feature] : Sum(0));
        store_shared(at + NUMBERS_SIZE, known && token < columns.there
                     ? columns.at[token * columns.x.n + feature] : Sum(0));
    }
}

// One feature of a chunk by tanh itself. What is summed is -1/2 of a score.
DEVICE void add_by_tanh(Sum (&sums)[TILE / 8][4], Sum w, u32 numbers, int own, int feature) {
    const u32 line = numbers + feature * NUMBERS_LINE * sizeof(Sum);
    const Sum factor = Sum(-0.5) * w;
    Sum x[2];
    UNROLL
    for (int h = 0; h < 2; h++)
        x[h] = load_shared<Sum>(line + (own + 8 * h + row_of_lane()) * sizeof(Sum));
    UNROLL
    for (int i = 0; i < TILE / 8; i++)
        UNROLL
        for (int e = 0; e < 2; e++) {
            const Sum y = load_shared<Sum>(
                line + NUMBERS_SIZE + (8 * i + 2 * pair_of_lane() + e) * sizeof(Sum));
            UNROLL
            for (int h = 0; h < 2; h++) {
                Sum& sum = sums[i][2 * h + e];
                sum = times_plus(factor, hyperbolic_tangent(x[h] + y), sum);
            }
        }
}

#if ELEMENT != F64
// Two features by what was prepared; `planes` has that of the rows and then that of the columns. Sums
// of 1 / d alone would be larger than those of tanhs, and lose digits.
DEVICE void add_by_powers(float (&sums)[TILE / 8][4], float w, float u, u32 planes, int own,
                          int feature) {
    const float middle = -0.5f * (w + u);
    const u32 of_rows = planes + (feature * LINE + own + row_of_lane()) * 4;
    const u32 of_columns = planes + PLANE_SIZE + (feature * LINE + 2 * pair_of_lane()) * 4;
    float x[2][2];
    UNROLL
    for (int h = 0; h < 2; h++)
        UNROLL
        for (int f = 0; f < 2; f++)
            x[h][f] = load_shared<float>(of_rows + (f * LINE + 8 * h) * 4);
    UNROLL
    for (int i = 0; i < TILE / 8; i++) {
        const float2 y = load_shared<float2>(of_columns + 8 * i * 4);
        const float2 z = load_shared<float2>(of_columns + (LINE + 8 * i) * 4);
        UNROLL
        for (int h = 0; h < 2; h++)
            UNROLL
            for (int e = 0; e < 2; e++) {
                const float d = fmaf(x[h][0], e ? y.y : y.x, 1);
                const float c = fmaf(x[h][1], e ? z.y : z.x, 1);
                const float both = d * c;
                const float above = fmaf(u, d, fmaf(w, c, middle * both));
                float& sum = sums[i][2 * h + e];
                sum = fmaf(above, reciprocal_approx(both), sum);
            }
    }
}
#endif

// Scores of rows from `own` on of a tile with all of another's, as a warp's products have them.
// All of the block comes here; warps that are not `live` have nothing to find. What the block
// copied before has arrived afterwards.
DEVICE void find_scores(Sum (&scores)[TILE / 8][4], const Problem& p, const Sum* w,
                        const Tokens& rows, const Tokens& columns, int own, bool live, u32 planes) {
    UNROLL
    for (int i = 0; i < TILE / 8; i++)
        UNROLL
        for (int x = 0; x < 4; x++)
            scores[i][x] = 0;
    auto load = [&](int chunk) {
        const u32 to = planes_of(planes, chunk);
        load_plane(to, rows.x.powers + (rows.chunk + chunk) * PLANE);
        load_plane(to + PLANE_SIZE, columns.x.powers + (columns.chunk + chunk) * PLANE);
    };
    if (PREPARED)
        load(0);
    commit_copies();
    for (int chunk = 0; chunk < p.chunks(); chunk++) {
        if (PREPARED && chunk + 1 < p.chunks())
            load(chunk + 1);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        const u32 here = planes_of(planes, chunk);
        const u32 wild = wild_of(rows, columns, chunk);
        const Sum* own_w = w + chunk * FEATURES;
        const int count = live ? min(p.a - chunk * FEATURES, int(FEATURES)) : 0;
#if ELEMENT != F64
        _Pragma("unroll 1")
        for (int f = 0; f < count; f += 2) {
            if (wild >> f & 3)
                continue;
            const float2 pair = *(const float2*)(own_w + f);
            add_by_powers(scores, pair.x, pair.y, here, own, f);
        }
#endif
        if (wild) {
            __syncthreads();
            load_numbers(here, p, rows, columns, chunk);
            __syncthreads();
            _Pragma("unroll 1")
            for (int f = 0; f < count; f++)
                if (wild >> (f & ~1) & 3)
                    add_by_tanh(scores, own_w[f], here, own, f);
        }
        __syncthreads();            // the next load overwrites what was just read
    }
    UNROLL
    for (int i = 0; i < TILE / 8; i++)
        UNROLL
        for (int x = 0; x < 4; x++)
            scores[i][x] *= -2;
}
