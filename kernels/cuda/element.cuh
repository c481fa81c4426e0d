// element.cuh -- the dtype of q, k and v, as the products of a warp take it.
//
// A product adds A (16 x DEPTH) times B (DEPTH x 8) to sums C (16 x 8). Whatever the dtype, a thread
// holds of C the columns 2 t and 2 t + 1 of the rows r and r + 8, with r = lane / 4, t = lane % 4:
//
//     c[0], c[1]: row r        c[2], c[3]: row r + 8
//
// So sums can become the next product's A without leaving the registers. That product runs over
// keys in the order in which the threads hold them, hence B by `load_rows_as_b` has its rows so, too.
//
//     F16, BF16   DEPTH 16, one mma, fp32 sums
//     F32         DEPTH 16, every number split into three of bf16: eight mma, fp32 sums; where HALF is
//                 set, for tiles of what was fp16, into two of them: three mma
//     F64         DEPTH 8, as four products of 8 x 8 x 4
#pragma once
#include "primitives.cuh"

#define F16 0
#define BF16 1
#define F32 2
#define F64 3

#ifndef HALF
#define HALF 0
#endif

// Whether fp32 products are summed apart before they join long sums: the hardware cuts sums off
// instead of rounding them, always to the same side, which shows after hundreds of steps.
#ifndef LONG_SUMS
#define LONG_SUMS 0
#endif

#if ELEMENT == F64
typedef double Stored;
typedef double Sum;
#elif ELEMENT == F32
typedef float Stored;
typedef float Sum;
#else
typedef u16 Stored;
typedef float Sum;
#endif

enum { BYTES = sizeof(Stored), DEPTH = ELEMENT == F64 ? 8 : 16 };

// Columns of a tile row that lie in one 128-byte panel, and numbers in a 16-byte chunk.
enum { PANEL = 128 / BYTES, CHUNK = 16 / BYTES };

// Shared memory of a tile: panels of 128 bytes, one after the other, each with all rows. The chunks
// of a row are permuted by the row's number, so that loads of a fragment meet no bank conflict.
DEVICE u32 chunk_of(int row, int chunk) {
#if ELEMENT >= F32
    // half a warp reads pairs of numbers from rows 0 to 3, or numbers from rows 0, 2, 4, 6
    const int high = row >> 2 & 1;
    return chunk ^ (((row & 3) ^ high) << 1 | high);
#else
    return chunk ^ (row & 7);
#endif
}

template<int ROWS> DEVICE u32 place(u32 tile, int row, int column) {
    const int panel = column / PANEL;
    const int chunk = column % PANEL / CHUNK;
    return tile + (panel * ROWS + row) * 128 + chunk_of(row, chunk) * 16 + column % CHUNK * BYTES;
}

// The place `column` further along the row of `from`, if their chunks have no bit in common: then
// the way there is one XOR, and whole panels are constants.
template<int ROWS> DEVICE u32 moved(u32 from, int column) {
    return (from ^ column % PANEL / CHUNK * 16) + column / PANEL * ROWS * 128;
}

template<int ROWS, int WIDTH> struct TileSize {
    enum { PANELS = (WIDTH + PANEL - 1) / PANEL, SIZE = PANELS * ROWS * 128 };
};

DEVICE int lane_number() {
    return threadIdx.x & 31;
}

DEVICE int row_of_lane() {
    return lane_number() >> 2;
}

DEVICE int pair_of_lane() {
    return lane_number() & 3;
}

#if ELEMENT >= F32

// Sums (16 x 8 TILES) on their way to become A.
template<int TILES> struct Weights {
    Sum x[TILES][4];
};

template<int TILES> DEVICE void hold(Weights<TILES>& w, const Sum (&c)[TILES][4]) {
    UNROLL
    for (int i = 0; i < TILES; i++)
        UNROLL
        for (int x = 0; x < 4; x++)
            w.x[i][x] = c[i][x];
}

