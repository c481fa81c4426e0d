// Flash attention, forward, for Hopper: softmax over the steps that a BlockMask lists, online.
//
// A block takes lines of 64 GROUPS queries from a list, one after the other. Its first warpgroup
// serves (see hopper_tiles.cuh), each of the others computes for 64 of the queries:
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
    Q_BYTES = ROWS * ROW_BYTES,
    STAGE_BYTES = STEP * ROW_BYTES,
    BITS_BYTES = ROWS * STEP / 8,
    OUT_OF_WARP = 16 * ROW_BYTES,

    // shared memory
    KEYS = Q_BYTES,
    VALUES = KEYS + STAGES * STAGE_BYTES,
    SCRATCH = VALUES + STAGES * STAGE_BYTES,
    BITS = SCRATCH + COMPUTING_WARPS * OUT_OF_WARP,
    NOTES = BITS + STAGES * BITS_BYTES,
    FOUND = NOTES + STAGES * NOTE,      // what inspectors tell
    BARRIERS = FOUND + STAGES * NOTE,
    SHARED_BYTES = BARRIERS + 8 * (2 + 6 * STAGES),

    TURN = 1,                           // named barriers of the groups
    INSPECTORS = 2                      // warps
};

struct Barriers {
    u32 q_full, q_empty;
    u32 k_full, k_empty, v_full, v_empty, scouted, inspected;   // the first of STAGES
};

struct ForwardArguments {
    TensorMap q, k, v;
    StepLists lists;
    Rows values;                // v once more
    const int4* items;          // in the order in which blocks take them
    const int* q_lengths;       // (batch,)
    const int* kv_lengths;
    const float* scale;         // (heads,)
    const float* sinks;         // (heads,), or 0
    u16* out;                   // (batch, heads, n, D)
    float* lse;                 // (batch, heads, n)
    int item_count, heads, group_heads, n;
};

typedef Walk<GROUPS, 2> Steps;

DEVICE Steps steps_of(const ForwardArguments& a, const Item& item) {
    Steps steps(a.lists);
    steps.restart(a.lists.layout[item.batch * a.heads + item.head], item.line);
    return steps;
}

// Loads the queries of each item that has steps, and the keys and values of each step.
DEVICE void load(const ForwardArguments& a, u32 shared, const Barriers& at) {
    u32 q_parity = 1;
    Turn<STAGES> turn;
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x) {
        const Item item = item_of(a.items, number);
        const int group = item.head / a.group_heads;
        Steps steps = steps_of(a, item);
        if (item.steps > 0) {
            mbarrier_wait(at.q_empty, q_parity);
            q_parity ^= 1;
            mbarrier_expect(at.q_full, Q_BYTES);
            load_rows(shared, &a.q, at.q_full, ROWS, item.line * ROWS, item.head, item.batch);
        }
        for (int left = item.steps; left > 0; left--) {
            steps.next();
            const u32 k_full = at.k_full + 8 * turn.stage;
            const u32 v_full = at.v_full + 8 * turn.stage;
            mbarrier_wait(at.k_empty + 8 * turn.stage, turn.parity ^ 1);
            mbarrier_expect(k_full, STAGE_BYTES);
            load_rows(shared + KEYS + turn.stage * STAGE_BYTES, &a.k, k_full, STEP,
                      steps.step * STEP, group, item.batch);
            mbarrier_wait(at.v_empty + 8 * turn.stage, turn.parity ^ 1);
            mbarrier_expect(v_full, STAGE_BYTES);
            load_rows(shared + VALUES + turn.stage * STAGE_BYTES, &a.v, v_full, STEP,
                      steps.step * STEP, group, item.batch);
            turn.advance();
        }
    }
}

// Notes what each step is.
DEVICE void scout(const ForwardArguments& a, u32 shared, const Barriers& at) {
    Turn<STAGES> turn;
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x) {
        const Item item = item_of(a.items, number);
        const int keys = a.kv_lengths[item.batch];
        Steps steps = steps_of(a, item);
        for (int left = item.steps; left > 0; left--) {
            steps.next();
            const bool masked = steps.partial(keys);
            mbarrier_wait(at.v_empty + 8 * turn.stage, turn.parity ^ 1);
            write_note(shared + NOTES + turn.stage * NOTE, {steps.step * STEP, masked, item.head});
            if (masked) {
                u64 there[2];
                steps.there(there, keys);
                write_bits(shared + BITS + turn.stage * BITS_BYTES, steps, there);
            }
            release(at.scouted + 8 * turn.stage);
            turn.advance();
        }
    }
}

