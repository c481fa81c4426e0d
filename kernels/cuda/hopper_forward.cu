// Flash attention, forward, for Hopper: softmax over the steps that a BlockMask lists, online.
//
// A block takes lines of 64 GROUPS queries from a list, one after the other. Its first warpgroup
// loads (one thread) and inspects (three warps, see hopper_tiles.cuh); the others compute, each for
// 64 of the queries:
//
//     keys ->   [128][128]...     scores (64 x 128)  = q k^T        in registers
//     queries   [64 of a group]   sums   (64 x D)   += weights v    in registers
//
// Keys and values come in stages of 128. While a group turns the scores of one step into weights,
// the products of the other group run: groups start their products by turns. And within a group
// the scores of a step are under way together with the sums of the step before.
#include "hopper_tiles.cuh"

enum {
    STEP = 128,
    ROWS = TILE * GROUPS,
    THREADS = GROUP * (1 + GROUPS),
    Q_BYTES = ROWS * ROW_BYTES,
    STAGE_BYTES = STEP * ROW_BYTES,
    KEYS = Q_BYTES,
    VALUES = KEYS + STAGES * STAGE_BYTES,
    SCRATCH = VALUES + STAGES * STAGE_BYTES,
    FOUND = SCRATCH + 4 * GROUPS * OUT_OF_WARP,     // 16 bytes to a stage
    BARRIERS = FOUND + 16 * STAGES,
    TURN = 1                    // named barriers of the groups
};

struct Barriers {
    u32 q_full, q_empty, k_full, k_empty, v_full, v_empty, inspected;
};

struct ForwardArguments {
    TensorMap q, k, v;
    StepLists lists;
    Rows values;                // v once more
    const int* items;           // (item_count, 2): line, batch * heads + head
    const int* q_lengths;       // (batch,)
    const int* kv_lengths;
    const float* scale;         // (heads,)
    const float* sinks;         // (heads,), or 0
    u16* out;                   // (batch, heads, n, D)
    float* lse;                 // (batch, heads, n)
    int item_count, heads, group_heads, n;
};

typedef Walk<GROUPS, 2> Steps;

DEVICE Steps steps_of(const ForwardArguments& a, const Item& item, int keys) {
    return Steps(a.lists, a.lists.layout[item.batch * a.heads + item.head], item.line, keys);
}

// Loads the queries of each item that has steps, and the keys and values of each step.
DEVICE void load(const ForwardArguments& a, u32 shared, const Barriers& at) {
    u32 q_parity = 1;
    Turn<STAGES> turn;
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x) {
        const Item item = item_of(a.items, number, a.heads);
        Steps steps = steps_of(a, item, a.kv_lengths[item.batch]);
        bool first = true;
        while (steps.next()) {
            if (first) {
                mbarrier_wait(at.q_empty, q_parity);
                q_parity ^= 1;
                mbarrier_expect(at.q_full, Q_BYTES);
                for (int panel = 0; panel < PANELS; panel++)
                    tma_load_4d(shared + panel * ROWS * PANEL_ROW, &a.q, at.q_full,
                                panel * PANEL_COLUMNS, item.line * ROWS, item.head, item.batch);
                first = false;
            }
            const int group = item.head / a.group_heads;
            const u32 keys = shared + KEYS + turn.stage * STAGE_BYTES;
            const u32 values = shared + VALUES + turn.stage * STAGE_BYTES;
            const u32 k_full = at.k_full + 8 * turn.stage;
            const u32 v_full = at.v_full + 8 * turn.stage;
            mbarrier_wait(at.k_empty + 8 * turn.stage, turn.parity ^ 1);
            mbarrier_expect(k_full, STAGE_BYTES);
            for (int panel = 0; panel < PANELS; panel++)
                tma_load_4d(keys + panel * STEP * PANEL_ROW, &a.k, k_full, panel * PANEL_COLUMNS,
                            steps.step * STEP, group, item.batch);
            mbarrier_wait(at.v_empty + 8 * turn.stage, turn.parity ^ 1);
            mbarrier_expect(v_full, STAGE_BYTES);
            for (int panel = 0; panel < PANELS; panel++)
                tma_load_4d(values + panel * STEP * PANEL_ROW, &a.v, v_full,
                            panel * PANEL_COLUMNS, steps.step * STEP, group, item.batch);
            turn.advance();
        }
    }
}

