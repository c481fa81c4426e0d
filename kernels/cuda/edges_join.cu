// edges_join.cu -- puts together what pieces of a row's list found: sums, or, where they have
// log-sum-exps, outputs that each piece divided by its own total. A block does a row, a thread
// pairs of columns; the order is that of the pieces.
#include "tile.cuh"

struct Divided {
    int row, first, last;       // its pieces, counted in its line: `first` to `last` - 1
};

struct JoinArguments {
    const Divided* divided;
    const i64* start;           // (lines + 1,): offsets into `divided`
    const int* line;            // (batch, heads)
    const i64* part_at;         // (batch, heads): where the sums of the line's first piece are
    const Sum* parts;           // (parts, width)
    const Sum* part_lse;        // (parts,), or 0
    Operand result;             // (batch, heads, n, columns)
    Sum* lse;                   // (batch, heads, n), or 0
    int heads, n, width, columns;
    int most;                   // rows of a line
};

extern "C" __global__ void __launch_bounds__(THREADS)
edges_join(const __grid_constant__ JoinArguments a) {
    const int head = blockIdx.x / a.most;
    const int line = a.line[head];
    const i64 at = a.start[line] + blockIdx.x % a.most;
    if (at >= a.start[line + 1])
        return;
    const Divided it = a.divided[at];
    const i64 first_part = a.part_at[head];
    const Sum* part_lse = a.part_lse + first_part;
    Sum shift = 0;
    Sum factor = 1;
    if (a.lse) {
        Sum most = -INFINITE;
        for (int part = it.first; part < it.last; part++)
            most = larger(most, part_lse[part]);
        shift = most == -INFINITE ? Sum(0) : most;
        Sum total = 0;
        for (int part = it.first; part < it.last; part++)
            total += natural_power(part_lse[part] - shift);
        factor = total == 0 ? Sum(0) : 1 / total;
        if (threadIdx.x == 0)
            a.lse[i64(head) * a.n + it.row] = total == 0 ? -INFINITE
                                                         : shift + natural_logarithm(total);
    }
    Stored* result = a.result.head(head / a.heads, head % a.heads) + it.row * a.result.n;
    for (int column = 2 * threadIdx.x; column < a.columns; column += 2 * THREADS) {
        const Sum* own = a.parts + first_part * a.width + column;
        Sum sums[2] = {0, 0};
        for (int part = it.first; part < it.last; part++) {
            const Sum share = a.lse ? natural_power(part_lse[part] - shift) * factor : factor;
            UNROLL
            for (int i = 0; i < 2; i++)
                sums[i] = times_plus(share, own[i64(part) * a.width + i], sums[i]);
        }
        store_pair(result + column, sums[0], sums[1]);
    }
}
