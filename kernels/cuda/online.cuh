// online.cuh -- softmax of rows whose scores come some columns at a time, in a warp's products.
#pragma once
#include "element.cuh"

// What is taken from a row's scores before the exponential. A row that sees no key has weights of 0.
DEVICE Sum shift_of(Sum lse) {
    return lse == -INFINITE ? INFINITE : lse;
}

// What a thread keeps of its two rows while the warp walks the keys.
template<int WIDTH> struct Online {
    Sum sums[1][WIDTH / 8][4];
    Sum largest[2];
    Sum total[2];           // of the thread's columns
};

// Scores of row h become weights; sums and totals shrink where the row's largest score has grown.
template<int TILES, int WIDTH>
DEVICE void weigh(Sum (&scores)[TILES][4], Online<WIDTH>& x, int h) {
    const Sum before = x.largest[h];
    Sum largest = before;
    UNROLL
    for (int i = 0; i < TILES; i++)
        largest = larger(largest, larger(scores[i][2 * h], scores[i][2 * h + 1]));
    largest = larger(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = larger(largest, __shfl_xor_sync(~0u, largest, 2));
    x.largest[h] = largest;
    const Sum base = largest == -INFINITE ? Sum(0) : largest;
    const Sum decay = before == -INFINITE ? Sum(0) : power((before - base) * TO_BASE);
    UNROLL
    for (int i = 0; i < WIDTH / 8; i++) {
        x.sums[0][i][2 * h] *= decay;
        x.sums[0][i][2 * h + 1] *= decay;
    }
    Sum total = 0;
    UNROLL
    for (int i = 0; i < TILES; i++)
        UNROLL
        for (int e = 0; e < 2; e++) {
            Sum& weight = scores[i][2 * h + e];
            weight = power((weight - base) * TO_BASE);
            total += weight;
        }
    x.total[h] = x.total[h] * decay + total;
}