// Cleans the values of steps with masked pairs.
DEVICE void inspect(const ForwardArguments& a, u32 shared, const Barriers& at) {
    Turn<STAGES> turn;
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x) {
        const Item item = item_of(a.items, number, a.heads);
        const int keys = a.kv_lengths[item.batch];
        Steps steps = steps_of(a, item, keys);
        while (steps.next()) {
            const u32 values = shared + VALUES + turn.stage * STAGE_BYTES;
            mbarrier_wait(at.v_full + 8 * turn.stage, turn.parity);
            if (steps.partial(keys)) {
                const bool found = __ballot_sync(~0u, find_strange(values, STAGE_BYTES)) != 0;
                if (found)
                    clean(values, STAGE_BYTES);
                if (lane_number() == 0)
                    store_shared(shared + FOUND + 16 * turn.stage + 4 * (threadIdx.x / WARP - 1),
                                 u32(found));
            }
            release(at.inspected + 8 * turn.stage);
            release(at.v_empty + 8 * turn.stage);
            turn.advance();
        }
    }
}

// What a thread keeps of its two rows.
struct State {
    float largest[2], total[2], decay[2];
};

// A step as one group sees it.
struct Step {
    int key;
    int kind[2];
    bool masked, inspected;

    __device__ __forceinline__ void set(const Steps& steps, int group, int keys) {
        key = steps.step * STEP;
        UNROLL
        for (int g = 0; g < GROUPS; g++)    // no index that is known at run time only
            if (g == group) {
                kind[0] = steps.kind(2 * g);
                kind[1] = steps.kind(2 * g + 1);
            }
        masked = kind[0] != FULL || kind[1] != FULL || key + STEP > keys;
        inspected = steps.partial(keys);
    }

    // The keys of half of the step that the thread's rows may see.
    __device__ __forceinline__ void bits(u64 (&found)[2], const StepLists& lists, int half,
                                         int keys) const {
        UNROLL
        for (int h = 0; h < 2; h++)
            found[h] = bits_of_row(lists, kind[half], row_of_thread() + 8 * h,
                                   keys - key - half * TILE);
    }
};

DEVICE void start_scores(float (&scores)[STEP / 2], u32 queries, u32 keys) {
    wgmma_fence();
    UNROLL
    for (int i = 0; i < D / 16; i++) {
        const u32 column = i % 4 * 32;
        const u64 q = matrix_descriptor(queries + i / 4 * ROWS * PANEL_ROW + column, 16, 1024);
        const u64 k = matrix_descriptor(keys + i / 4 * STEP * PANEL_ROW + column, 16, 1024);
        wgmma_ss<BRAIN, false>(scores, q, k, i > 0);
    }
    wgmma_commit();
}

DEVICE void start_sums(float (&sums)[D / 2], u32 (&weights)[STEP / 16][4], u32 values) {
    wgmma_fence();
    UNROLL
    for (int i = 0; i < STEP / 16; i++) {
        const u64 v = matrix_descriptor(values + 16 * i * PANEL_ROW, STEP * PANEL_ROW, 1024);
        wgmma_rs<BRAIN, true>(sums, weights[i], v, true);
    }
    wgmma_commit();
}

DEVICE void mask(float (&scores)[STEP / 2], const u64 (&bits)[2], int half) {
    UNROLL
    for (int h = 0; h < 2; h++) {
        const u64 mine = bits[h] >> column_of_thread();
        const u32 words[2] = {u32(mine), u32(mine >> 32)};
        UNROLL
        for (int i = 0; i < 8; i++)
            UNROLL
            for (int e = 0; e < 2; e++)
                if (!(words[i / 4] >> (8 * (i % 4) + e) & 1))
                    scores[4 * (8 * half + i) + 2 * h + e] = -FLOAT_INFINITY;
    }
}

