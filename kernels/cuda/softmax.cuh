// softmax.cuh -- what the kernels of softmax attention share: the problem, and which pairs of a step
// a thread's rows may meet. softmax.py has the same structs as NumPy dtypes.
#pragma once
#include "nonfinite.cuh"
#include "online.cuh"
#include "terms.cuh"
#include "walk.cuh"

struct Problem {
    Operand q, k, v;
    TileLists lists;            // lines of queries, or of keys for kernels that own keys
    const int* q_lengths;       // (batch,)
    const int* kv_lengths;
    int batch, heads, groups, n, m, d, e;
    Scores scores;
};

// The share of exp(x) in exp(x) + exp(y).
DEVICE Sum share_beside(Sum x, Sum y) {
    return x == -INFINITE ? Sum(0) : 1 / (1 + natural_power(y - x));
}

DEVICE Sum log_of_sum(Sum x, Sum y) {
    const Sum most = larger(x, y);
    if (most == -INFINITE)
        return x + y;           // the larger of NaN and a number is the number
    return most + natural_logarithm(natural_power(x - most) + natural_power(y - most));
}

// What a pair of the backward comes to.
struct Pair {
    Sum weight;         // as it met v
    Sum dscore;         // of the softcapped score, as bias and offsets saw it
    Sum dgate;
    Sum slope;          // d softcapped / d scaled
    bool seen;          // whether q, k, v and dout meet through it
};

// `product` is q.k, `pull` is dout.v; `shift` is that of the row. The pair may be `allowed` by mask
// and lengths; if not, nothing of it is looked at.
DEVICE Pair pair_of(const Scores& s, const QueryOfTerms& query, int key, bool allowed, Sum product,
                    Sum scale, Sum shift, Sum pull, Sum delta) {
    Pair pair = {0, 0, 0, 1, allowed};
#if TERMS
    if (!allowed)
        return pair;
    pair.seen = false;
    bool hidden = false;
    Sum slope;                  // of what is hidden it may be NaN
    const Sum score = score_of(s, query, key, product, scale, slope, hidden);
    if (hidden)
        return pair;
    Sum weight = power((score - shift) * TO_BASE);
    Sum keep = 1;
    if (HAS(DROPOUT) && s.threshold) {
        // forward: out = (weight * keep) v
        keep = kept(s, query, key);
        pull *= keep;
    }
    pull -= delta;
    if (HAS(GATE) && s.gate.at) {
        // forward: weight = gate exp(score - lse)
        bool rises;
        const Sum gate = gate_of(s, query, key, rises);
        pair.dgate = rises ? weight * pull : Sum(0);
        if (gate == 0)
            return pair;
        weight *= gate;
    }
    pair.seen = true;
    pair.slope = slope;
    pair.dscore = weight * pull;
    pair.weight = weight * keep;
#else
    const Sum weight = power(times_plus(product, scale, -shift) * TO_BASE);
    pair.weight = allowed ? weight : Sum(0);
    pair.dscore = allowed ? weight * (pull - delta) : Sum(0);
#endif
    return pair;
}