// Cleans the values of steps with masked pairs.
DEVICE void inspect(const ForwardArguments& a, u32 shared, const Barriers& at) {
    const int thread = threadIdx.x - 2 * WARP;
    const int threads = WARP * INSPECTORS;
    Turn<STAGES> turn;
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x)
        for (int left = item_of(a.items, number).steps; left > 0; left--) {
            const u32 values = shared + VALUES + turn.stage * STAGE_BYTES;
            mbarrier_wait(at.scouted + 8 * turn.stage, turn.parity);
            mbarrier_wait(at.v_full + 8 * turn.stage, turn.parity);
            if (read_note(shared + NOTES + turn.stage * NOTE).masked
                && inspect(values, STAGE_BYTES, shared + FOUND + turn.stage * NOTE, thread,
                           threads))
                clean(values, STAGE_BYTES, thread, threads);
            release(at.inspected + 8 * turn.stage);
            release(at.v_empty + 8 * turn.stage);
            turn.advance();
        }
}

// What a thread keeps of its two rows.
struct State {
    float largest[2], total[2], decay[2];
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

// Ends the sums of a step: adds what inspectors took out of its values, and lets go of these.
DEVICE void finish_sums(float (&sums)[D / 2], const u32 (&weights)[STEP / 16][4],
                        const ForwardArguments& a, const Item& item, int group, bool masked,
                        int stage, u32 shared, const Barriers& at) {
    if (masked && told(shared + FOUND + stage * NOTE, INSPECTORS)) {
        const int first = read_note(shared + NOTES + stage * NOTE).first;
        UNROLL
        for (int half = 0; half < 2; half++) {
            u64 bits[2], vanished[2];
            find_vanished(vanished, weights, half * TILE / 16);
            read_bits<2>(bits, shared + BITS + stage * BITS_BYTES, group, half);
            const u16* rows = a.values.at(item.batch, item.head / a.group_heads,
                                          first + half * TILE);
            add_strange(sums, rows, a.values.row, bits, vanished);
        }
    }
    release(at.v_empty + 8 * stage);
}

// Scores that were waited for become weights.
DEVICE void finish_scores(float (&scores)[STEP / 2], State& state, bool masked, u32 bits, int group,
                          float scale) {
    if (!(scale > 0.0f)) {
        // what is not finite becomes NaN by a scale of 0, and so does everything by one of NaN
        const float factor = scale < 0.0f ? -1.0f : scale;
        UNROLL
        for (int i = 0; i < STEP / 2; i++)
            scores[i] *= factor;
    }
    if (masked) {
        UNROLL
        for (int half = 0; half < 2; half++) {
            u64 rows[2];
            read_bits<2>(rows, bits, group, half);
            mask(scores, half * TILE / 2, rows, -FLOAT_INFINITY);
        }
    }
    // with a unit of 0, a masked score would become NaN
    weigh(scores, state, fmaxf(fabsf(scale) * LOG2_E, 1e-30f));
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
                   scratch + (threadIdx.x / WARP - 4) * OUT_OF_WARP, 16 * PANEL_ROW);
}

