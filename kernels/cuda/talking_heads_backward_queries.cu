// talking_heads_backward_queries.cu -- talking heads, backward: gradients of queries.
#include "talking_heads_backward.cuh"

struct QueriesArguments {
    Problem problem;
    Operand dout;
    WideOperand dq;
    const Sum* lse;         // (batch, heads, n)
    const Sum* delta;
    int chunks;             // blocks that share the columns of dq
};

extern "C" __global__ void __launch_bounds__(THREADS)
talking_heads_backward_queries(const __grid_constant__ QueriesArguments a) {
    const Problem& p = a.problem;
    const Place block = place_of_queries(p, a.chunks);
    Backward work;
    work.begin(p, a.dout, block, false);
    const u32 shifts = work.end;
    const u32 deltas = shifts + HEADS * ROWS * sizeof(Sum);
    load_rows<ROWS>(shifts, p, a.lse, block.batch, block.first, block.rows, INFINITE, shift_of);
    load_rows<ROWS>(deltas, p, a.delta, block.batch, block.first, block.rows, 0,
                    [](Sum x) { return x; });

    const auto unit_of = [&](int u) -> Unit {
        const int number = unit_number(block.chunk, u);
        const int head = number / parts_of(p.d);
        const int column = number % parts_of(p.d) * WIDE;
        const Stored* k = p.k.head(block.batch, head / (p.heads_in / p.k_groups));
        return {k + column, 0, p.k.n, p.d - column, block.columns, work.scores.strips + head * STRIP,
                head < p.heads_in};
    };
    Sums dq[UNITS];
    UNROLL
    for (int u = 0; u < UNITS; u++)
        clear(dq[u]);

    Steps steps;
    steps.begin(p, block);
    const auto first_job = [&] {
        return steps.here() ? work.scores.job(0, steps.column()) : Job{};
    };
    first_job().begin(work.ring.here());
    commit_copies();
    _Pragma("unroll 1")
    while (steps.here()) {
        const bool masked = steps.note(p, block, work.words);
        const int column = steps.column();
        steps.advance(p);
        work.multiply(column, [&] { return unit_of(0).job(0, column); });
        __syncthreads();
        {
            Sum weights[HEADS][OWN], dscores[HEADS][OWN];
            const u32 seen = own_bits(work.words);
            work.weights_of(p, weights, seen, [&](int s, int) {
                return load_shared<Sum>(shifts + (s * ROWS + own_row()) * sizeof(Sum));
            });
            work.gradients_of_weights(p, dscores);
            differentiate(weights, dscores, p.heads, seen, [&](int s, int) {
                return load_shared<Sum>(deltas + (s * ROWS + own_row()) * sizeof(Sum));
            });
            mix_gradients(dscores, work.scores.strips, p.heads_in, work.w_pre);
        }
        __syncthreads();
        // forward: products = q k^T
        add_all(dq, work.ring, unit_of, column, work.words, masked, first_job);
        __syncthreads();        // the next products overwrite what was just read
    }
    wait_copies<0>();

    UNROLL
    for (int u = 0; u < UNITS; u++) {
        const int number = unit_number(block.chunk, u);
        const int head = number / parts_of(p.d);
        if (head < p.heads_in)
            write_unit(a.dq, block, head, dq[u], number % parts_of(p.d) * WIDE, p.n, p.d,
                       p.scale);
    }
}
