// What kernels for Hopper (sm_90a) ask of the hardware, beyond primitives.cuh: barriers in shared
// memory, copies by tensor map, products of a warpgroup, registers moved between warpgroups. As
// there, tests/emulator/hopper.cuh stands in for this file on a CPU.
//
// Tiles of 16-bit elements lie in shared memory as *panels*: 64 columns, all rows, 128 bytes to a
// row, from a multiple of 1024 on. The eight 16-byte chunks of a row are permuted by its number
// (chunk ^ row % 8), which copies by tensor map, products and `swizzled` agree on.
#pragma once
#include "primitives.cuh"

enum { PANEL_COLUMNS = 64, PANEL_ROW = 128 };

// Before loops of warps that have few registers.
#define KEEP_ROLLED _Pragma("unroll 1")

// Where a 16-byte chunk of a panel's row lies.
DEVICE u32 swizzled(u32 panel, int row, int chunk) {
    return panel + row * PANEL_ROW + ((chunk ^ (row & 7)) << 4);
}

// ---- barriers in shared memory, 8 bytes each

// Phases are numbered from 0; a phase ends when `count` arrivals and all expected bytes have come.
DEVICE void mbarrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}

// After initialisation, before a block-wide barrier: copies, too, see the barriers.
DEVICE void mbarrier_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void mbarrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// Arrive, and let the phase wait for as many bytes of copies, too.
DEVICE void mbarrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(barrier), "r"(bytes) : "memory");
}

// Wait until the newest phase of this parity has ended: phase 0 for parity 0, and so on. What has
// not begun counts as ended for parity 1.
DEVICE void mbarrier_wait(u32 barrier, u32 parity) {
    asm volatile("{\n"
                 ".reg .pred ended;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
                 "@ended bra done;\n"
                 "bra again;\n"
                 "done:\n"
                 "}" :: "r"(barrier), "r"(parity) : "memory");
}

// ---- copies by tensor map

// Made by the driver: address, shape and strides of an array, the box that a copy takes.
struct __align__(64) TensorMap {
    u64 opaque[16];
};

DEVICE void tma_prefetch(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}

// Copy the map's box from the coordinates on (c0: columns) to a panel. The barrier is told of all
// its bytes; what lies outside the array arrives as zeros.
DEVICE void tma_load_4d(u32 to, const TensorMap* map, u32 barrier, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];"
                 :: "r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

// Let copies and products, which read shared memory by another way, see this thread's stores.
// Before the barrier that tells the others of them.
DEVICE void async_proxy_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- products of a warpgroup: 64 rows of sums, 16 rows to each of its four warps
//
// A (64 x 16) times B (16 x N) is added to sums (64 x N). Thread lane = 4 r + t of warp w holds
//
//     sums[4 i], sums[4 i + 1]        row 16 w + r,     columns 8 i + 2 t and the next
//     sums[4 i + 2], sums[4 i + 3]    row 16 w + r + 8, the same columns
//
// and A from registers as pairs: rows r, r + 8, r, r + 8; columns 2 t, 2 t, 2 t + 8, 2 t + 8.
// Products run beside the thread: until they are waited for, sums and A are not to be touched.

// Products that follow see what the threads did to their registers.
DEVICE void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Close a group of products.
DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until at most N of the newest groups are under way.
template <int N>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

// Keep the compiler from moving what is done with registers across this place: after a wait, for
// the sums waited for; before products, for operands and sums that were written to.
template <int COUNT>
DEVICE void hold(float (&x)[COUNT]) {
    UNROLL
    for (int i = 0; i < COUNT; i++)
        asm volatile("" : "+f"(x[i]) :: "memory");
}

template <int COUNT>
DEVICE void hold(u32 (&x)[COUNT][4]) {
    UNROLL
    for (int i = 0; i < COUNT; i++)
        UNROLL
        for (int j = 0; j < 4; j++)
            asm volatile("" : "+r"(x[i][j]) :: "memory");
}