DEVICE void compute(const ForwardArguments& a, u32 shared, const Barriers& at, int group) {
    float sums[D / 2];
    float scores[STEP / 2];
    u32 weights[STEP / 16][4];
    State state;
    u32 q_parity = 0;
    Turn<STAGES> turn;
    const u32 queries = shared + group * TILE * PANEL_ROW;
    if (group == GROUPS - 1)
        barrier_arrive(TURN, 2 * GROUP);
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x) {
        const Item item = item_of(a.items, number);
        const float scale = a.scale[item.head];
        UNROLL
        for (int i = 0; i < D / 2; i++)
            sums[i] = 0.0f;
        UNROLL
        for (int h = 0; h < 2; h++) {
            state.largest[h] = -FLOAT_INFINITY;
            state.total[h] = 0.0f;
        }
        if (item.steps > 0) {
            mbarrier_wait(at.scouted + 8 * turn.stage, turn.parity);
            bool masked = read_note(shared + NOTES + turn.stage * NOTE).masked;
            mbarrier_wait(at.q_full, q_parity);
            q_parity ^= 1;
            mbarrier_wait(at.k_full + 8 * turn.stage, turn.parity);
            start_scores(scores, queries, shared + KEYS + turn.stage * STAGE_BYTES);
            wgmma_wait<0>();
            hold(scores);
            release(at.k_empty + 8 * turn.stage);
            finish_scores(scores, state, masked, shared + BITS + turn.stage * BITS_BYTES, group,
                          scale);
            round_weights(weights, scores);

            for (int i = 1; i < item.steps; i++) {
                const bool masked_before = masked;
                const Turn<STAGES> before = turn;
                turn.advance();
                mbarrier_wait(at.scouted + 8 * turn.stage, turn.parity);
                masked = read_note(shared + NOTES + turn.stage * NOTE).masked;
                mbarrier_wait(at.k_full + 8 * turn.stage, turn.parity);
                barrier_sync(TURN + group, 2 * GROUP);
                hold(sums);
                hold(weights);
                start_scores(scores, queries, shared + KEYS + turn.stage * STAGE_BYTES);
                mbarrier_wait(at.v_full + 8 * before.stage, before.parity);
                if (masked_before)
                    mbarrier_wait(at.inspected + 8 * before.stage, before.parity);
                start_sums(sums, weights, shared + VALUES + before.stage * STAGE_BYTES);
                barrier_arrive(TURN + (group + 1) % GROUPS, 2 * GROUP);
                wgmma_wait<1>();
                hold(scores);
                release(at.k_empty + 8 * turn.stage);
                finish_scores(scores, state, masked, shared + BITS + turn.stage * BITS_BYTES,
                              group, scale);
                hold(scores);
#if SETTLE
                settle(state.total[0] + state.total[1]);
#endif
                wgmma_wait<0>();
                hold(sums);
                hold(weights);
                finish_sums(sums, weights, a, item, group, masked_before, before.stage, shared, at);
                round_weights(weights, scores);
                shrink(sums, state);
            }
            release(at.q_empty);
            mbarrier_wait(at.v_full + 8 * turn.stage, turn.parity);
            if (masked)
                mbarrier_wait(at.inspected + 8 * turn.stage, turn.parity);
            hold(sums);
            hold(weights);
            start_sums(sums, weights, shared + VALUES + turn.stage * STAGE_BYTES);
            wgmma_wait<0>();
            hold(sums);
            hold(weights);
            finish_sums(sums, weights, a, item, group, masked, turn.stage, shared, at);
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
    const u32 all = 8 * STAGES;
    const Barriers at = {first, first + 8, first + 16, first + 16 + all, first + 16 + 2 * all,
                         first + 16 + 3 * all, first + 16 + 4 * all, first + 16 + 5 * all};
    if (threadIdx.x == 0) {
        mbarrier_init(at.q_full, 1);
        mbarrier_init(at.q_empty, COMPUTING_WARPS);
        for (int i = 0; i < STAGES; i++) {
            mbarrier_init(at.k_full + 8 * i, 1);
            mbarrier_init(at.k_empty + 8 * i, COMPUTING_WARPS);
            mbarrier_init(at.v_full + 8 * i, 1);
            mbarrier_init(at.v_empty + 8 * i, COMPUTING_WARPS + INSPECTORS);
            mbarrier_init(at.scouted + 8 * i, 1);
            mbarrier_init(at.inspected + 8 * i, INSPECTORS);
        }
        mbarrier_fence();
    }
    __syncthreads();
    const int group = int(threadIdx.x) / GROUP - 1;
    if (group < 0) {
        register_decrease<SERVE_REGISTERS>();
        if (threadIdx.x == 0)
            load(arguments, shared, at);
        else if (threadIdx.x >= 2 * WARP)
            inspect(arguments, shared, at);
        else if (threadIdx.x >= WARP)
            scout(arguments, shared, at);
    } else {
        register_increase<COMPUTE_REGISTERS>();
        compute(arguments, shared, at, group);
    }
}
