// What kernels ask of the hardware beyond plain C++, one PTX instruction each. Shared memory is
// addressed by 32-bit shared addresses through these functions and in no other way: so the same
// kernel text also runs on a CPU, where tests/emulator/primitives.cuh stands in for this file and
// sees every access.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static __device__ __forceinline__
#define UNROLL _Pragma("unroll")

#define FLOAT_INFINITY __int_as_float(0x7f800000)
#define FLOAT_NAN __int_as_float(0x7fffffff)
#define DOUBLE_INFINITY __longlong_as_double(0x7ff0000000000000ll)
#define DOUBLE_NAN __longlong_as_double(0x7fffffffffffffffll)

// ---- shared memory

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];

// The address of the block's dynamic shared memory, a multiple of 1024.
DEVICE u32 shared_base() {
    return (u32)__cvta_generic_to_shared(dynamic_shared_memory);
}

// T: 2, 4, 8 or 16 bytes, at a multiple of its size.
template <class T>
DEVICE T load_shared(u32 address) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "size");
    union {
        T value;
        u16 half;
        u32 word[sizeof(T) < 4 ? 1 : sizeof(T) / 4];
    } bits;
    if constexpr (sizeof(T) == 2) {
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits.half) : "r"(address) : "memory");
    } else if constexpr (sizeof(T) == 4) {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits.word[0]) : "r"(address) : "memory");
    } else if constexpr (sizeof(T) == 8) {
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                     : "=r"(bits.word[0]), "=r"(bits.word[1]) : "r"(address) : "memory");
    } else {
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(bits.word[0]), "=r"(bits.word[1]), "=r"(bits.word[2]),
                       "=r"(bits.word[3]) : "r"(address) : "memory");
    }
    return bits.value;
}

template <class T>
DEVICE void store_shared(u32 address, T value) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "size");
    union {
        T value;
        u16 half;
        u32 word[sizeof(T) < 4 ? 1 : sizeof(T) / 4];
    } bits;
    bits.value = value;
    if constexpr (sizeof(T) == 2) {
        asm volatile("st.shared.u16 [%0], %1;" :: "r"(address), "h"(bits.half) : "memory");
    } else if constexpr (sizeof(T) == 4) {
        asm volatile("st.shared.u32 [%0], %1;" :: "r"(address), "r"(bits.word[0]) : "memory");
    } else if constexpr (sizeof(T) == 8) {
        asm volatile("st.shared.v2.u32 [%0], {%1, %2};"
                     :: "r"(address), "r"(bits.word[0]), "r"(bits.word[1]) : "memory");
    } else {
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                     :: "r"(address), "r"(bits.word[0]), "r"(bits.word[1]), "r"(bits.word[2]),
                        "r"(bits.word[3]) : "memory");
    }
}

// ---- copies from global to shared memory that run beside the thread

// BYTES: 4, 8 or 16, both addresses multiples of it. Where not valid, zeros; `from` is not read.
template <int BYTES>
DEVICE void copy_async(u32 to, const void* from, bool valid) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "size");
    const int bytes = valid ? BYTES : 0;
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :: "r"(to), "l"(from), "r"(bytes) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(to), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
    }
}

// Close a group of this thread's copies.
DEVICE void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most N of this thread's newest groups are under way. Other threads see what came
// after a barrier only.
template <int N>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

// ---- matrix fragments of a warp

// Four 8x8 matrices of 16-bit elements. Lane i names row i % 8 of matrix i / 8, 16 bytes.
// Afterwards lane i holds of each matrix row i / 4, columns i % 4 * 2 and the next.
DEVICE void load_matrix_x4(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

// The same of the matrices' transposes.
DEVICE void load_matrix_x4_transposed(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

// c (16 x 8) += a (16 x 16) b (16 x 8). With group = lane / 4 and pair = lane % 4 * 2, a lane holds
// c: rows group, group, group + 8, group + 8; columns pair, pair + 1, pair, pair + 1
// a: pairs of row group, group + 8, group, group + 8 at columns pair, pair, pair + 8, pair + 8
// b0, b1: pairs of column group at rows pair, pair + 8
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (16 x 8) += a (16 x 8) b (8 x 8), of floats whose low 13 bits are not looked at. c as above;
// a: rows group, group + 8, group, group + 8 at columns lane % 4, the same, and 4 further twice
// b0, b1: column group at rows lane % 4 and 4 further
DEVICE void mma_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c (8 x 8) += a (8 x 4) b (4 x 8). c: row group, columns pair and pair + 1;
// a: row group, column lane % 4; b: row lane % 4, column group
DEVICE void mma_f64(double (&c)[2], double a, double b) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(c[0]), "+d"(c[1]) : "d"(a), "d"(b));
}

// ---- element formats, rounded to nearest

DEVICE u32 pack_f16(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

DEVICE u32 pack_bf16(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Of the low 16 bits.
DEVICE float unpack_f16(u32 low16) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)low16));
    return value;
}

DEVICE float unpack_bf16(u32 low16) {
    return __uint_as_float(low16 << 16);
}

// The nearest float with 10 bits of mantissa, ties away from zero, as mma_tf32 takes it.
DEVICE u32 round_tf32(float value) {
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

// ---- approximations: two units in the last place or better, denormals are zero

DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- barriers of some warps; id 1 to 15 (0 is that of __syncthreads), threads in whole warps

// Wait until `threads` threads have come, those that only arrive among them.
DEVICE void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

DEVICE void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
