// softmax_delta.cu -- rowsum(dout * out) - dlse, and 0 in rows that see no key. A warp does a row.
#include "softmax.cuh"

struct DeltaArguments {
    Operand dout, out;      // (batch, heads, n, e)
    const Sum* lse;         // (batch, heads, n)
    const Sum* dlse;        // likewise, or 0
    Sum* delta;             // likewise
    int batch, heads, n, e;
};

extern "C" __global__ void __launch_bounds__(THREADS)
softmax_delta(const __grid_constant__ DeltaArguments a) {
    const i64 row = i64(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    if (row >= i64(a.batch) * a.heads * a.n)
        return;
    const int query = row % a.n;
    const int head = row / a.n % a.heads;
    const int batch = row / a.n / a.heads;
    const bool seen = a.lse[row] != -INFINITE;
    const Stored* dout = a.dout.head(batch, head) + query * a.dout.n;
    const Stored* out = a.out.head(batch, head) + query * a.out.n;
    Sum sum = 0;
    // what lies in a row that sees no key is never looked at
    if (seen)
        for (int column = lane_number(); column < a.e; column += 32)
            sum = times_plus(number(dout[column]), number(out[column]), sum);
    UNROLL
    for (int apart = 16; apart > 0; apart /= 2)
        sum += __shfl_xor_sync(~0u, sum, apart);
    if (lane_number() == 0)
        a.delta[row] = seen ? sum - (a.dlse ? a.dlse[row] : Sum(0)) : Sum(0);
}
