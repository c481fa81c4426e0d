// linear_pull.cu -- of a normalised output: 1 / denominator, 0 of empty rows; and the gradient of
// the denominator, -(dout . out) / denominator. LANES lanes do a row.
#include "linear.cuh"

struct PullArguments {
    Array dout, out;            // (batch, heads, n, e)
    const Sum* den;             // (batch, heads, n)
    Sum* inverse;               // likewise
    Sum* pull;
    const int* q_lengths;       // (batch,)
    int batch, heads, n, e;
};

enum { LANES = 8 };

extern "C" __global__ void __launch_bounds__(THREADS)
linear_pull(const __grid_constant__ PullArguments a) {
    const i64 line = i64(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES;
    const bool there = line < i64(a.batch) * a.heads * a.n;
    const int row = there ? line % a.n : 0;
    const int head = there ? line / a.n % a.heads : 0;
    const int batch = there ? line / a.n / a.heads : 0;
    const Sum den = there && row < a.q_lengths[batch] ? a.den[line] : Sum(0);
    Sum sum = 0;
    // what lies in an empty row is never looked at
    if (den != 0)
        for (int column = threadIdx.x % LANES * RAW_CHUNK; column < a.e;
             column += LANES * RAW_CHUNK) {
            RawChunk dout, out;
            dout.all = *(const uint4*)(a.dout.token(batch, head, row) + column);
            out.all = *(const uint4*)(a.out.token(batch, head, row) + column);
            UNROLL
            for (int c = 0; c < RAW_CHUNK; c++)
                if (column + c < a.e)
                    sum = times_plus(raw_number(dout.raw[c]), raw_number(out.raw[c]), sum);
        }
    UNROLL
    for (int apart = LANES / 2; apart > 0; apart /= 2)
        sum += __shfl_xor_sync(~0u, sum, apart);
    if (there && threadIdx.x % LANES == 0) {
        // of both the same error, so that in the sum of gradients it is one factor
        const Sum inverse = den == 0 ? Sum(0) : 1 / den;
        a.inverse[line] = inverse;
        a.pull[line] = den == 0 ? Sum(0) : -sum * inverse;
    }
}
