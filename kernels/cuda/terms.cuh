// terms.cuh -- what is added to the products q.k before the exponential, and what multiplies it.
//
//     scores = scale q.k -> softcap -> + bias + offsets -> x gate, mask
//
// A kernel is built for those in TERMS. It may be built for more than a problem has: what is not
// there is known by its pointer, or its 0.
#pragma once
#include "element.cuh"
#include "philox.cuh"

#define SOFTCAP 1
#define BIAS 2
#define OFFSETS 4
#define GATE 8
#define DROPOUT 16
#define HAS(term) (TERMS & (term))

// An array (b, h, n, m) that broadcasts over the scores: strides in numbers, 0 where it has 1; batch
// item B reads row item[B].
struct Term {
    const Sum* at;
    const int* item;
    i64 b, h, n, m;
};

struct Scores {
    const Sum* scale;           // (heads,)
    Sum softcap;                // 0: none
    Term bias;                  // at 0: none
    const Sum* offsets;         // (1 or heads, offsets_width), 0: none
    i64 offsets_h;
    int offsets_width, offset_origin;
    Term gate;
    int gate_block;             // query i and key j read [i / gate_block, j / gate_block]
    int gate_shift;
    Sum gate_ramp;              // not 0: the gate's array holds spans
    int gate_width;             // not 0: the gate's array is a table by offset, so wide
    u32 threshold;              // not 0: weights whose word is below are dropped
    u32 seed_low, seed_high;
    Sum keep;                   // what multiplies the others
    const int* q_positions;
    i64 q_positions_b;
    const int* k_positions;
    i64 k_positions_b;
    const int* streams;
    i64 streams_b;
};

// What the pairs of one query have in common.
struct QueryOfTerms {
    int batch, head, query;

    __device__ __forceinline__ int position(const Scores& s) const {
        return s.q_positions[batch * s.q_positions_b + query];
    }
};

DEVICE int key_position(const Scores& s, int batch, int key) {
    return s.k_positions[batch * s.k_positions_b + key];
}

DEVICE Sum read_term(const Term& term, const QueryOfTerms& at, int row, int column) {
    return term.at[term.item[at.batch] * term.b + at.head * term.h + row * term.n
                   + column * term.m];
}

// The score of a pair in logs to the base, from its product; `slope` is d softcapped / d scaled. The
// pair is `hidden` if a bias of -inf masks it.
DEVICE Sum score_of(const Scores& s, const QueryOfTerms& at, int key, Sum product, Sum scale,
                    Sum& slope, bool& hidden) {
    Sum x = product * scale;
    slope = 1;
    if (HAS(SOFTCAP) && s.softcap > 0) {
        const Sum bent = hyperbolic_tangent(x / s.softcap);
        slope = 1 - bent * bent;
        x = s.softcap * bent;
    }
    if (HAS(BIAS) && s.bias.at) {
        const Sum bias = read_term(s.bias, at, at.query, key);
        hidden |= bias == -INFINITE;
        x += bias;
    }
    if (HAS(OFFSETS) && s.offsets) {
        const int column = key_position(s, at.batch, key) - at.position(s) - s.offset_origin;
        // masked pairs may lie outside the table
        if (column >= 0 && column < s.offsets_width)
            x += s.offsets[at.head * s.offsets_h + column];
    }
    return x * TO_BASE;
}

// The gate of a pair; `open` is whether a ramp rises there, as its gradient needs.
DEVICE Sum gate_of(const Scores& s, const QueryOfTerms& at, int key, bool& rises) {
    rises = true;
    if (s.gate_width) {
        const int column = key_position(s, at.batch, key) - at.position(s) - s.offset_origin;
        const bool inside = column >= 0 && column < s.gate_width;
        return inside ? read_term(s.gate, at, 0, column) : Sum(0);
    }
    if (s.gate_ramp > 0) {
        const int distance = at.position(s) - key_position(s, at.batch, key) - s.gate_shift;
        // the difference first: span and distance may be large and close
        const Sum over = read_term(s.gate, at, at.query, 0) - Sum(distance);
        const Sum gate = (over + s.gate_ramp) / s.gate_ramp;
        rises = gate > 0 && gate < 1;
        return gate < 0 ? Sum(0) : gate > 1 ? Sum(1) : gate;
    }
    return read_term(s.gate, at, at.query / s.gate_block, key / s.gate_block);
}

// 1 / (1 - dropout) where the weight of a pair stays, else 0.
DEVICE Sum kept(const Scores& s, const QueryOfTerms& at, int key) {
    const u32 position = key_position(s, at.batch, key);
    const u32 stream = s.streams[at.batch * s.streams_b + at.query];
    const uint4 words = philox(u32(int(position) >> 2), at.position(s), at.head, stream, s.seed_low,
                               s.seed_high);
    const u32 lane = position & 3;
    const u32 word = lane == 0 ? words.x : lane == 1 ? words.y : lane == 2 ? words.z : words.w;
    return word >= s.threshold ? s.keep : Sum(0);
}
