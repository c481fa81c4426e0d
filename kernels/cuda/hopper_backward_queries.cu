// Flash attention, backward, for Hopper: the gradient of q, and each row's part of that of scale.
#include "hopper_backward.cuh"

typedef Walk<GROUPS, 1> Steps;

DEVICE Steps steps_of(const BackwardArguments& a, const Item& item) {
    Steps steps(a.lists);
    steps.restart(a.lists.layout[item.batch * a.heads + item.head], item.line);
    return steps;
}

// Loads q and dout of each item that has steps, and k and v of each step.
DEVICE void load(const BackwardArguments& a, u32 shared, const Barriers& at) {
    u32 own_parity = 1;
    Turn<STAGES> turn;
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x) {
        const Item item = item_of(a.items, number);
        const int group = item.head / a.group_heads;
        Steps steps = steps_of(a, item);
        if (item.steps > 0) {
            mbarrier_wait(at.own_empty, own_parity);
            own_parity ^= 1;
            mbarrier_expect(at.own_full, 2 * OWN_BYTES);
            load_rows(shared, &a.q, at.own_full, ROWS, item.line * ROWS, item.head, item.batch);
            load_rows(shared + OWN_BYTES, &a.dout, at.own_full, ROWS, item.line * ROWS, item.head,
                      item.batch);
        }
        for (int left = item.steps; left > 0; left--) {
            steps.next();
            const u32 to = shared + WALKED + turn.stage * STAGE_BYTES;
            const u32 full = at.full + 8 * turn.stage;
            mbarrier_wait(at.empty + 8 * turn.stage, turn.parity ^ 1);
            mbarrier_expect(full, STAGE_BYTES);
            load_rows(to, &a.k, full, TILE, steps.step * TILE, group, item.batch);
            load_rows(to + TILE_BYTES, &a.v, full, TILE, steps.step * TILE, group, item.batch);
            turn.advance();
        }
    }
}

// Notes what each step is.
DEVICE void scout(const BackwardArguments& a, u32 shared, const Barriers& at) {
    Turn<STAGES> turn;
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x) {
        const Item item = item_of(a.items, number);
        const int keys = a.kv_lengths[item.batch];
        Steps steps = steps_of(a, item);
        for (int left = item.steps; left > 0; left--) {
            steps.next();
            const bool masked = steps.partial(keys);
            mbarrier_wait(at.empty + 8 * turn.stage, turn.parity ^ 1);
            write_note(shared + NOTES + turn.stage * NOTE, {steps.step * TILE, masked, item.head});
            if (masked) {
                u64 there[1];
                steps.there(there, keys);
                write_bits(shared + BITS + turn.stage * BITS_BYTES, steps, there);
            }
            release(at.scouted + 8 * turn.stage);
            turn.advance();
        }
    }
}

// Adds what inspectors took out of a step's keys.
DEVICE void restore(float (&dq)[D / 2], const BackwardArguments& a, const Item& item, int group,
                    int stage, u32 shared) {
    if (!told(shared + FOUND + stage * NOTE, INSPECTORS))
        return;
    const Rows& k = a.walked[0];
    const int first = read_note(shared + NOTES + stage * NOTE).first;
    const u64 all[2] = {~u64(0), ~u64(0)};
    u64 bits[2];
    read_bits<1>(bits, shared + BITS + stage * BITS_BYTES, group, 0);
    add_strange(dq, k.at(item.batch, item.head / a.group_heads, first), k.row, bits, all);
}

// What a thread knows of its two rows.
struct State {
    float lse[2], delta[2];
    bool live[2];
};

DEVICE void begin(State& state, const BackwardArguments& a, const Item& item, int group) {
    UNROLL
    for (int h = 0; h < 2; h++) {
        const int row = item.line * ROWS + group * TILE + row_of_thread() + 8 * h;
        const i64 place = (i64(item.batch) * a.heads + item.head) * a.n + row;
        const float lse = row < a.q_lengths[item.batch] ? a.lse[place] : -FLOAT_INFINITY;
        state.live[h] = lse != -FLOAT_INFINITY;
        // a row that sees nothing has weights of 0
        state.lse[h] = state.live[h] ? lse * LOG2_E : FLOAT_INFINITY;
        state.delta[h] = state.live[h] ? a.delta[place] : 0.0f;
    }
}

