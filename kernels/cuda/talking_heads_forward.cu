// talking_heads_forward.cu -- talking heads, the forward's second walk: weights from the
// log-sum-exps, mixed once more, times values.
#include "talking_heads.cuh"

struct ForwardArguments {
    Problem problem;
    Operand out;
    const Sum* lse;         // (batch, heads, n)
    int chunks;             // blocks that share the columns of out
};

extern "C" __global__ void __launch_bounds__(THREADS)
talking_heads_forward(const __grid_constant__ ForwardArguments a) {
    const Problem& p = a.problem;
    const Place block = place_of_queries(p, a.chunks);
    Products scores;
    scores.set(block, p.q, 1, p.k, p.heads_in / p.k_groups, p.heads_in, p.d);
    u32 at = keep(p, scores, shared_base());
    Ring ring = ring_at(p, at);
    const u32 strips = scores.strips = at;
    const u32 w_pre = strips + max(p.heads_in, p.heads_out) * STRIP;
    const u32 w_post = w_pre + p.heads_in * HEADS * sizeof(Sum);
    const u32 shifts = w_post + p.heads_out * HEADS * sizeof(Sum);
    const u32 words = shifts + HEADS * ROWS * sizeof(Sum);
    load_weights(w_pre, p.w_pre, p.heads_in);
    load_weights(w_post, p.w_post, p.heads_out);
    load_rows<ROWS>(shifts, p, a.lse, block.batch, block.first, block.rows, INFINITE, shift_of);

    const auto unit_of = [&](int u) -> Unit {
        const int number = unit_number(block.chunk, u);
        const int head = number / parts_of(p.e);
        const int column = number % parts_of(p.e) * WIDE;
        const Stored* v = p.v.head(block.batch, head / (p.heads_out / p.v_groups));
        return {v + column, 0, p.v.n, p.e - column, block.columns, strips + head * STRIP,
                head < p.heads_out};
    };
    Sums sums[UNITS];
    UNROLL
    for (int u = 0; u < UNITS; u++)
        clear(sums[u]);

    Steps steps;
    steps.begin(p, block);
    const auto first_job = [&] {
        return steps.here() ? scores.job(0, steps.column()) : Job{};
    };
    first_job().begin(ring.here());
    commit_copies();
    _Pragma("unroll 1")
    while (steps.here()) {
        const bool masked = steps.note(p, block, words);
        const int column = steps.column();
        steps.advance(p);
        multiply_all(scores, column, ring, [&] { return unit_of(0).job(0, column); });
        __syncthreads();
        {
            Sum weights[HEADS][OWN];
            mix(weights, strips, p.heads_in, w_pre);
            const u32 seen = own_bits(words);
            weigh(p, weights, seen, [&](int s, int) {
                return load_shared<Sum>(shifts + (s * ROWS + own_row()) * sizeof(Sum));
            });
            mix_weights(weights, seen, strips, p.heads_out, w_post, p.b_post);
        }
        __syncthreads();
        add_all(sums, ring, unit_of, column, words, masked, first_job);
        __syncthreads();        // the next products overwrite what was just read
    }
    wait_copies<0>();

    UNROLL
    for (int u = 0; u < UNITS; u++) {
        const int number = unit_number(block.chunk, u);
        const int head = number / parts_of(p.e);
        const int column = number % parts_of(p.e) * WIDE;
        if (head >= p.heads_out)
            continue;
        UNROLL
        for (int r = 0; r < 2 * SLICES; r++) {
            const int query = block.first + 8 * r + row_of_lane();
            if (query < p.n)
                store_row(a.out.head(block.batch, head) + query * a.out.n + column, sums[u][r / 2],
                          r % 2 * 2, 1, p.e - column);
        }
    }
}
