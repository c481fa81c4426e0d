// talking_heads_backward_keys.cu -- talking heads, backward: gradients of keys and values.
//
// Keys are the rows: products are k q^T and v dout^T, so that strips are what the sums over queries
// take. Each key has one owner, which goes through all heads in order.
#define LONG_SUMS 1
#include "talking_heads_backward.cuh"

struct KeysArguments {
    Problem problem;        // its lists are of lines of keys
    Operand dout;
    WideOperand dk, dv;
    const Sum* lse;         // (batch, heads, n)
    const Sum* delta;
    int chunks;             // blocks that share the columns of dk and dv
};

// Part of a gradient: columns of one group, and whether they are of dv.
struct Columns {
    int group, column;
    bool of_dv, there;
};

DEVICE Columns columns_of(const Problem& p, int number) {
    const int of_dk = p.k_groups * parts_of(p.d);
    if (number < of_dk)
        return {number / parts_of(p.d), number % parts_of(p.d) * WIDE, false, true};
    number -= of_dk;
    const int group = number / parts_of(p.e);
    return {group, number % parts_of(p.e) * WIDE, true, group < p.v_groups};
}

extern "C" __global__ void __launch_bounds__(THREADS)
talking_heads_backward_keys(const __grid_constant__ KeysArguments a) {
    const Problem& p = a.problem;
    const int lines = (p.m + ROWS - 1) / ROWS;
    Place block;
    block.chunk = blockIdx.x % a.chunks;
    block.first = blockIdx.x / a.chunks % lines * ROWS;
    block.batch = blockIdx.x / a.chunks / lines;
    block.rows = p.kv_lengths[block.batch];
    block.columns = block.first < block.rows ? p.q_lengths[block.batch] : 0;
    Backward work;
    work.begin(p, a.dout, block, true);
    enum { OF_STEP = HEADS * STEP * sizeof(Sum) };
    // of this step and the next
    const u32 lse_rows = work.end;
    const u32 delta_rows = lse_rows + 2 * OF_STEP;

    const auto unit_of = [&](int u) -> Unit {
        const Columns x = columns_of(p, unit_number(block.chunk, u));
        const Operand& from = x.of_dv ? a.dout : p.q;
        const int share = x.of_dv ? p.heads_out / p.v_groups : p.heads_in / p.k_groups;
        const u32 strips = x.of_dv ? work.pulls.strips : work.scores.strips;
        return {from.head(block.batch, x.group * share) + x.column, from.h, from.n,
                (x.of_dv ? p.e : p.d) - x.column, block.columns, strips + x.group * share * STRIP,
                x.there ? share : 0};
    };
    Sums sums[UNITS];
    UNROLL
    for (int u = 0; u < UNITS; u++)
        clear(sums[u]);

    Steps steps;
    steps.begin(p, block);
    int odd = 0;
    const auto first_job = [&] {
        return steps.here() ? work.scores.job(0, steps.column()) : Job{};
    };
    // copies log-sum-exps and deltas of the step's queries
    const auto begin_rows = [&] {
        if (!steps.here())
            return;
        for (int i = threadIdx.x; i < HEADS * STEP; i += THREADS) {
            const int query = steps.column() + i % STEP;
            const bool there = i / STEP < p.heads && query < block.columns;
            const i64 from = there ? (i64(block.batch) * p.heads + i / STEP) * p.n + query : 0;
            const u32 to = odd * OF_STEP + i * sizeof(Sum);
            copy_async<sizeof(Sum)>(lse_rows + to, a.lse + from, there);
            copy_async<sizeof(Sum)>(delta_rows + to, a.delta + from, there);
        }
    };
    begin_rows();
    first_job().begin(work.ring.here());
    commit_copies();
    _Pragma("unroll 1")
    while (steps.here()) {
        const bool masked = steps.note(p, block, work.words);
        const int column = steps.column();
        const u32 own = odd * OF_STEP + own_column() * sizeof(Sum);
        steps.advance(p);
        odd ^= 1;
        begin_rows();
        work.multiply(column, [&] { return unit_of(0).job(0, column); });
        __syncthreads();
        {
            Sum weights[HEADS][OWN], dscores[HEADS][OWN];
            const u32 seen = own_bits(work.words);
            const auto load_at = [&](u32 rows, int s, int o) {
                return load_shared<Sum>(rows + own + (s * STEP + o) * sizeof(Sum));
            };
            work.weights_of(p, weights, seen, [&](int s, int o) {
                return shift_of(load_at(lse_rows, s, o));
            });
            work.gradients_of_weights(p, dscores);
            // over what these were computed from
            mix_weights(weights, seen, work.pulls.strips, p.heads_out, work.w_post, p.b_post);
            differentiate(weights, dscores, p.heads, seen, [&](int s, int o) {
                return load_at(delta_rows, s, o);
            });
            mix_gradients(dscores, work.scores.strips, p.heads_in, work.w_pre);
        }
        __syncthreads();
        // forward: products = q k^T, out_v = mixed_v v
        add_all(sums, work.ring, unit_of, column, work.words, masked, first_job);
        __syncthreads();        // the next products overwrite what was just read
    }
    wait_copies<0>();

    UNROLL
    for (int u = 0; u < UNITS; u++) {
        const Columns x = columns_of(p, unit_number(block.chunk, u));
        if (!x.there)
            continue;
        if (x.of_dv)
            write_unit(a.dv, block, x.group, sums[u], x.column, p.m, p.e, 1);
        else
            write_unit(a.dk, block, x.group, sums[u], x.column, p.m, p.d, p.scale);
    }
}
