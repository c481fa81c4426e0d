// Flash attention, backward, for Hopper: the gradients of k and v. A block goes through the heads
// that share its keys in order, and adds them up in its registers.
#include "hopper_backward.cuh"

// The steps of all heads that share the keys of an item (line, group). The serving warps have few
// registers: what is not needed at each step is read again.
struct Steps {
    const BackwardArguments& a;
    int number, head, left;     // head: of all items of the batch
    Walk<GROUPS, 1> walk;

    __device__ __forceinline__ Steps(const BackwardArguments& given, int number_)
        : a(given), number(number_), left(0), walk(given.lists) {
        const Item item = item_of(a.items, number);
        head = item.batch * a.heads + item.head * a.group_heads - 1;
    }

    __device__ __forceinline__ void next() {
        while (left == 0) {
            head++;
            const int line = item_of(a.items, number).line;
            left = a.steps[i64(head) * a.lists.lines + line];
            walk.restart(a.lists.layout[head], line);
        }
        left--;
        walk.next();
    }
};

// Loads k and v of each item that has steps, and q and dout of each step.
DEVICE void load(const BackwardArguments& a, u32 shared, const Barriers& at) {
    u32 own_parity = 1;
    Turn<STAGES> turn;
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x) {
        const Item item = item_of(a.items, number);
        Steps steps(a, number);
        if (item.steps > 0) {
            mbarrier_wait(at.own_empty, own_parity);
            own_parity ^= 1;
            mbarrier_expect(at.own_full, 2 * OWN_BYTES);
            load_rows(shared, &a.k, at.own_full, ROWS, item.line * ROWS, item.head, item.batch);
            load_rows(shared + OWN_BYTES, &a.v, at.own_full, ROWS, item.line * ROWS, item.head,
                      item.batch);
        }
        for (int left = item.steps; left > 0; left--) {
            steps.next();
            const u32 to = shared + WALKED + turn.stage * STAGE_BYTES;
            const u32 full = at.full + 8 * turn.stage;
            const int query = steps.walk.step * TILE;
            const int head = steps.head - item.batch * a.heads;
            mbarrier_wait(at.empty + 8 * turn.stage, turn.parity ^ 1);
            mbarrier_expect(full, STAGE_BYTES);
            load_rows(to, &a.q, full, TILE, query, head, item.batch);
            load_rows(to + TILE_BYTES, &a.dout, full, TILE, query, head, item.batch);
            turn.advance();
        }
    }
}

// Which of the 64 queries of a step have a finite lse, as a scout's lanes have just written it.
DEVICE void find_live(u64 (&live)[1], u32 values) {
    u32 words[2];
    UNROLL
    for (int half = 0; half < 2; half++)
        words[half] = __ballot_sync(~0u, load_shared<float>(
            values + 4 * (lane_number() + half * WARP)) != FLOAT_INFINITY);
    live[0] = words[0] | u64(words[1]) << 32;
}

// Notes what each step is, and puts lse and delta of its queries beside them.
DEVICE void scout(const BackwardArguments& a, u32 shared, const Barriers& at) {
    Turn<STAGES> turn;
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x) {
        Steps steps(a, number);
        for (int left = item_of(a.items, number).steps; left > 0; left--) {
            steps.next();
            const int batch = item_of(a.items, number).batch;
            const int queries = a.q_lengths[batch];
            const int first = steps.walk.step * TILE;
            mbarrier_wait(at.empty + 8 * turn.stage, turn.parity ^ 1);
            const u32 to = shared + ROW_VALUES + turn.stage * VALUES_BYTES;
            KEEP_ROLLED
            for (int row = lane_number(); row < TILE; row += WARP) {
                const i64 place = i64(steps.head) * a.n + first + row;
                const float lse = first + row < queries ? a.lse[place] : -FLOAT_INFINITY;
                const bool live = lse != -FLOAT_INFINITY;
                // a row that sees nothing has weights of 0
                store_shared(to + 4 * row, live ? lse * LOG2_E : FLOAT_INFINITY);
                store_shared(to + 4 * (TILE + row), live ? a.delta[place] : 0.0f);
            }
            // among full tiles, too, there may be a query whose scores are all -inf
            u64 live[1];
            find_live(live, to);
            const bool masked = steps.walk.partial() || live[0] != ~u64(0);
            write_note(shared + NOTES + turn.stage * NOTE,
                       {first, masked, steps.head - batch * a.heads});
            if (masked)
                write_bits(shared + BITS + turn.stage * BITS_BYTES, steps.walk, live);
            release(at.scouted + 8 * turn.stage);
            turn.advance();
        }
    }
}

// Adds to sums what inspectors took out of a step's rows of `walked`.
DEVICE void restore(float (&sums)[D / 2], const BackwardArguments& a, const Rows& walked,
                    const u64 (&as_nan)[2], int number, int group, int stage, u32 shared) {
    const int batch = item_of(a.items, number).batch;
    const Note note = read_note(shared + NOTES + stage * NOTE);
    u64 bits[2];
    read_bits<1>(bits, shared + BITS + stage * BITS_BYTES, group, 0);
    add_strange(sums, walked.at(batch, note.head, note.first), walked.row, bits, as_nan);
}

// Scores become weights: exp2(unit * score - lse), the lse of each column in shared memory.
DEVICE void weigh(float (&scores)[TILE / 2], float unit, u32 lse) {
    UNROLL
    for (int i = 0; i < TILE / 8; i++) {
        const float2 l = load_shared<float2>(lse + 4 * (8 * i + column_of_thread()));
        UNROLL
        for (int h = 0; h < 2; h++) {
            const int at = 4 * i + 2 * h;
            scores[at] = exp2_approx(fmaf(scores[at], unit, -l.x));
            scores[at + 1] = exp2_approx(fmaf(scores[at + 1], unit, -l.y));
        }
    }
}

