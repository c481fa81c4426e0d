// talking_heads_delta.cu -- talking heads, the backward's first walk: delta_s = sum_j p_s dp_s of
// each query and head of the softmax. It is no sum over out and dout, as out has mixed weights.
#include "talking_heads_backward.cuh"

struct DeltaArguments {
    Problem problem;
    Operand dout;
    const Sum* lse;         // (batch, heads, n)
    Sum* delta;             // (batch, heads, n)
};

extern "C" __global__ void __launch_bounds__(THREADS)
talking_heads_delta(const __grid_constant__ DeltaArguments a) {
    const Problem& p = a.problem;
    const Place block = place_of_queries(p, 1);
    Backward work;
    work.begin(p, a.dout, block, false);
    const u32 shifts = work.end;
    const u32 space = shifts + HEADS * ROWS * sizeof(Sum);
    load_rows<ROWS>(shifts, p, a.lse, block.batch, block.first, block.rows, INFINITE, shift_of);

    Sum own[HEADS];
    UNROLL
    for (int s = 0; s < HEADS; s++)
        own[s] = 0;
    Steps steps;
    steps.begin(p, block);
    const auto first_job = [&] {
        return steps.here() ? work.scores.job(0, steps.column()) : Job{};
    };
    first_job().begin(work.ring.here());
    commit_copies();
    _Pragma("unroll 1")
    while (steps.here()) {
        steps.note(p, block, work.words);
        const int column = steps.column();
        steps.advance(p);
        work.multiply(column, first_job);
        __syncthreads();
        Sum weights[HEADS][OWN], dweights[HEADS][OWN];
        const u32 seen = own_bits(work.words);
        work.weights_of(p, weights, seen, [&](int s, int) {
            return load_shared<Sum>(shifts + (s * ROWS + own_row()) * sizeof(Sum));
        });
        work.gradients_of_weights(p, dweights);
        UNROLL
        for (int s = 0; s < HEADS; s++)
            UNROLL
            for (int o = 0; o < OWN; o++)
                if (seen >> o & 1)
                    own[s] += weights[s][o] * dweights[s][o];
        __syncthreads();        // the next products overwrite what was just read
    }
    wait_copies<0>();
    write_row_sums(p, block, own, space, a.delta);
}
