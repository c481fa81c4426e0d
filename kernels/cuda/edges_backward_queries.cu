// edges_backward_queries.cu -- gradients of queries and of the bias, and for each edge what
// edges_backward_keys.cu sums. A warp does a query for the HEADS heads of a run.
#include "edges.cuh"
#include "edges_kept.cuh"

struct QueriesArguments {
    Problem problem;
    Operand dout, out;      // (batch, heads, n, e)
    Operand dq;             // (batch, heads, n, d)
    const Sum* lse;         // (batch, heads, n)
    const Sum* dlse;        // likewise, or 0
    Sum* dbias;             // or 0; by item, head and edge
    i64 dbias_b, dbias_h;
    Kept* kept;
    const i64* kept_at;     // (batch, heads): where the edges of a head's list begin in `kept`
    Sum* parts;             // (parts, width): dq of each piece
    int width;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
edges_backward_queries(const __grid_constant__ QueriesArguments a) {
    const Problem& p = a.problem;
    const Run run = p.runs[blockIdx.x / p.blocks];
    Task task;
    if (!find_query(p, run.list, task))
        return;
    const i64 begin = p.start[i64(run.list) * (p.n + 1)];

    Numbers<D_NUMBERS> q[HEADS], dq[HEADS];
    Numbers<E_NUMBERS> dout[HEADS];
    Sum lse[HEADS], delta[HEADS];
    UNROLL
    for (int r = 0; r < HEADS; r++) {
        const i64 row = (i64(run.item) * p.heads + run.head + r) * p.n + task.of.row;
        lse[r] = r < run.count ? a.lse[row] : -INFINITE;
        // what lies in a row that sees no key is never looked at
        const bool live = lse[r] != -INFINITE;
        Chunks<D_CHUNKS> own_q;
        Chunks<E_CHUNKS> own_out, own_dout;
        read_row(own_q, p.q.head(run.item, run.head + r) + task.of.row * p.q.n, p.d, live);
        read_row(own_out, a.out.head(run.item, run.head + r) + task.of.row * a.out.n, p.e, live);
        read_row(own_dout, a.dout.head(run.item, run.head + r) + task.of.row * a.dout.n, p.e, live);
        unpack_row(q[r], own_q, p.scale);
        unpack_row(dout[r], own_dout, Sum(1));
        clear(dq[r]);
        delta[r] = sum_of_team(dot(dout[r], own_out));
        if (live && a.dlse)
            delta[r] -= a.dlse[row];
    }

    _Pragma("unroll 1")
    for (int from = 0; from < task.of.count; from += STEP) {
        Listed listed;
        read_listed(listed, p, run, task, from);
        UNROLL
        for (int r = 0; r < HEADS; r++) {
            const i64 head = i64(run.item) * p.heads + run.head + r;
            UNROLL
            for (int u = 0; u < AT_ONCE; u++) {
                Sum slope;
                bool seen = listed.there[u] && lse[r] != -INFINITE;
                const i64 edge = task.first + listed.entry[u];
                const Sum score = score_of(p, listed, r, u, dot(q[r], listed.k[u]), slope, seen);
                // forward: out = p v
                const Sum pull = sum_of_team(dot(dout[r], listed.v[u]));
                // forward: p = exp(score - lse)
                const Sum weight = natural_power(score - lse[r]);
                const Sum dscore = seen ? weight * (pull - delta[r]) : Sum(0);
                // forward: score = softcap tanh(product / softcap) + bias
                const Sum dproduct = dscore == 0 ? Sum(0) : dscore * slope;
                if (listed.there[u] && r < run.count && lane_of_team() == 0) {
                    const Kept kept = {seen ? weight : Sum(NOT_SEEN), dproduct};
                    a.kept[a.kept_at[head] + edge - begin] = kept;
#if BIAS
                    if (a.dbias)
                        a.dbias[run.item * a.dbias_b + (run.head + r) * a.dbias_h + edge] = dscore;
#endif
                }
                // forward: product = (scale q) k
                if (seen)
                    add_row(dq[r], dproduct, listed.k[u]);
            }
        }
    }

    if (!a.dq.at)
        return;
    UNROLL
    for (int r = 0; r < HEADS; r++) {
        UNROLL
        for (int i = 0; i < D_NUMBERS; i++)
            dq[r].x[i] = p.scale * sum_of_teams(dq[r].x[i]);
        if (r >= run.count)
            continue;
        const i64 head = i64(run.item) * p.heads + run.head + r;
        if (task.slot < 0) {
            Stored* to = a.dq.head(run.item, run.head + r) + task.of.row * a.dq.n;
            write_row<D_CHUNKS>(to, dq[r], p.d);
        } else {
            const i64 part = p.pieces.part_at[head] + task.slot;
            write_part<D_CHUNKS>(a.parts + part * a.width, dq[r], p.d);
        }
    }
}
