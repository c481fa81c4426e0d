// The host version of kernels/cuda/primitives.cuh: the same functions, executed and judged by the
// emulator. What each one does is said there.
#pragma once

#include "emulator.hpp"

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

namespace emulator {

template <class Together>
static inline void meet_warp(const char* what, Site site, Together together) {
    meet(current->warp->meeting, WARP, what, site, together);
}

static inline void want_whole_warp(u32 mask, const char* what, Site site) {
    if (mask != 0xffffffffu) {
        fail_here(std::string(what) + " of some lanes only: not emulated", site);
    }
}

// Each lane gets what lane `source` brings.
template <class T>
static inline T exchange(u32 mask, T value, int source, const char* what, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "size");
    want_whole_warp(mask, what, site);
    Warp& warp = *current->warp;
    memcpy(&warp.lane_values[current->lane], &value, sizeof value);
    meet_warp(what, site, [&] { memcpy(warp.shuffled, warp.lane_values, sizeof warp.shuffled); });
    T received;
    memcpy(&received, &warp.shuffled[source], sizeof received);
    return received;
}

static inline u32 ballot(u32 mask, bool vote, const char* what, Site site) {
    want_whole_warp(mask, what, site);
    Warp& warp = *current->warp;
    warp.lane_values[current->lane] = vote;
    meet_warp(what, site, [&] {
        u32 votes = 0;
        for (int lane = 0; lane < WARP; lane++) {
            votes |= u32(warp.lane_values[lane]) << lane;
        }
        warp.shuffled[0] = votes;
    });
    return u32(warp.shuffled[0]);
}

}  // namespace emulator

template <class T>
DEVICE T __shfl_sync(u32 mask, T value, int source, EMULATOR_SITE) {
    return emulator::exchange(mask, value, source & 31, "__shfl_sync", site);
}

template <class T>
DEVICE T __shfl_xor_sync(u32 mask, T value, int lanes, EMULATOR_SITE) {
    const int source = (emulator::current->lane ^ lanes) & 31;
    return emulator::exchange(mask, value, source, "__shfl_xor_sync", site);
}

template <class T>
DEVICE T __shfl_down_sync(u32 mask, T value, int by, EMULATOR_SITE) {
    const int lane = emulator::current->lane;
    return emulator::exchange(mask, value, lane + by < 32 ? lane + by : lane,
                              "__shfl_down_sync", site);
}

