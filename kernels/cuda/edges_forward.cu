// edges_forward.cu -- out and log-sum-exp of queries, or of pieces of their lists. A warp does a
// query for the HEADS heads of a run: what is read of keys and values serves them all.
#include "edges.cuh"

struct ForwardArguments {
    Problem problem;
    Operand out;            // (batch, heads, n, e)
    Sum* lse;               // (batch, heads, n)
    Sum* parts;             // (parts, width): out of each piece
    Sum* part_lse;          // (parts,)
    int width;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
edges_forward(const __grid_constant__ ForwardArguments a) {
    const Problem& p = a.problem;
    const Run run = p.runs[blockIdx.x / p.blocks];
    Task task;
    if (!find_query(p, run.list, task))
        return;

    Numbers<D_NUMBERS> q[HEADS];
    Numbers<E_NUMBERS> acc[HEADS];
    Sum top[HEADS], total[HEADS];
    UNROLL
    for (int r = 0; r < HEADS; r++) {
        Chunks<D_CHUNKS> row;
        read_row(row, p.q.head(run.item, run.head + r) + task.of.row * p.q.n, p.d, r < run.count);
        unpack_row(q[r], row, p.scale);
        clear(acc[r]);
        top[r] = -INFINITE;
        total[r] = 0;
    }

    _Pragma("unroll 1")
    for (int from = 0; from < task.of.count; from += STEP) {
        Listed listed;
        read_listed(listed, p, run, task, from);
        UNROLL
        for (int r = 0; r < HEADS; r++) {
            Sum score[AT_ONCE];
            bool seen[AT_ONCE];
            Sum most = top[r];
            UNROLL
            for (int u = 0; u < AT_ONCE; u++) {
                Sum slope;
                seen[u] = listed.there[u] && r < run.count;
                score[u] = score_of(p, listed, r, u, dot(q[r], listed.k[u]), slope, seen[u]);
                if (seen[u])
                    most = larger(most, score[u]);
            }
            if (most > top[r]) {
                const Sum kept = natural_power(top[r] - most);
                total[r] *= kept;
                UNROLL
                for (int i = 0; i < E_NUMBERS; i++)
                    acc[r].x[i] *= kept;
                top[r] = most;
            }
            const Sum shift = most == -INFINITE ? Sum(0) : most;
            UNROLL
            for (int u = 0; u < AT_ONCE; u++) {
                // what is not seen may hold NaN
                if (!seen[u])
                    continue;
                const Sum weight = natural_power(score[u] - shift);
                total[r] += weight;
                add_row(acc[r], weight, listed.v[u]);
            }
        }
    }

    UNROLL
    for (int r = 0; r < HEADS; r++) {
        Sum most = top[r];
        UNROLL
        for (int apart = LANES; apart < 32; apart *= 2)
            most = larger(most, __shfl_xor_sync(~0u, most, apart));
        const Sum shift = most == -INFINITE ? Sum(0) : most;
        const Sum kept = natural_power(top[r] - shift);
        const Sum all = sum_of_teams(total[r] * kept);
        // nothing was seen, or with scores of -inf alone, which is the same
        const bool empty = all == 0;
        const Sum share = 1 / all;
        UNROLL
        for (int i = 0; i < E_NUMBERS; i++) {
            const Sum sum = sum_of_teams(acc[r].x[i] * kept);
            acc[r].x[i] = empty ? Sum(0) : sum * share;
        }
        if (r >= run.count)
            continue;
        const i64 head = i64(run.item) * p.heads + run.head + r;
        Sum* lse = a.lse + head * p.n + task.of.row;
        if (task.slot < 0) {
            Stored* out = a.out.head(run.item, run.head + r) + task.of.row * a.out.n;
            write_row<E_CHUNKS>(out, acc[r], p.e);
        } else {
            const i64 part = p.pieces.part_at[head] + task.slot;
            write_part<E_CHUNKS>(a.parts + part * a.width, acc[r], p.e);
            lse = a.part_lse + part;
        }
        if (lane_number() == 0)
            *lse = empty ? -INFINITE : shift + natural_logarithm(all);
    }
}