struct RowsOfB {
    u32 at[2];
};

template<int ROWS> DEVICE RowsOfB rows_of_b(u32 tile, int row) {
    return {{place<ROWS>(tile, row + 2 * pair_of_lane(), row_of_lane()),
             place<ROWS>(tile, row + 2 * pair_of_lane() + 1, row_of_lane())}};
}

#endif

#if ELEMENT <= BF16

struct A {
    u32 x[4];
};

struct B {
    u32 x[2];
};

#if ELEMENT == F16
DEVICE u32 pack(float low, float high) {
    return pack_f16(low, high);
}

DEVICE float unpack(u32 bits) {
    return unpack_f16(bits);
}

DEVICE void multiply(float (&c)[4], const A& a, const B& b) {
    mma_f16(c, a.x, b.x[0], b.x[1]);
}
#else
DEVICE u32 pack(float low, float high) {
    return pack_bf16(low, high);
}

DEVICE float unpack(u32 bits) {
    return unpack_bf16(bits);
}

DEVICE void multiply(float (&c)[4], const A& a, const B& b) {
    mma_bf16(c, a.x, b.x[0], b.x[1]);
}
#endif

// A from 16 rows of a tile; `from` is the place in the first of them, moved by the steps before.
template<int ROWS> DEVICE u32 place_of_a(u32 tile, int row) {
    const int lane = lane_number();
    return place<ROWS>(tile, row + (lane & 15), (lane >> 4) * 8);
}

DEVICE void load_a(A& a, u32 from) {
    load_matrix_x4(a.x, from);
}

// Two of B from 16 rows of a tile, which are their columns.
template<int ROWS> DEVICE u32 place_of_columns(u32 tile, int row) {
    const int lane = lane_number();
    return place<ROWS>(tile, row + (lane & 7) + (lane >> 4) * 8, (lane >> 3 & 1) * 8);
}

DEVICE void load_rows_as_columns(B (&b)[2], u32 from) {
    u32 x[4];
    load_matrix_x4(x, from);
    b[0].x[0] = x[0];
    b[0].x[1] = x[1];
    b[1].x[0] = x[2];
    b[1].x[1] = x[3];
}

// Two of B from DEPTH rows of a tile and 16 columns.
struct RowsOfB {
    u32 at;
};

template<int ROWS> DEVICE RowsOfB rows_of_b(u32 tile, int row) {
    const int lane = lane_number();
    return {place<ROWS>(tile, row + (lane & 15), (lane >> 4) * 8)};
}

template<int ROWS> DEVICE void load_rows_as_b(B (&b)[2], const RowsOfB& from, int row, int column) {
    u32 x[4];
    load_matrix_x4_transposed(x, moved<ROWS>(from.at, column) + row * 128);
    b[0].x[0] = x[0];
    b[0].x[1] = x[1];
    b[1].x[0] = x[2];
    b[1].x[1] = x[3];
}

// Here they are rounded at once, which halves their registers.
template<int TILES> struct Weights {
    u32 x[TILES][2];
};

template<int TILES> DEVICE void hold(Weights<TILES>& w, const float (&c)[TILES][4]) {
    UNROLL
    for (int i = 0; i < TILES; i++) {
        w.x[i][0] = pack(c[i][0], c[i][1]);
        w.x[i][1] = pack(c[i][2], c[i][3]);
    }
}

// A from columns `step` * DEPTH on.
template<int TILES> DEVICE void as_a(A& a, const Weights<TILES>& w, int step) {
    a.x[0] = w.x[2 * step][0];
    a.x[1] = w.x[2 * step][1];
    a.x[2] = w.x[2 * step + 1][0];
    a.x[3] = w.x[2 * step + 1][1];
}

DEVICE float number(Stored x) {
    return unpack(x);
}

#elif ELEMENT == F32

struct A {
    u32 x[3][4];
};

struct B {
    u32 x[3][2];
};