// An operand in panels. K-major: rows of the panel are rows of A or columns of B; 8 rows further is
// `stride_bytes` (1024), and leading_bytes means nothing. MN-major: columns of the panel are rows of
// A or columns of B; 8 of its rows further is stride_bytes (1024), 64 of its columns further, in the
// next panel, is leading_bytes.
DEVICE u64 matrix_descriptor(u32 address, u32 leading_bytes, u32 stride_bytes) {
    return u64((address & 0x3ffff) >> 4) | u64(leading_bytes >> 4) << 16
        | u64(stride_bytes >> 4) << 32 | u64(1) << 62;
}

#define LIST_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIST_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define SUMS_8(x, i) \
    "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), \
    "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define SUMS_32(x, i) SUMS_8(x, i), SUMS_8(x, i + 8), SUMS_8(x, i + 16), SUMS_8(x, i + 24)
#define SUMS_64(x) SUMS_32(x, 0), SUMS_32(x, 32)

#define WGMMA(shape, type) "wgmma.mma_async.sync.aligned." shape ".f32." type "." type " "

// Both operands in shared memory, A K-major. N = 64 and 128.
#define WGMMA_SS_64(type) \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n" WGMMA("m64n64k16", type) \
                 "{" LIST_32 "}, %32, %33, add, 1, 1, 0, %35;\n}" \
                 : SUMS_32(sums, 0) : "l"(a), "l"(b), "r"(int(add)), "n"(B_MN_MAJOR) : "memory")
#define WGMMA_SS_128(type) \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n" WGMMA("m64n128k16", type) \
                 "{" LIST_64 "}, %64, %65, add, 1, 1, 0, %67;\n}" \
                 : SUMS_64(sums) : "l"(a), "l"(b), "r"(int(add)), "n"(B_MN_MAJOR) : "memory")

// A in registers.
#define WGMMA_RS_64(type) \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n" WGMMA("m64n64k16", type) \
                 "{" LIST_32 "}, {%32, %33, %34, %35}, %36, add, 1, 1, %38;\n}" \
                 : SUMS_32(sums, 0) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), \
                   "n"(B_MN_MAJOR) : "memory")
#define WGMMA_RS_128(type) \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n" WGMMA("m64n128k16", type) \
                 "{" LIST_64 "}, {%64, %65, %66, %67}, %68, add, 1, 1, %70;\n}" \
                 : SUMS_64(sums) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), \
                   "n"(B_MN_MAJOR) : "memory")

// BFLOAT: bf16, else fp16. If not `add`, sums are overwritten.
template <bool BFLOAT, bool B_MN_MAJOR>
DEVICE void wgmma_ss(float (&sums)[32], u64 a, u64 b, bool add) {
    if constexpr (BFLOAT) {
        WGMMA_SS_64("bf16");
    } else {
        WGMMA_SS_64("f16");
    }
}

template <bool BFLOAT, bool B_MN_MAJOR>
DEVICE void wgmma_ss(float (&sums)[64], u64 a, u64 b, bool add) {
    if constexpr (BFLOAT) {
        WGMMA_SS_128("bf16");
    } else {
        WGMMA_SS_128("f16");
    }
}

template <bool BFLOAT, bool B_MN_MAJOR>
DEVICE void wgmma_rs(float (&sums)[32], u32 (&a)[4], u64 b, bool add) {
    if constexpr (BFLOAT) {
        WGMMA_RS_64("bf16");
    } else {
        WGMMA_RS_64("f16");
    }
}

template <bool BFLOAT, bool B_MN_MAJOR>
DEVICE void wgmma_rs(float (&sums)[64], u32 (&a)[4], u64 b, bool add) {
    if constexpr (BFLOAT) {
        WGMMA_RS_128("bf16");
    } else {
        WGMMA_RS_128("f16");
    }
}

// ---- registers of a warpgroup: all its warps together; a block's sum may not exceed 65536

template <int N>
DEVICE void register_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
}

template <int N>
DEVICE void register_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}
