// softmax.cuh -- what the kernels of softmax attention share: the problem, and which pairs of a step
// a thread's rows may meet. softmax.py has the same structs as NumPy dtypes.
#pragma once
#include "nonfinite.cuh"
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

DEVICE u64 first_bits(int count) {
    return count >= 64 ? ~u64(0) : count <= 0 ? u64(0) : (u64(1) << count) - 1;
}

// The columns of a tile that a row of it may meet, if `columns` of them are there.
DEVICE u64 bits_of_row(const TileLists& lists, int kind, int row, int columns) {
    const u64 bits = kind >= 0 ? lists.bits[i64(kind) * TILE + row] : kind == FULL ? ~u64(0) : u64(0);
    return bits & first_bits(columns);
}

// The share of exp(x) in exp(x) + exp(y).
DEVICE Sum share_beside(Sum x, Sum y) {
    return x == -INFINITE ? Sum(0) : 1 / (1 + power_of_2((y - x) * LOG2_E));
}

DEVICE Sum log_of_sum(Sum x, Sum y) {
    const Sum most = larger(x, y);
    if (most == -INFINITE)
        return most;
    const Sum sum = power_of_2((x - most) * LOG2_E) + power_of_2((y - most) * LOG2_E);
    return most + log_2(sum) * LN_2;
}
