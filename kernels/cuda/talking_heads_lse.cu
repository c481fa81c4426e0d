// talking_heads_lse.cu -- talking heads, the forward's first walk: the log-sum-exp of each query's
// mixed scores, for all heads of the softmax.
//
// A thread keeps the largest score so far, and the sum of exp(score - largest), of its own pairs,
// which are of one row; those who share the row meet at the end.
#include "talking_heads.cuh"

struct LseArguments {
    Problem problem;
    Sum* lse;               // (batch, heads, n)
};

struct Statistic {
    Sum largest, total;
};

DEVICE void add(Statistic& x, Sum score) {
    if (score == -INFINITE)
        return;
    const bool grows = score > x.largest;
    const Sum share = power((grows ? x.largest - score : score - x.largest) * TO_BASE);
    x.total = grows ? x.total * share + 1 : x.total + share;
    x.largest = grows ? score : x.largest;
}

DEVICE Statistic joined(const Statistic& x, const Statistic& y) {
    const Sum largest = larger(x.largest, y.largest);
    if (largest == -INFINITE)
        return {largest, x.total + y.total};        // 0, or NaN
    return {largest, x.total * power((x.largest - largest) * TO_BASE)
                         + y.total * power((y.largest - largest) * TO_BASE)};
}

extern "C" __global__ void __launch_bounds__(THREADS)
talking_heads_lse(const __grid_constant__ LseArguments a) {
    const Problem& p = a.problem;
    const Place block = place_of_queries(p, 1);
    Products scores;
    scores.set(block, p.q, 1, p.k, p.heads_in / p.k_groups, p.heads_in, p.d);
    u32 at = keep(p, scores, shared_base());
    Ring ring = ring_at(p, at);
    const u32 strips = scores.strips = at;
    const u32 w_pre = strips + p.heads_in * STRIP;
    const u32 statistics = w_pre + p.heads_in * HEADS * sizeof(Sum);
    const u32 words = statistics + HEADS * ROWS * ROW_PARTS * sizeof(Statistic);
    load_weights(w_pre, p.w_pre, p.heads_in);

    Statistic own[HEADS];
    UNROLL
    for (int s = 0; s < HEADS; s++)
        own[s] = {-INFINITE, 0};
    Steps steps;
    steps.begin(p, block);
    const auto first_job = [&] {
        return steps.here() ? scores.job(0, steps.column()) : Job{};
    };
    first_job().begin(ring.here());
    commit_copies();
    _Pragma("unroll 1")
    while (steps.here()) {
        steps.note(p, block, words);
        const int column = steps.column();
        steps.advance(p);
        multiply_all(scores, column, ring, first_job);
        __syncthreads();
        Sum mixed[HEADS][OWN];
        mix(mixed, strips, p.heads_in, w_pre);
        const u32 seen = own_bits(words);
        UNROLL
        for (int s = 0; s < HEADS; s++)
            UNROLL
            for (int o = 0; o < OWN; o++)
                if (seen >> o & 1)
                    add(own[s], mixed[s][o] * p.scale);
        __syncthreads();        // the next products overwrite what was just read
    }
    wait_copies<0>();

    UNROLL
    for (int s = 0; s < HEADS; s++) {
        join_lanes([&](int lanes) {
            const Statistic other = {__shfl_xor_sync(~0u, own[s].largest, lanes),
                                     __shfl_xor_sync(~0u, own[s].total, lanes)};
            own[s] = joined(own[s], other);
        });
        if (speaks())
            store_shared(statistics + ((s * ROWS + own_row()) * ROW_PARTS + own_part())
                         * sizeof(Statistic), own[s]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.heads * ROWS; i += THREADS) {
        const int query = block.first + i % ROWS;
        if (query >= p.n)
            continue;
        const u32 from = statistics + i * ROW_PARTS * sizeof(Statistic);
        Statistic x = load_shared<Statistic>(from);
        UNROLL
        for (int part = 1; part < ROW_PARTS; part++)
            x = joined(x, load_shared<Statistic>(from + part * sizeof(Statistic)));
        a.lse[(i64(block.batch) * p.heads + i / ROWS) * p.n + query]
            = x.total == 0 ? -INFINITE : x.largest + natural_logarithm(x.total);
    }
}
