// softmax_join.cu -- joins what the splits of softmax_forward.cu found: partial outputs, each divided
// by its own total, and their log-sum-exps. A warp does a row.
#include "softmax.cuh"

struct JoinArguments {
    const Sum* wide_out;    // (splits, rows, width)
    const Sum* split_lse;   // (splits, rows)
    Operand out;            // (batch, heads, n, e)
    Sum* out_as_sum;        // (rows, width) where not 0: instead of out
    Sum* lse;               // (rows,)
    const Sum* sinks;       // (heads,), or 0
    int splits, batch, heads, n, e, width;
};

extern "C" __global__ void __launch_bounds__(THREADS)
softmax_join(const __grid_constant__ JoinArguments a) {
    const i64 rows = i64(a.batch) * a.heads * a.n;
    const i64 row = i64(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    if (row >= rows)
        return;
    const int query = row % a.n;
    const int head = row / a.n % a.heads;
    const int batch = row / a.n / a.heads;

    Sum lse = a.sinks ? a.sinks[head] : -INFINITE;
    for (int split = 0; split < a.splits; split++)
        lse = log_of_sum(lse, a.split_lse[split * rows + row]);
    if (lane_number() == 0)
        a.lse[row] = lse;
    for (int column = 2 * lane_number(); column < a.e; column += 64) {
        Sum sums[2] = {0, 0};
        for (int split = 0; split < a.splits; split++) {
            const Sum own = a.split_lse[split * rows + row];
            if (own == -INFINITE)
                continue;
            const Sum share = power((own - lse) * TO_BASE);
            const Sum* from = a.wide_out + (split * rows + row) * a.width + column;
            sums[0] += share * from[0];
            sums[1] += share * from[1];
        }
        if (a.out_as_sum) {
            a.out_as_sum[row * a.width + column] = sums[0];
            a.out_as_sum[row * a.width + column + 1] = sums[1];
        } else {
            store_pair(a.out.head(batch, head) + query * a.out.n + column, sums[0], sums[1]);
        }
    }
}
