// The host version of kernels/cuda/hopper.cuh: the same functions, executed and judged by the
// emulator. What each one does is said there.
#pragma once

#include "primitives.cuh"
#include "warpgroups.hpp"

enum { PANEL_COLUMNS = 64, PANEL_ROW = 128 };

#define KEEP_ROLLED

DEVICE u32 swizzled(u32 panel, int row, int chunk) {
    return panel + row * PANEL_ROW + ((chunk ^ (row & 7)) << 4);
}

// ---- barriers in shared memory

DEVICE void mbarrier_init(u32 barrier, u32 count, EMULATOR_SITE) {
    emulator::make_mbarrier(barrier, count, site);
}

DEVICE void mbarrier_fence() {
    emulator::fences[emulator::current->index]++;
}

DEVICE void mbarrier_arrive(u32 barrier, EMULATOR_SITE) {
    emulator::arrive_at_mbarrier(barrier, 0, site);
}

DEVICE void mbarrier_expect(u32 barrier, u32 bytes, EMULATOR_SITE) {
    emulator::arrive_at_mbarrier(barrier, bytes, site);
}

DEVICE void mbarrier_wait(u32 barrier, u32 parity, EMULATOR_SITE) {
    emulator::wait_at_mbarrier(barrier, parity, site);
}

// ---- copies by tensor map

struct __align__(64) TensorMap {
    u64 opaque[16];
};

DEVICE void tma_prefetch(const TensorMap*) {}

DEVICE void tma_load_4d(u32 to, const TensorMap* map, u32 barrier, int c0, int c1, int c2, int c3,
                        EMULATOR_SITE) {
    emulator::start_box(to, map, barrier, {c0, c1, c2, c3}, site);
}

DEVICE void async_proxy_fence() {
    emulator::fences[emulator::current->index]++;
}

// ---- products of a warpgroup

DEVICE void wgmma_fence() {
    emulator::own_thread().fenced = true;
}

DEVICE void wgmma_commit(EMULATOR_SITE) {
    emulator::close_group(site);
}

template <int N>
DEVICE void wgmma_wait(EMULATOR_SITE) {
    emulator::wait_for_groups(N, site);
}

template <int COUNT>
DEVICE void hold(float (&)[COUNT]) {}

template <int COUNT>
DEVICE void hold(u32 (&)[COUNT][4]) {}

DEVICE u64 matrix_descriptor(u32 address, u32 leading_bytes, u32 stride_bytes) {
    return u64((address & 0x3ffff) >> 4) | u64(leading_bytes >> 4) << 16
        | u64(stride_bytes >> 4) << 32 | u64(1) << 62;
}

template <bool BFLOAT, bool B_MN_MAJOR, int COUNT>
DEVICE void wgmma_ss(float (&sums)[COUNT], u64 a, u64 b, bool add, EMULATOR_SITE) {
    static_assert(COUNT == 32 || COUNT == 64, "N is 64 or 128");
    emulator::issue_product({a, b, 2 * COUNT, false, B_MN_MAJOR, BFLOAT, add, site}, sums, nullptr);
}

template <bool BFLOAT, bool B_MN_MAJOR, int COUNT>
DEVICE void wgmma_rs(float (&sums)[COUNT], u32 (&a)[4], u64 b, bool add, EMULATOR_SITE) {
    static_assert(COUNT == 32 || COUNT == 64, "N is 64 or 128");
    emulator::issue_product({0, b, 2 * COUNT, true, B_MN_MAJOR, BFLOAT, add, site}, sums, a);
}

// ---- registers of a warpgroup

template <int N>
DEVICE void register_increase(EMULATOR_SITE) {
    emulator::set_registers(N, true, site);
}

template <int N>
DEVICE void register_decrease(EMULATOR_SITE) {
    emulator::set_registers(N, false, site);
}