// Weights become the gradients of scores, times scale.
DEVICE void pull(float (&weights)[TILE / 2], const float (&pulls)[TILE / 2], float scale,
                 u32 delta) {
    UNROLL
    for (int i = 0; i < TILE / 8; i++) {
        const float2 d = load_shared<float2>(delta + 4 * (8 * i + column_of_thread()));
        UNROLL
        for (int h = 0; h < 2; h++) {
            const int at = 4 * i + 2 * h;
            weights[at] *= scale * (pulls[at] - d.x);
            weights[at + 1] *= scale * (pulls[at + 1] - d.y);
        }
    }
}

// Writes the keys of a group.
DEVICE void finish(const BackwardArguments& a, int number, int group, const float (&dk)[D / 2],
                   const float (&dv)[D / 2], u32 shared) {
    const Item item = item_of(a.items, number);
    const int first = item.line * ROWS + group * TILE;
    const int warp_row = row_of_thread() / 16 * 16;
    const int rows = a.m - first - warp_row;
    if (rows <= 0)
        return;
    const i64 to = ((i64(item.batch) * a.groups + item.head) * a.m + first + warp_row) * D;
    const int left = a.kv_lengths[item.batch] - first - row_of_thread();
    const bool live[2] = {left > 0, left > 8};
    const float share[2] = {1.0f, 1.0f};
    // on the way they lie where the warp's own rows of k and v were
    const u32 own = shared + (group * TILE + warp_row) * PANEL_ROW;
    write_rows(a.dk + to, rows, dk, share, live, own, ROWS * PANEL_ROW);
    write_rows(a.dv + to, rows, dv, share, live, own + OWN_BYTES, ROWS * PANEL_ROW);
}

DEVICE void compute(const BackwardArguments& a, u32 shared, const Barriers& at, int group) {
    float dk[D / 2];
    float dv[D / 2];
    float scores[TILE / 2];
    float pulls[TILE / 2];
    u32 weights[TILE / 16][4];
    u32 own_parity = 0;
    u32 turn = 0;               // of all steps; stage and parity by themselves take two registers
    const u32 keys = shared + group * TILE * PANEL_ROW;
    for (int number = blockIdx.x; number < a.item_count; number += gridDim.x) {
        // registers are scarce: what is not needed at each step is read again at the end
        clear(dk);
        clear(dv);
        int left = item_of(a.items, number).steps;
        if (left > 0) {
            mbarrier_wait(at.own_full, own_parity);
            own_parity ^= 1;
        }
        for (; left > 0; left--) {
            const int stage = turn % STAGES;
            const u32 parity = turn / STAGES & 1;
            const u32 walked = shared + WALKED + stage * STAGE_BYTES;
            const u32 values = shared + ROW_VALUES + stage * VALUES_BYTES;
            const u32 bits = shared + BITS + stage * BITS_BYTES;
            mbarrier_wait(at.full + 8 * stage, parity);
            start_scores(scores, keys, walked);
            start_scores(pulls, keys + OWN_BYTES, walked + TILE_BYTES);
            mbarrier_wait(at.scouted + 8 * stage, parity);
            const Note note = read_note(shared + NOTES + stage * NOTE);
            const float scale = a.scale[note.head];
            wgmma_wait<1>();
            hold(scores);
            weigh(scores, scale * LOG2_E, values);
            if (note.masked)
                hide(scores, bits, group);
            hold(scores);
            wgmma_wait<0>();
            hold(pulls);
            release(at.scored + 8 * stage);
            round_weights(weights, scores);
            if (note.masked)
                mbarrier_wait(at.inspected + 8 * stage, parity);
            hold(dv);
            hold(weights);
            start_sums(dv, weights, walked + TILE_BYTES);
            pull(scores, pulls, scale, values + 4 * TILE);
            if (note.masked)
                hide(scores, bits, group);
            hold(scores);
            wgmma_wait<0>();
            hold(dv);
            hold(weights);
            if (note.masked && told(shared + FOUND + stage * NOTE, INSPECTORS)) {
                u64 vanished[2];
                find_vanished(vanished, weights, 0);
                restore(dv, a, a.walked[1], vanished, number, group, stage, shared);
            }
            round_weights(weights, scores);
            hold(dk);
            hold(weights);
            start_sums(dk, weights, walked);
            wgmma_wait<0>();
            hold(dk);
            hold(weights);
            if (note.masked && told(shared + FOUND + stage * NOTE, INSPECTORS)) {
                const u64 all[2] = {~u64(0), ~u64(0)};
                restore(dk, a, a.walked[0], all, number, group, stage, shared);
            }
            release(at.empty + 8 * stage);
            turn++;
        }
        // products of all its warps have read what results lie in on their way
        barrier_sync(TOGETHER + group, GROUP);
        finish(a, number, group, dk, dv, shared);
        if (item_of(a.items, number).steps > 0) {
            async_proxy_fence();
            release(at.own_empty);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
hopper_backward_keys(const __grid_constant__ BackwardArguments arguments) {
    const u32 shared = shared_base();
    const Barriers at = initialise(shared);
    const int group = int(threadIdx.x) / GROUP - 1;
    if (group < 0) {
        register_decrease<SERVE_REGISTERS>();
        if (threadIdx.x == 0)
            load(arguments, shared, at);
        else if (threadIdx.x >= 2 * WARP)
            inspect_stages(arguments, STAGE_BYTES, shared, at);
        else if (threadIdx.x >= WARP)
            scout(arguments, shared, at);
    } else {
        register_increase<COMPUTE_REGISTERS>();
        compute(arguments, shared, at, group);
    }
}
