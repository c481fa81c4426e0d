// CUDA C++ words, types and built-in functions that kernels use, for a C++ compiler.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = unsigned long long;  // as in CUDA, where uint64_t is another type
using i64 = long long;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct uint3 { u32 x, y, z; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) longlong2 { i64 x, y; };
struct alignas(16) ulonglong2 { u64 x, y; };
using dim3 = uint3;

static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline double2 make_double2(double x, double y) { return {x, y}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static inline longlong2 make_longlong2(i64 x, i64 y) { return {x, y}; }
static inline ulonglong2 make_ulonglong2(u64 x, u64 y) { return {x, y}; }

namespace emulator {

template <class To, class From>
static inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "one size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// What the hardware does with denormals where it approximates.
static inline float flushed(float x) {
    return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x;
}

}  // namespace emulator

static inline u32 __float_as_uint(float x) { return emulator::bits_as<u32>(x); }
static inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }
static inline float __uint_as_float(u32 x) { return emulator::bits_as<float>(x); }
static inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
static inline i64 __double_as_longlong(double x) { return emulator::bits_as<i64>(x); }
static inline double __longlong_as_double(i64 x) { return emulator::bits_as<double>(x); }

static inline int __popc(u32 x) { return __builtin_popcount(x); }
static inline int __popcll(u64 x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(i64 x) { return __builtin_ffsll(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
static inline int __clzll(i64 x) { return x == 0 ? 64 : __builtin_clzll(x); }
static inline u32 __umulhi(u32 x, u32 y) { return u32((u64(x) * y) >> 32); }
static inline u64 __umul64hi(u64 x, u64 y) { return u64(((unsigned __int128)x * y) >> 64); }

static inline u32 __brev(u32 x) {
    u32 reversed = 0;
    for (int bit = 0; bit < 32; bit++) {
        reversed |= ((x >> bit) & 1) << (31 - bit);
    }
    return reversed;
}

template <class T>
static inline T __ldg(const T* address) { return *address; }

static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
#define __expf expf  // the C library has functions of these names
#define __logf logf
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
static inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }

// Sums and products that the compiler may not fuse.
static inline float __fadd_rn(float x, float y) { volatile float sum = x + y; return sum; }
static inline float __fsub_rn(float x, float y) { volatile float difference = x - y; return difference; }
static inline float __fmul_rn(float x, float y) { volatile float product = x * y; return product; }
static inline double __dadd_rn(double x, double y) { volatile double sum = x + y; return sum; }
static inline double __dmul_rn(double x, double y) { volatile double product = x * y; return product; }

#define EMULATOR_MIN_MAX(TYPE) \
    static inline TYPE min(TYPE x, TYPE y) { return y < x ? y : x; } \
    static inline TYPE max(TYPE x, TYPE y) { return x < y ? y : x; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(u32)
EMULATOR_MIN_MAX(i64)
EMULATOR_MIN_MAX(u64)
#undef EMULATOR_MIN_MAX
static inline float min(float x, float y) { return fminf(x, y); }
static inline float max(float x, float y) { return fmaxf(x, y); }
static inline double min(double x, double y) { return fmin(x, y); }
static inline double max(double x, double y) { return fmax(x, y); }
