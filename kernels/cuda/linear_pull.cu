// linear_pull.cu -- of a normalised output: 1 / denominator, 0 of empty rows; and the gradient of
// the denominator, -(dout . out) / denominator. A warp does a row.
#include "linear.cuh"

struct PullArguments {
    Array dout, out;            // (batch, heads, n, e)
    const Sum* den;             // (batch, heads, n)
    Sum* inverse;               // likewise
    Sum* pull;
    const int* q_lengths;       // (batch,)
    int batch, heads, n, e;
};

extern "C" __global__ void __launch_bounds__(THREADS)
linear_pull(const __grid_constant__ PullArguments a) {
    const i64 line = i64(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (line >= i64(a.batch) * a.heads * a.n)
        return;
    const int row = line % a.n;
    const int head = line / a.n % a.heads;
    const int batch = line / a.n / a.heads;
    const Sum den = row < a.q_lengths[batch] ? a.den[line] : Sum(0);
    Sum sum = 0;
    // what lies in an empty row is never looked at
    if (den != 0)
        for (int column = lane_number(); column < a.e; column += 32)
            sum = times_plus(raw_number(a.dout.token(batch, head, row)[column]),
                             raw_number(a.out.token(batch, head, row)[column]), sum);
    UNROLL
    for (int apart = 16; apart > 0; apart /= 2)
        sum += __shfl_xor_sync(~0u, sum, apart);
    if (lane_number() == 0) {
        // of both the same error, so that in the sum of gradients it is one factor
        const Sum inverse = den == 0 ? Sum(0) : 1 / den;
        a.inverse[line] = inverse;
        a.pull[line] = den == 0 ? Sum(0) : -sum * inverse;
    }
}