// Writes the rows of a group, and what they add to the gradient of the scale: q times dq / scale.
DEVICE void finish(const BackwardArguments& a, const Item& item, int group, const State& state,
                   const float (&dq)[D / 2], u32 shared) {
    const i64 head = i64(item.batch) * a.heads + item.head;
    const int first = item.line * ROWS + group * TILE;
    const u32 queries = shared + group * TILE * PANEL_ROW;
    UNROLL
    for (int h = 0; h < 2; h++) {
        const int row = row_of_thread() + 8 * h;
        float sum = 0.0f;
        if (item.steps > 0 && state.live[h]) {
            UNROLL
            for (int i = 0; i < D / 8; i++) {
                const u32 chunk = swizzled(queries + i / 8 * ROWS * PANEL_ROW, row, i % 8);
                const u32 q = load_shared<u32>(chunk + 2 * column_of_thread());
                sum = fmaf(unpack(q & 0xffff), dq[4 * i + 2 * h], sum);
                sum = fmaf(unpack(q >> 16), dq[4 * i + 2 * h + 1], sum);
            }
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (first + row < a.n && lane_number() % 4 == 0)
            a.dscale[head * a.n + first + row] = sum;
    }
    const int warp_row = row_of_thread() / 16 * 16;
    const float scale = a.scale[item.head];
    const float share[2] = {scale, scale};
    // on the way they lie where the warp's own rows of dout were
    if (first + warp_row < a.n)
        write_rows(a.dq + (head * a.n + first + warp_row) * D, a.n - first - warp_row, dq, share,
                   state.live, queries + OWN_BYTES + warp_row * PANEL_ROW, ROWS * PANEL_ROW);
}

DEVICE void compute(const BackwardArguments& a, u32 shared, const Barriers& at, int group) {
    float dq[D / 2];
    float scores[TILE / 2];
    float pulls[TILE / 2];
    u32 weights[TILE / 16][4];
    State state;
    u32 own_parity = 0;
    Turn<STAGES> turn;
    const u32 queries = shared + group * TILE * PANEL_ROW;
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x) {
        const Item item = item_of(a.items, number);
        const float unit = a.scale[item.head] * LOG2_E;
        begin(state, a, item, group);
        clear(dq);
        if (item.steps > 0) {
            mbarrier_wait(at.own_full, own_parity);
            own_parity ^= 1;
        }
        for (int left = item.steps; left > 0; left--) {
            const int stage = turn.stage;
            const u32 walked = shared + WALKED + stage * STAGE_BYTES;
            const u32 bits = shared + BITS + stage * BITS_BYTES;
            mbarrier_wait(at.full + 8 * stage, turn.parity);
            start_scores(scores, queries, walked);
            start_scores(pulls, queries + OWN_BYTES, walked + TILE_BYTES);
            mbarrier_wait(at.scouted + 8 * stage, turn.parity);
            const bool masked = read_note(shared + NOTES + stage * NOTE).masked;
            wgmma_wait<1>();
            hold(scores);
            UNROLL
            for (int i = 0; i < TILE / 2; i++)
                scores[i] = exp2_approx(fmaf(scores[i], unit, -state.lse[i / 2 % 2]));
            hold(scores);
#if SETTLE
            settle(scores[TILE / 2 - 2] + scores[TILE / 2 - 1]);
#endif
            wgmma_wait<0>();
            hold(pulls);
            release(at.scored + 8 * stage);
            UNROLL
            for (int i = 0; i < TILE / 2; i++)
                scores[i] *= pulls[i] - state.delta[i / 2 % 2];
            if (masked) {
                hide(scores, bits, group);
                mbarrier_wait(at.inspected + 8 * stage, turn.parity);
            }
            round_weights(weights, scores);
            hold(dq);
            hold(weights);
            start_sums(dq, weights, walked);
            wgmma_wait<0>();
            hold(dq);
            hold(weights);
            if (masked)
                restore(dq, a, item, group, stage, shared);
            release(at.empty + 8 * stage);
            turn.advance();
        }
        // products of all its warps have read what results lie in on their way
        barrier_sync(TOGETHER + group, GROUP);
        finish(a, item, group, state, dq, shared);
        if (item.steps > 0) {
            async_proxy_fence();
            release(at.own_empty);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
hopper_backward_queries(const __grid_constant__ BackwardArguments arguments) {
    const u32 shared = shared_base();
    const Barriers at = initialise(shared);
    const int group = int(threadIdx.x) / GROUP - 1;
    if (group < 0) {
        register_decrease<SERVE_REGISTERS>();
        if (threadIdx.x == 0)
            load(arguments, shared, at);
        else if (threadIdx.x >= 2 * WARP)
            inspect_stages(arguments, TILE_BYTES, shared, at);
        else if (threadIdx.x >= WARP)
            scout(arguments, shared, at);
    } else {
        register_increase<COMPUTE_REGISTERS>();
        compute(arguments, shared, at, group);
    }
}
