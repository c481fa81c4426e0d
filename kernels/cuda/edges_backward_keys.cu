// edges_backward_keys.cu -- gradients of keys and values: sums over the queries that list a key, of
// what edges_backward_queries.cu kept. A warp does a key for all heads of its group, one after the
// other.
#include "edges.cuh"
#include "edges_kept.cuh"

struct KeysArguments {
    Operand q;              // (batch, heads, n, d)
    Operand dout;           // (batch, heads, n, e)
    Operand dk;             // (batch, groups, m, d), or 0 with q
    Operand dv;             // (batch, groups, m, e)
    const i64* start;       // (lists, m + 1): offsets into `query` and `edge`
    const int* query;
    const int* edge;        // which edge of its list it is
    const int* list;        // (batch, heads)
    const int* line;        // (batch, groups)
    const Kept* kept;
    const i64* kept_at;     // (batch, heads)
    Pieces pieces;          // lines are the lists of a group's heads
    Sum* dk_parts;          // (parts, dk_width): of each piece
    Sum* dv_parts;
    Sum scale;
    int dk_width, dv_width, heads, groups, m, d, e;
    int blocks;             // of threads, for each group
};

// Where the entries of a key begin in the list of a head, and where they end.
DEVICE const i64* entries_of(const KeysArguments& a, i64 head, int key) {
    return a.start + i64(a.list[head]) * (a.m + 1) + key;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
edges_backward_keys(const __grid_constant__ KeysArguments a) {
    const int pair = blockIdx.x / a.blocks;
    const int item = pair / a.groups;
    const int group = pair % a.groups;
    const int share = a.heads / a.groups;
    const i64 first_head = i64(pair) * share;
    const int number = task_number(a.blocks);
    Task task;
    if (number < a.pieces.slots) {
        if (!find_piece(a.pieces, a.line[pair], number, task))
            return;
    } else {
        task.of = {number - a.pieces.slots, 0, 0, 0};
        task.slot = -1;
        if (task.of.row >= a.m)
            return;
        for (int r = 0; r < share; r++) {
            const i64* entries = entries_of(a, first_head + r, task.of.row);
            task.of.count += int(entries[1] - entries[0]);
        }
        if (task.of.count > a.pieces.most)
            return;
    }

    Numbers<D_NUMBERS> dk;
    Numbers<E_NUMBERS> dv;
    clear(dk);
    clear(dv);
    int skipped = task.of.skipped;
    int left = task.of.count;
    _Pragma("unroll 1")
    for (int r = task.of.member; left > 0; r++) {
        const i64* entries = entries_of(a, first_head + r, task.of.row);
        const i64 first = entries[0] + skipped;
        const int count = int(min(entries[1] - first, i64(left)));
        skipped = 0;
        left -= count;
        const Stored* q = a.q.head(item, group * share + r);
        const Stored* dout = a.dout.head(item, group * share + r);
        const Kept* kept = a.kept + a.kept_at[first_head + r];
        const int* queries = a.query + first;
        const int* edges = a.edge + first;
        _Pragma("unroll 1")
        for (int from = 0; from < count; from += STEP) {
            bool there[AT_ONCE];
            i64 query[AT_ONCE];
            int edge[AT_ONCE];
            UNROLL
            for (int u = 0; u < AT_ONCE; u++) {
                const int entry = from + u * TEAMS + team_number();
                there[u] = entry < count;
                query[u] = there[u] ? queries[entry] : 0;
                edge[u] = there[u] ? edges[entry] : 0;
            }
            Kept own[AT_ONCE];
            Chunks<D_CHUNKS> q_row[AT_ONCE];
            Chunks<E_CHUNKS> dout_row[AT_ONCE];
            UNROLL
            for (int u = 0; u < AT_ONCE; u++) {
                own[u] = {NOT_SEEN, 0};
                if (there[u])
                    own[u] = kept[edge[u]];
                read_row(q_row[u], q + query[u] * a.q.n, a.d, there[u]);
                read_row(dout_row[u], dout + query[u] * a.dout.n, a.e, there[u]);
            }
            UNROLL
            for (int u = 0; u < AT_ONCE; u++) {
                if (own[u].weight == NOT_SEEN)
                    continue;
                // forward: out = p v
                add_row(dv, own[u].weight, dout_row[u]);
                // forward: product = scale (q k)
                add_row(dk, own[u].dproduct, q_row[u]);
            }
        }
    }

    sum_teams(dk);
    sum_teams(dv);
    UNROLL
    for (int i = 0; i < D_NUMBERS; i++)
        dk.x[i] *= a.scale;
    if (task.slot < 0) {
        if (a.dk.at)
            write_row<D_CHUNKS>(a.dk.head(item, group) + task.of.row * a.dk.n, dk, a.d);
        write_row<E_CHUNKS>(a.dv.head(item, group) + task.of.row * a.dv.n, dv, a.e);
    } else {
        const i64 part = a.pieces.part_at[pair] + task.slot;
        if (a.dk.at)
            write_part<D_CHUNKS>(a.dk_parts + part * a.dk_width, dk, a.d);
        write_part<E_CHUNKS>(a.dv_parts + part * a.dv_width, dv, a.e);
    }
}
