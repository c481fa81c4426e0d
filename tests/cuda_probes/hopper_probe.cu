// A small kernel that uses each of hopper.cuh's functions, and the mistakes that it makes when told
// to, for tests of the emulator: out (64 x 128) = sum over steps of bf16(a b') c with
// a (64 x 64), b (128 x 64) and c (128 x 128) of each step.
#include "hopper.cuh"

enum {
    STAGES = 2,
    A = 0,
    B = A + STAGES * 64 * 128,
    C = B + STAGES * 128 * 128,
    BARRIERS = C + STAGES * 2 * 128 * 128,
    A_BYTES = 64 * 128,
    B_BYTES = 128 * 128,
    C_BYTES = 2 * 128 * 128
};

enum Mistake {
    RIGHT, ARRIVAL_COUNT, PARITY, NO_EMPTY_WAIT, EARLY_RELEASE, NO_WAIT, LEADING_AND_STRIDE, STRIDE,
    SMALL_EXPECTATION, GREAT_EXPECTATION, NO_PROXY_FENCE, SUMS_TOUCHED, OPERAND_TOUCHED,
    NO_WGMMA_FENCE, REGISTERS, NO_MBARRIER_FENCE, NO_BARRIER_AFTER_INIT, OTHER_BUFFER,
    NO_SECOND_LOAD
};

struct ProbeArguments {
    TensorMap a, b, c;          // (1, 1, steps 64, 64), (1, 1, steps 128, 64), (1, 1, steps 128, 128)
    float* out;                 // (64, 128)
    int steps, mistake;
};

DEVICE void load(const ProbeArguments& p, u32 shared, u32 full, u32 empty) {
    for (int i = 0; i < p.steps; i++) {
        const int stage = i % STAGES;
        const u32 parity = i / STAGES & 1;
        if (p.mistake != NO_EMPTY_WAIT)
            mbarrier_wait(empty + 8 * stage, parity ^ 1);
        const u32 all = A_BYTES + B_BYTES + C_BYTES;
        mbarrier_expect(full + 8 * stage, p.mistake == SMALL_EXPECTATION ? all - C_BYTES
                        : p.mistake == GREAT_EXPECTATION ? all + 128 : all);
        tma_load_4d(shared + A + stage * A_BYTES, &p.a, full + 8 * stage, 0, 64 * i, 0, 0);
        tma_load_4d(shared + B + stage * B_BYTES, &p.b, full + 8 * stage, 0, 128 * i, 0, 0);
        const int other = p.mistake == OTHER_BUFFER ? 0 : stage;
        for (int panel = 0; panel < (p.mistake == NO_SECOND_LOAD ? 1 : 2); panel++)
            tma_load_4d(shared + C + other * C_BYTES + panel * 128 * 128, &p.c, full + 8 * stage,
                        64 * panel, 128 * i, 0, 0);
    }
}

DEVICE void compute(const ProbeArguments& p, u32 shared, u32 full, u32 empty) {
    float sums[64];
    float scores[64];
    u32 weights[8][4];
    for (int i = 0; i < 64; i++)
        sums[i] = 0.0f;
    for (int i = 0; i < p.steps; i++) {
        const int stage = i % STAGES;
        const u32 parity = i / STAGES & 1;
        mbarrier_wait(full + 8 * stage, p.mistake == PARITY ? parity ^ 1 : parity);
        // a passes through registers and back
        const u32 row = shared + A + stage * A_BYTES + threadIdx.x * 64;
        for (int chunk = 0; chunk < 4; chunk++)
            store_shared(row + 16 * chunk, load_shared<uint4>(row + 16 * chunk));
        if (p.mistake != NO_PROXY_FENCE)
            async_proxy_fence();
        barrier_sync(1, 128);

        if (p.mistake != NO_WGMMA_FENCE)
            wgmma_fence();
        UNROLL
        for (int k = 0; k < 4; k++) {
            const u32 stride = p.mistake == STRIDE ? 512 : 1024;
            wgmma_ss<true, false>(
                scores, matrix_descriptor(shared + A + stage * A_BYTES + 32 * k, 16, 1024),
                matrix_descriptor(shared + B + stage * B_BYTES + 32 * k, 16, stride), k > 0);
        }
        wgmma_commit();
        if (p.mistake == SUMS_TOUCHED)
            scores[5] += 1.0f;
        if (p.mistake != NO_WAIT)
            wgmma_wait<0>();
        hold(scores);
        UNROLL
        for (int k = 0; k < 8; k++)
            UNROLL
            for (int j = 0; j < 4; j++)
                weights[k][j] = pack_bf16(scores[8 * k + 2 * j], scores[8 * k + 2 * j + 1]);
        hold(weights);
        hold(sums);
        wgmma_fence();
        UNROLL
        for (int k = 0; k < 8; k++) {
            const u32 c = shared + C + stage * C_BYTES + 16 * k * 128;
            wgmma_rs<true, true>(sums, weights[k], p.mistake == LEADING_AND_STRIDE
                                 ? matrix_descriptor(c, 1024, 128 * 128)
                                 : matrix_descriptor(c, 128 * 128, 1024), true);
        }
        wgmma_commit();
        if (p.mistake == OPERAND_TOUCHED)
            weights[2][1] ^= 1;
        if (p.mistake == EARLY_RELEASE && threadIdx.x == 0)
            mbarrier_arrive(empty + 8 * stage);
        if (p.mistake == EARLY_RELEASE)
            barrier_sync(2, 128);
        wgmma_wait<0>();
        hold(sums);
        barrier_sync(1, 128);
        if (p.mistake != EARLY_RELEASE && threadIdx.x == 0)
            mbarrier_arrive(empty + 8 * stage);
    }
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    const int column = threadIdx.x % 4 * 2;
    for (int i = 0; i < 16; i++)
        for (int h = 0; h < 2; h++)
            for (int e = 0; e < 2; e++)
                p.out[(row + 8 * h) * 128 + 8 * i + column + e] = sums[4 * i + 2 * h + e];
}

extern "C" __global__ void __launch_bounds__(384)
hopper_probe(const __grid_constant__ ProbeArguments p) {
    const u32 shared = shared_base();
    const u32 full = shared + BARRIERS;
    const u32 empty = full + 8 * STAGES;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(full + 8 * i, 1);
            mbarrier_init(empty + 8 * i, p.mistake == ARRIVAL_COUNT ? 2 : 1);
        }
        if (p.mistake != NO_MBARRIER_FENCE)
            mbarrier_fence();
    }
    if (p.mistake != NO_BARRIER_AFTER_INIT)
        __syncthreads();
    if (threadIdx.x < 128) {
        register_increase<232>();
        compute(p, shared, full, empty);
    } else if (threadIdx.x < 256) {
        register_decrease<40>();
        if (threadIdx.x == 128)
            load(p, shared, full, empty);
    } else if (p.mistake == REGISTERS) {
        register_increase<248>();
    } else {
        register_increase<240>();
    }
}