DEVICE float cut(float x) {
    return __uint_as_float(__float_as_uint(x) & 0xffff0000u);
}

DEVICE u32 high_halves(float low, float high) {
    return (__float_as_uint(high) & 0xffff0000u) | __float_as_uint(low) >> 16;
}

// The bits of two numbers, cut into three bfloat16 each: 24 bits are three times 8, so nothing is
// lost. What is not finite must not come here: inf * 0 is NaN.
DEVICE void split(u32& a, u32& b, u32& c, float low, float high) {
    a = high_halves(low, high);
    low -= cut(low);
    high -= cut(high);
    b = high_halves(low, high);
    low -= cut(low);
    high -= cut(high);
    c = high_halves(low, high);
}

DEVICE void multiply(float (&c)[4], const A& a, const B& b) {
#if LONG_SUMS
    float sums[4] = {0, 0, 0, 0};
#else
    float (&sums)[4] = c;
#endif
    // all but the product of the smallest parts, which is 2^-32 of the whole; the small ones first
    UNROLL
    for (int order = HALF ? 1 : 3; order >= 0; order--)
        UNROLL
        for (int i = 0; i < 3; i++)
            if (order - i >= 0 && order - i < 3)
                mma_bf16(sums, a.x[i], b.x[order - i][0], b.x[order - i][1]);
#if LONG_SUMS
    UNROLL
    for (int x = 0; x < 4; x++)
        c[x] += sums[x];
#endif
}

template<int ROWS> DEVICE u32 place_of_a(u32 tile, int row) {
    return place<ROWS>(tile, row + row_of_lane(), 2 * pair_of_lane());
}

DEVICE void load_a(A& a, u32 from) {
    UNROLL
    for (int i = 0; i < 4; i++) {
        const float2 x = load_shared<float2>((from ^ (i >> 1) * 32) + (i & 1) * 1024);
        split(a.x[0][i], a.x[1][i], a.x[2][i], x.x, x.y);
    }
}

template<int ROWS> DEVICE u32 place_of_columns(u32 tile, int row) {
    return place_of_a<ROWS>(tile, row);
}

DEVICE void load_rows_as_columns(B (&b)[2], u32 from) {
    UNROLL
    for (int i = 0; i < 4; i++) {
        B& own = b[i >> 1];
        const float2 x = load_shared<float2>((from ^ (i & 1) * 32) + (i >> 1) * 1024);
        split(own.x[0][i & 1], own.x[1][i & 1], own.x[2][i & 1], x.x, x.y);
    }
}

template<int ROWS> DEVICE void load_rows_as_b(B (&b)[2], const RowsOfB& from, int row, int column) {
    UNROLL
    for (int i = 0; i < 4; i++) {
        B& own = b[i >> 1];
        float x[2];
        UNROLL
        for (int e = 0; e < 2; e++)
            x[e] = load_shared<float>((moved<ROWS>(from.at[e], column) ^ (i >> 1) * 32)
                                      + (row + (i & 1) * 8) * 128);
        split(own.x[0][i & 1], own.x[1][i & 1], own.x[2][i & 1], x[0], x[1]);
    }
}

template<int TILES> DEVICE void as_a(A& a, const Weights<TILES>& w, int step) {
    UNROLL
    for (int i = 0; i < 4; i++) {
        const float (&c)[4] = w.x[2 * step + (i >> 1)];
        split(a.x[0][i], a.x[1][i], a.x[2][i], c[(i & 1) * 2], c[(i & 1) * 2 + 1]);
    }
}

DEVICE float number(Stored x) {
    return x;
}

#else

struct A {
    double x[2][2];     // depth 0-3 and 4-7; rows r and r + 8
};

struct B {
    double x[2];
};

DEVICE void multiply(double (&c)[4], const A& a, const B& b) {
    UNROLL
    for (int half = 0; half < 2; half++) {
        double sums[2] = {c[2 * half], c[2 * half + 1]};
        mma_f64(sums, a.x[0][half], b.x[0]);
        mma_f64(sums, a.x[1][half], b.x[1]);
        c[2 * half] = sums[0];
        c[2 * half + 1] = sums[1];
    }
}

