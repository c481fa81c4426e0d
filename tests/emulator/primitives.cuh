// The host version of kernels/cuda/primitives.cuh: the same functions, executed and judged by the
// emulator. What each one does is said there.
#pragma once

#include "emulator.hpp"
#include "formats.hpp"

#define DEVICE static inline
#define UNROLL

#define FLOAT_INFINITY __int_as_float(0x7f800000)
#define FLOAT_NAN __int_as_float(0x7fffffff)
#define DOUBLE_INFINITY __longlong_as_double(0x7ff0000000000000ll)
#define DOUBLE_NAN __longlong_as_double(0x7fffffffffffffffll)

// ---- shared memory

DEVICE u32 shared_base() {
    return emulator::SHARED_BASE;
}

template <class T>
DEVICE T load_shared(u32 address, EMULATOR_SITE) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "size");
    emulator::access_shared(address, sizeof(T), emulator::Access::READ, site);
    T value;
    memcpy(&value, emulator::shared_bytes_at(address), sizeof value);
    return value;
}

template <class T>
DEVICE void store_shared(u32 address, T value, EMULATOR_SITE) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "size");
    emulator::access_shared(address, sizeof(T), emulator::Access::WRITE, site);
    memcpy(emulator::shared_bytes_at(address), &value, sizeof value);
}

// ---- copies from global to shared memory that run beside the thread

template <int BYTES>
DEVICE void copy_async(u32 to, const void* from, bool valid, EMULATOR_SITE) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "size");
    emulator::start_copy(to, from, BYTES, valid, site);
}

DEVICE void commit_copies() {
    emulator::close_copy_group();
}

template <int N>
DEVICE void wait_copies() {
    emulator::land_copies(N);
}

// ---- barriers

DEVICE void emulate_syncthreads(EMULATOR_SITE) {
    emulator::synchronise_block(false, "__syncthreads", site);
}

DEVICE int emulate_syncthreads_or(int vote, EMULATOR_SITE) {
    return emulator::synchronise_block(vote != 0, "__syncthreads_or", site);
}

#define __syncthreads emulate_syncthreads
#define __syncthreads_or emulate_syncthreads_or

DEVICE void barrier_sync(int id, int threads, EMULATOR_SITE) {
    emulator::come_to_named_barrier(id, threads, true, site);
}

DEVICE void barrier_arrive(int id, int threads, EMULATOR_SITE) {
    emulator::come_to_named_barrier(id, threads, false, site);
}

// ---- warps

DEVICE void emulate_syncwarp(u32 mask = 0xffffffffu, EMULATOR_SITE) {
    emulator::synchronise_warp(mask, site);
}

#define __syncwarp emulate_syncwarp

namespace emulator {

template <class T>
static inline T exchange_as(u32 mask, T value, int source, const char* what, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "size");
    u64 bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = exchange(mask, bits, source, what, site);
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulator

template <class T>
DEVICE T __shfl_sync(u32 mask, T value, int source, EMULATOR_SITE) {
    return emulator::exchange_as(mask, value, source & 31, "__shfl_sync", site);
}

template <class T>
DEVICE T __shfl_xor_sync(u32 mask, T value, int lanes, EMULATOR_SITE) {
    const int source = (emulator::current->lane ^ lanes) & 31;
    return emulator::exchange_as(mask, value, source, "__shfl_xor_sync", site);
}

template <class T>
DEVICE T __shfl_down_sync(u32 mask, T value, int by, EMULATOR_SITE) {
    const int lane = emulator::current->lane;
    const int source = lane + by < 32 ? lane + by : lane;
    return emulator::exchange_as(mask, value, source, "__shfl_down_sync", site);
}

template <class T>
DEVICE T __shfl_up_sync(u32 mask, T value, int by, EMULATOR_SITE) {
    const int lane = emulator::current->lane;
    const int source = lane >= by ? lane - by : lane;
    return emulator::exchange_as(mask, value, source, "__shfl_up_sync", site);
}

DEVICE u32 __ballot_sync(u32 mask, int vote, EMULATOR_SITE) {
    return emulator::ballot(mask, vote != 0, "__ballot_sync", site);
}

DEVICE int __any_sync(u32 mask, int vote, EMULATOR_SITE) {
    return emulator::ballot(mask, vote != 0, "__any_sync", site) != 0;
}

DEVICE int __all_sync(u32 mask, int vote, EMULATOR_SITE) {
    return emulator::ballot(mask, vote != 0, "__all_sync", site) == 0xffffffffu;
}

// ---- element formats

DEVICE u32 pack_f16(float low, float high) {
    return emulator::f16_of_float(low) | u32(emulator::f16_of_float(high)) << 16;
}

DEVICE u32 pack_bf16(float low, float high) {
    return emulator::bf16_of_float(low) | u32(emulator::bf16_of_float(high)) << 16;
}

DEVICE float unpack_f16(u32 low16) {
    return emulator::float_of_f16(u16(low16));
}

DEVICE float unpack_bf16(u32 low16) {
    return emulator::float_of_bf16(u16(low16));
}

DEVICE u32 round_tf32(float value) {
    return emulator::tf32_of_float(value);
}

// ---- approximations: the exact ones, but denormals are zero

DEVICE float exp2_approx(float x) {
    return emulator::flushed(exp2f(emulator::flushed(x)));
}

DEVICE float log2_approx(float x) {
    return log2f(emulator::flushed(x));
}

DEVICE float reciprocal_approx(float x) {
    return emulator::flushed(1.0f / emulator::flushed(x));
}

// ---- matrix fragments of a warp

DEVICE void load_matrix_x4(u32 (&r)[4], u32 row, EMULATOR_SITE) {
    emulator::load_matrices(r, row, false, site);
}

DEVICE void load_matrix_x4_transposed(u32 (&r)[4], u32 row, EMULATOR_SITE) {
    emulator::load_matrices(r, row, true, site);
}

DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, EMULATOR_SITE) {
    emulator::multiply_f16(c, a, b0, b1, site);
}

DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, EMULATOR_SITE) {
    emulator::multiply_bf16(c, a, b0, b1, site);
}

DEVICE void mma_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, EMULATOR_SITE) {
    emulator::multiply_tf32(c, a, b0, b1, site);
}

DEVICE void mma_f64(double (&c)[2], double a, double b, EMULATOR_SITE) {
    emulator::multiply_f64(c, a, b, site);
}