template <class T>
DEVICE T __shfl_up_sync(u32 mask, T value, int by, EMULATOR_SITE) {
    const int lane = emulator::current->lane;
    return emulator::exchange(mask, value, lane >= by ? lane - by : lane, "__shfl_up_sync", site);
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

DEVICE void emulate_syncwarp(EMULATOR_SITE) {
    emulator::Meeting& meeting = emulator::current->warp->meeting;
    emulator::meet_warp("__syncwarp", site, [&] {
        emulator::note_progress();
        emulator::join_members(meeting, emulator::WARP);
    });
}

#define __syncwarp emulate_syncwarp

// ---- element formats

namespace emulator {

static inline float float_of_bf16(u16 bits) {
    return bits_as<float>(u32(bits) << 16);
}

static inline u16 bf16_of_float(float value) {
    const u32 bits = bits_as<u32>(value);
    if (value != value) {
        return 0x7fff;
    }
    return u16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float float_of_f16(u16 bits) {
    return float(bits_as<_Float16>(bits));
}

static inline u16 f16_of_float(float value) {
    return value != value ? 0x7fff : bits_as<u16>(_Float16(value));
}

}  // namespace emulator

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
    const u32 bits = __float_as_uint(value);
    if (value != value) {
        return 0x7fffffff;
    }
    return isinf(value) ? bits : (bits + 0x1000) & 0xffffe000;
}

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

namespace emulator {

// Turns that the eight rows of one matrix take beyond the first: two rows in the same 16 bytes of
// all 32 banks cannot be read at once.
static inline int extra_turns(const u32* rows) {
    int most = 1;
    for (int i = 0; i < 8; i++) {
        int turns = 1;
        for (int j = 0; j < i; j++) {
            turns += rows[j] / 16 % 8 == rows[i] / 16 % 8 && rows[j] != rows[i];
        }
        most = turns > most ? turns : most;
    }
    return most - 1;
}

static __attribute__((noinline)) void read_matrices(Warp& warp, bool transposed) {
    statistics.matrix_loads++;
    for (int matrix = 0; matrix < 4; matrix++) {
        const u32* rows = warp.rows + matrix * 8;
        statistics.matrix_conflicts += extra_turns(rows);
        u16 elements[8][8];
        for (int row = 0; row < 8; row++) {
            memcpy(elements[row], shared_bytes_at(rows[row]), 16);
        }
        for (int lane = 0; lane < WARP; lane++) {
            const int group = lane / 4;
            const int pair = lane % 4 * 2;
            const u16 low = transposed ? elements[pair][group] : elements[group][pair];
            const u16 high = transposed ? elements[pair + 1][group] : elements[group][pair + 1];
            warp.fragments[lane][matrix] = low | u32(high) << 16;
        }
    }
}

static inline void load_matrices(u32 (&r)[4], u32 row, bool transposed, const char* what,
                                 Site site) {
    statistics.accesses++;
    check_place(row, 16, site);
    note_shared(row, 16, Access::READ, current->index, site);
    Warp& warp = *current->warp;
    warp.rows[current->lane] = row;
    meet_warp(what, site, [&] { read_matrices(warp, transposed); });
    memcpy(r, warp.fragments[current->lane], sizeof r);
}

template <int DEPTH>
static __attribute__((noinline)) void multiply(Warp& warp) {
    statistics.mma++;
    for (int row = 0; row < 16; row++) {
        Float8 sum = {};
        for (int k = 0; k < DEPTH; k++) {
            sum += warp.left[row][k] * warp.right[k];
        }
        warp.product[row] = sum;
    }
}

static inline void add_product(float (&c)[4]) {
    const Warp& warp = *current->warp;
    const int group = current->lane / 4;
    const int pair = current->lane % 4 * 2;
    c[0] += warp.product[group][pair];
    c[1] += warp.product[group][pair + 1];
    c[2] += warp.product[group + 8][pair];
    c[3] += warp.product[group + 8][pair + 1];
}

template <float (*FLOAT_OF)(u16)>
static inline void mma_16_bits(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, const char* what,
                               Site site) {
    Warp& warp = *current->warp;
    const int group = current->lane / 4;
    const int pair = current->lane % 4 * 2;
    for (int half = 0; half < 2; half++) {
        const int shift = 16 * half;
        warp.left[group][pair + half] = FLOAT_OF(u16(a[0] >> shift));
        warp.left[group + 8][pair + half] = FLOAT_OF(u16(a[1] >> shift));
        warp.left[group][pair + 8 + half] = FLOAT_OF(u16(a[2] >> shift));
        warp.left[group + 8][pair + 8 + half] = FLOAT_OF(u16(a[3] >> shift));
        warp.right[pair + half][group] = FLOAT_OF(u16(b0 >> shift));
        warp.right[pair + 8 + half][group] = FLOAT_OF(u16(b1 >> shift));
    }
    meet_warp(what, site, [&] { multiply<16>(warp); });
    add_product(c);
}

static inline float float_of_tf32(u32 bits) {
    return bits_as<float>(bits & 0xffffe000);
}

}  // namespace emulator

DEVICE void load_matrix_x4(u32 (&r)[4], u32 row, EMULATOR_SITE) {
    emulator::load_matrices(r, row, false, "load_matrix_x4", site);
}

DEVICE void load_matrix_x4_transposed(u32 (&r)[4], u32 row, EMULATOR_SITE) {
    emulator::load_matrices(r, row, true, "load_matrix_x4_transposed", site);
}

DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, EMULATOR_SITE) {
    emulator::mma_16_bits<emulator::float_of_f16>(c, a, b0, b1, "mma_f16", site);
}

DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, EMULATOR_SITE) {
    emulator::mma_16_bits<emulator::float_of_bf16>(c, a, b0, b1, "mma_bf16", site);
}

DEVICE void mma_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, EMULATOR_SITE) {
    using namespace emulator;
    Warp& warp = *current->warp;
    const int group = current->lane / 4;
    const int column = current->lane % 4;
    warp.left[group][column] = float_of_tf32(a[0]);
    warp.left[group + 8][column] = float_of_tf32(a[1]);
    warp.left[group][column + 4] = float_of_tf32(a[2]);
    warp.left[group + 8][column + 4] = float_of_tf32(a[3]);
    warp.right[column][group] = float_of_tf32(b0);
    warp.right[column + 4][group] = float_of_tf32(b1);
    meet_warp("mma_tf32", site, [&] { multiply<8>(warp); });
    add_product(c);
}

DEVICE void mma_f64(double (&c)[2], double a, double b, EMULATOR_SITE) {
    using namespace emulator;
    Warp& warp = *current->warp;
    const int group = current->lane / 4;
    const int column = current->lane % 4;
    warp.left64[group][column] = a;
    warp.right64[column][group] = b;
    meet_warp("mma_f64", site, [&] {
        statistics.mma++;
        for (int row = 0; row < 8; row++) {
            Double8 sum = {};
            for (int k = 0; k < 4; k++) {
                sum += warp.left64[row][k] * warp.right64[k];
            }
            warp.product64[row] = sum;
        }
    });
    c[0] += warp.product64[group][column * 2];
    c[1] += warp.product64[group][column * 2 + 1];
}