// Scores become weights, exp2(unit * (score - largest)).
DEVICE void weigh(float (&scores)[STEP / 2], State& state, float unit) {
    UNROLL
    for (int h = 0; h < 2; h++) {
        const float before = state.largest[h];
        float largest = before;
        UNROLL
        for (int i = 0; i < STEP / 8; i++)
            largest = fmaxf(largest, fmaxf(scores[4 * i + 2 * h], scores[4 * i + 2 * h + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
        state.largest[h] = largest;
        const float shift = largest == -FLOAT_INFINITY ? 0.0f : largest * unit;
        state.decay[h] = exp2_approx(fmaf(before, unit, -shift));
        float total[2] = {0.0f, 0.0f};
        UNROLL
        for (int i = 0; i < STEP / 8; i++)
            UNROLL
            for (int e = 0; e < 2; e++) {
                float& score = scores[4 * i + 2 * h + e];
                score = exp2_approx(fmaf(score, unit, -shift));
                total[e] += score;
            }
        state.total[h] = fmaf(state.total[h], state.decay[h], total[0] + total[1]);
    }
}

DEVICE void round_weights(u32 (&weights)[STEP / 16][4], const float (&scores)[STEP / 2]) {
    UNROLL
    for (int i = 0; i < STEP / 16; i++)
        UNROLL
        for (int j = 0; j < 4; j++)
            weights[i][j] = pack(scores[8 * i + 2 * j], scores[8 * i + 2 * j + 1]);
}

// Sums shrink where a row's largest score has grown: seldom, after the first steps.
DEVICE void shrink(float (&sums)[D / 2], const State& state) {
    if (!__ballot_sync(~0u, state.decay[0] != 1.0f || state.decay[1] != 1.0f))
        return;
    UNROLL
    for (int i = 0; i < D / 8; i++)
        UNROLL
        for (int j = 0; j < 4; j++)
            sums[4 * i + j] *= state.decay[j / 2];
}

// Adds what the inspectors took out of a step's values.
DEVICE void restore(float (&sums)[D / 2], const ForwardArguments& a, const Item& item,
                    const Step& step, int keys, u32 found) {
    u32 any = 0;
    for (int i = 0; i < INSPECTORS; i++)
        any |= load_shared<u32>(found + 4 * i);
    if (!any)
        return;
    UNROLL
    for (int half = 0; half < 2; half++) {
        u64 bits[2];
        step.bits(bits, a.lists, half, keys);
        const u16* from = a.values.at(item.batch, item.head / a.group_heads,
                                      step.key + half * TILE);
        add_strange(sums, from, a.values.row, bits, false);
    }
}

// Scores that were waited for become weights.
DEVICE void finish_scores(float (&scores)[STEP / 2], State& state, const Step& step,
                          const u64 (&bits)[2][2], float scale) {
    if (scale < 0.0f) {
        UNROLL
        for (int i = 0; i < STEP / 2; i++)
            scores[i] = -scores[i];
    }
    if (step.masked) {
        mask(scores, bits[0], 0);
        mask(scores, bits[1], 1);
    }
    // with a unit of 0, a masked score would become NaN
    weigh(scores, state, fmaxf(fabsf(scale) * LOG2_E, 1e-30f));
}

DEVICE void fetch_bits(u64 (&bits)[2][2], const ForwardArguments& a, const Step& step, int keys) {
    if (step.masked) {
        step.bits(bits[0], a.lists, 0, keys);
        step.bits(bits[1], a.lists, 1, keys);
    }
}

// Divides by the totals, lets the sink join, and writes out and lse.
DEVICE void finish(const ForwardArguments& a, const Item& item, int group, State& state,
                   const float (&sums)[D / 2], float scale, u32 scratch) {
    const float unit = fmaxf(fabsf(scale) * LOG2_E, 1e-30f);
    const i64 head = i64(item.batch) * a.heads + item.head;
    const int warp_row = item.line * ROWS + group * TILE + row_of_thread() / 16 * 16;
    const int queries = a.q_lengths[item.batch];
    float share[2];
    bool live[2];
    UNROLL
    for (int h = 0; h < 2; h++) {
        const int row = item.line * ROWS + group * TILE + row_of_thread() + 8 * h;
        float total = state.total[h];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        live[h] = row < queries && total != 0.0f;
        float lse = live[h] ? fmaf(state.largest[h], unit, log2_approx(total)) * LN_2
                            : -FLOAT_INFINITY;
        share[h] = 1.0f / total;
        if (a.sinks) {
            const float sink = a.sinks[item.head];
            const float most = fmaxf(lse, sink);
            // the sink's part of the joint total, and the keys'
            const float rest = exp2_approx((fminf(lse, sink) - most) * LOG2_E);
            const float joint = 1.0f + rest;
            if (most != -FLOAT_INFINITY) {
                share[h] *= (lse < sink ? rest : 1.0f) / joint;
                lse = lse == lse ? most + log2_approx(joint) * LN_2 : lse;
            }
        }
        if (row < a.n && lane_number() % 4 == 0)
            a.lse[head * a.n + row] = lse;
    }
    if (warp_row < a.n)
        write_rows(a.out + (head * a.n + warp_row) * D, a.n - warp_row, sums, share, live,
                   scratch + (threadIdx.x / WARP - 4) * OUT_OF_WARP);
}

DEVICE void compute(const ForwardArguments& a, u32 shared, const Barriers& at, int group) {
    float sums[D / 2];
    float scores[STEP / 2];
    u32 weights[STEP / 16][4];
    u64 bits[2][2];
    State state;
    u32 q_parity = 0;
    Turn<STAGES> turn;
    if (group == GROUPS - 1)
        barrier_arrive(TURN, 2 * GROUP);
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x) {
        const Item item = item_of(a.items, number, a.heads);
        const int keys = a.kv_lengths[item.batch];
        const float scale = a.scale[item.head];
        const u32 queries = shared + group * TILE * PANEL_ROW;
        Steps steps = steps_of(a, item, keys);
        UNROLL
        for (int i = 0; i < D / 2; i++)
            sums[i] = 0.0f;
        UNROLL
        for (int h = 0; h < 2; h++) {
            state.largest[h] = -FLOAT_INFINITY;
            state.total[h] = 0.0f;
        }
        if (steps.next()) {
            Step step;
            step.set(steps, group, keys);
            mbarrier_wait(at.q_full, q_parity);
            q_parity ^= 1;
            mbarrier_wait(at.k_full + 8 * turn.stage, turn.parity);
            start_scores(scores, queries, shared + KEYS + turn.stage * STAGE_BYTES);
            fetch_bits(bits, a, step, keys);
            wgmma_wait<0>();
            hold(scores);
            release(at.k_empty + 8 * turn.stage);
            finish_scores(scores, state, step, bits, scale);
            round_weights(weights, scores);

            while (steps.next()) {
                const Step before = step;
                const Turn<STAGES> turn_before = turn;
                step.set(steps, group, keys);
                turn.advance();
                mbarrier_wait(at.k_full + 8 * turn.stage, turn.parity);
                barrier_sync(TURN + group, 2 * GROUP);
                hold(sums);
                hold(weights);
                start_scores(scores, queries, shared + KEYS + turn.stage * STAGE_BYTES);
                mbarrier_wait(at.v_full + 8 * turn_before.stage, turn_before.parity);
                if (before.inspected)
                    mbarrier_wait(at.inspected + 8 * turn_before.stage, turn_before.parity);
                start_sums(sums, weights, shared + VALUES + turn_before.stage * STAGE_BYTES);
                barrier_arrive(TURN + (group + 1) % GROUPS, 2 * GROUP);
                fetch_bits(bits, a, step, keys);
                wgmma_wait<1>();
                hold(scores);
                release(at.k_empty + 8 * turn.stage);
                finish_scores(scores, state, step, bits, scale);
                wgmma_wait<0>();
                hold(sums);
                hold(weights);
                if (before.inspected)
                    restore(sums, a, item, before, keys, shared + FOUND + 16 * turn_before.stage);
                release(at.v_empty + 8 * turn_before.stage);
                round_weights(weights, scores);
                shrink(sums, state);
            }
            release(at.q_empty);
            mbarrier_wait(at.v_full + 8 * turn.stage, turn.parity);
            if (step.inspected)
                mbarrier_wait(at.inspected + 8 * turn.stage, turn.parity);
            hold(sums);
            hold(weights);
            start_sums(sums, weights, shared + VALUES + turn.stage * STAGE_BYTES);
            wgmma_wait<0>();
            hold(sums);
            if (step.inspected)
                restore(sums, a, item, step, keys, shared + FOUND + 16 * turn.stage);
            release(at.v_empty + 8 * turn.stage);
            turn.advance();
        }
        finish(a, item, group, state, sums, scale, shared + SCRATCH);
    }
    if (group == 0)
        barrier_sync(TURN, 2 * GROUP);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
hopper_forward(const __grid_constant__ ForwardArguments arguments) {
    const u32 shared = shared_base();
    const u32 first = shared + BARRIERS;
    const Barriers at = {first, first + 8, first + 16, first + 16 + 8 * STAGES,
                         first + 16 + 16 * STAGES, first + 16 + 24 * STAGES,
                         first + 16 + 32 * STAGES};
    if (threadIdx.x == 0) {
        const int warps = 4 * GROUPS;
        mbarrier_init(at.q_full, 1);
        mbarrier_init(at.q_empty, warps);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(at.k_full + 8 * i, 1);
            mbarrier_init(at.k_empty + 8 * i, warps);
            mbarrier_init(at.v_full + 8 * i, 1);
            mbarrier_init(at.v_empty + 8 * i, warps + INSPECTORS);
            mbarrier_init(at.inspected + 8 * i, INSPECTORS);
        }
        mbarrier_fence();
    }
    __syncthreads();
    const int group = int(threadIdx.x) / GROUP - 1;
    if (group < 0) {
        register_decrease<LOAD_REGISTERS>();
        if (threadIdx.x == 0)
            load(arguments, shared, at);
        else if (threadIdx.x >= WARP)
            inspect(arguments, shared, at);
    } else {
        register_increase<COMPUTE_REGISTERS>();
        compute(arguments, shared, at, group);
    }
}