template<int ROWS> DEVICE u32 place_of_a(u32 tile, int row) {
    return place<ROWS>(tile, row + row_of_lane(), pair_of_lane());
}

template<int ROWS> DEVICE u32 place_of_columns(u32 tile, int row) {
    return place_of_a<ROWS>(tile, row);
}

DEVICE void load_a(A& a, u32 from) {
    UNROLL
    for (int i = 0; i < 4; i++)
        a.x[i >> 1][i & 1] = load_shared<double>((from ^ (i >> 1) * 32) + (i & 1) * 1024);
}

DEVICE void load_rows_as_columns(B (&b)[2], u32 from) {
    UNROLL
    for (int i = 0; i < 4; i++)
        b[i >> 1].x[i & 1] = load_shared<double>((from ^ (i & 1) * 32) + (i >> 1) * 1024);
}

template<int ROWS> DEVICE void load_rows_as_b(B (&b)[2], const RowsOfB& from, int row, int column) {
    UNROLL
    for (int i = 0; i < 4; i++)
        b[i >> 1].x[i & 1] = load_shared<double>(
            (moved<ROWS>(from.at[i & 1], column) ^ (i >> 1) * 64) + row * 128);
}

template<int TILES> DEVICE void as_a(A& a, const Weights<TILES>& w, int step) {
    a.x[0][0] = w.x[step][0];
    a.x[0][1] = w.x[step][2];
    a.x[1][0] = w.x[step][1];
    a.x[1][1] = w.x[step][3];
}

DEVICE double number(Stored x) {
    return x;
}

#endif

// Not 0 if a number in the given 32 bits is not finite: an exponent of all ones carries. Of a
// double these are the high ones.
DEVICE u32 carried(u32 bits) {
#if ELEMENT == F64
    return ((bits & 0x7ff00000u) + 0x00100000u) & 0x80000000u;
#elif ELEMENT == F32
    return ((bits & 0x7f800000u) + 0x00800000u) & 0x80000000u;
#elif ELEMENT == F16
    return ((bits & 0x7c007c00u) + 0x04000400u) & 0x80008000u;
#else
    return ((bits & 0x7f807f80u) + 0x00800080u) & 0x80008000u;
#endif
}

#if ELEMENT == F64
#define INFINITE DOUBLE_INFINITY
#define NOT_A_NUMBER DOUBLE_NAN
#else
#define INFINITE FLOAT_INFINITY
#define NOT_A_NUMBER FLOAT_NAN
#endif

// What makes an exponent one of 2, the base that the hardware has; fp64 takes e, and rounds nothing.
#if ELEMENT == F64
#define TO_BASE 1.0
#else
#define TO_BASE 1.44269504f
#endif

DEVICE Sum power(Sum x) {
#if ELEMENT == F64
    return exp(x);
#elif ELEMENT == F32
    return exp2f(x);
#else
    return exp2_approx(x);
#endif
}

DEVICE Sum natural_power(Sum x) {
#if ELEMENT == F64
    return exp(x);
#else
    return expf(x);
#endif
}

DEVICE Sum natural_logarithm(Sum x) {
#if ELEMENT == F64
    return log(x);
#else
    return logf(x);
#endif
}

DEVICE Sum larger(Sum x, Sum y) {
#if ELEMENT == F64
    return fmax(x, y);
#else
    return fmaxf(x, y);
#endif
}

DEVICE Sum times_plus(Sum x, Sum y, Sum z) {
#if ELEMENT == F64
    return fma(x, y, z);
#else
    return fmaf(x, y, z);
#endif
}

DEVICE Sum hyperbolic_tangent(Sum x) {
#if ELEMENT == F64
    return tanh(x);
#else
    return tanhf(x);
#endif
}
