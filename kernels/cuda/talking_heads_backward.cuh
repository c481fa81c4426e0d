// talking_heads_backward.cuh -- what the kernels of the backward of talking heads share: both
// products of all heads, and the gradients of a step's pairs from them.
#pragma once
#include "talking_heads.cuh"

// The work of a block, and where its arrays are in shared memory.
struct Backward {
    Products scores;        // q k^T, or its transpose for a block of keys
    Products pulls;         // dout v^T, likewise
    Ring ring;
    u32 w_pre, w_post;
    u32 words;
    u32 end;                // what is free behind all that

    __device__ __forceinline__ void begin(const Problem& p, const Operand& dout, const Place& block,
                                          bool of_keys) {
        const int k_share = p.heads_in / p.k_groups;
        const int v_share = p.heads_out / p.v_groups;
        if (of_keys) {
            scores.set(block, p.k, k_share, p.q, 1, p.heads_in, p.d);
            pulls.set(block, p.v, v_share, dout, 1, p.heads_out, p.e);
        } else {
            scores.set(block, p.q, 1, p.k, k_share, p.heads_in, p.d);
            pulls.set(block, dout, 1, p.v, v_share, p.heads_out, p.e);
        }
        u32 at = keep(p, scores, shared_base());
        at = keep(p, pulls, at);
        ring = ring_at(p, at);
        scores.strips = at;
        pulls.strips = scores.strips + p.heads_in * STRIP;
        w_pre = pulls.strips + p.heads_out * STRIP;
        w_post = w_pre + p.heads_in * HEADS * sizeof(Sum);
        words = w_post + p.heads_out * HEADS * sizeof(Sum);
        end = words + ROWS * 8;
        load_weights(w_pre, p.w_pre, p.heads_in);
        load_weights(w_post, p.w_post, p.heads_out);
    }

    // Both products, with the step that begins at `column`; as multiply_all.
    template<class Next> __device__ __forceinline__ void multiply(int column, Next next) {
        multiply_all(scores, column, ring, [&] { return pulls.job(0, column); });
        multiply_all(pulls, column, ring, next);
    }

    // The thread's weights, 0 where not seen.
    template<class ShiftAt>
    __device__ __forceinline__ void weights_of(const Problem& p, Sum (&weights)[HEADS][OWN],
                                               u32 seen, ShiftAt shift_at) const {
        mix(weights, scores.strips, p.heads_in, w_pre);
        weigh(p, weights, seen, shift_at);
    }

    // The gradients that weights have: forward: mixed_v = sum_s weights_s w_post[s, v] + b_post[v],
    // out_v = mixed_v v.
    __device__ __forceinline__ void gradients_of_weights(const Problem& p,
                                                         Sum (&dweights)[HEADS][OWN]) const {
        mix(dweights, pulls.strips, p.heads_out, w_post);
    }
};

// Gradients of weights become those of mixed scores, 0 where weights are by `weigh`.
template<class DeltaAt>
DEVICE void differentiate(const Sum (&weights)[HEADS][OWN], Sum (&dweights)[HEADS][OWN], int heads,
                          u32 seen, DeltaAt delta_at) {
    UNROLL
    for (int s = 0; s < HEADS; s++)
        UNROLL
        for (int o = 0; o < OWN; o++) {
            // forward: weight = exp(score - lse)
            const Sum dscore = weights[s][o] * (dweights[s][o] - delta_at(s, o));
            dweights[s][o] = s < heads && (seen >> o & 1) ? dscore : Sum(0);
        }
}

// Gradients of mixed scores become those of products, but for the scale.
DEVICE void mix_gradients(const Sum (&dscores)[HEADS][OWN], u32 strips, int heads, u32 w_pre) {
    _Pragma("unroll AT_ONCE")
    for (int h = 0; h < heads; h++)
        store_own(strips + h * STRIP, mix_back(dscores, h, w_pre));
}

// Adds up what threads with pairs of one row have found, and writes it: (batch, heads, n).
// `space` has room for HEADS x ROWS x ROW_PARTS numbers.
DEVICE void write_row_sums(const Problem& p, const Place& block, Sum (&own)[HEADS], u32 space,
                           Sum* to) {
    UNROLL
    for (int s = 0; s < HEADS; s++) {
        join_lanes([&](int lanes) { own[s] += __shfl_xor_sync(~0u, own[s], lanes); });
        if (speaks())
            store_shared(space + ((s * ROWS + own_row()) * ROW_PARTS + own_part()) * sizeof(Sum),
                         own[s]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.heads * ROWS; i += THREADS) {
        const int query = block.first + i % ROWS;
        if (query >= p.n)
            continue;
        Sum sum = 0;
        UNROLL
        for (int part = 0; part < ROW_PARTS; part++)
            sum += load_shared<Sum>(space + (i * ROW_PARTS + part) * sizeof(Sum));
        to[(i64(block.batch) * p.heads + i / ROWS) * p.n + query] = sum;
    }
}

// Writes the sums of a unit of the gradient of q, k or v: rows of head `head` from the block's first
// on, of `tokens`, times a factor.
DEVICE void write_unit(const WideOperand& to, const Place& block, int head, const Sums& sums,
                       int column, int tokens, int width, Sum factor) {
    UNROLL
    for (int r = 0; r < 2 * SLICES; r++) {
        const int token = block.first + 8 * r + row_of_lane();
        if (token < tokens)
            store_wide_row(to.head(block.batch, head) + token * to.n + column, sums[r / 2],
                           r % 2 * 2, factor, width - column);
    }
}
