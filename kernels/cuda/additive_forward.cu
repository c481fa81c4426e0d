// additive_forward.cu -- softmax over scores that are sums of tanhs, forward.
//
// A block of four warps owns a tile of queries of a head, a warp 16 of them, and walks the tiles of
// keys that the BlockMask lists:
//
//     scores (16 x TILE)  = sum_f w_f tanh(q_f + k_f)         in registers: additive.cuh
//     sums   (16 x E)    += weights v                         likewise
//
// The values of a tile arrive while its scores are found.
#include "additive.cuh"

enum { V_SIZE = TileSize<TILE, E>::SIZE };

struct ForwardArguments {
    Problem problem;
    Operand out;
    Sum* lse;               // (batch, heads, n)
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
additive_forward(const __grid_constant__ ForwardArguments a) {
    const Problem& p = a.problem;
    // the last lines first: under a causal mask they take longest
    const int lines = p.q.tiles;
    const int line = lines - 1 - int(blockIdx.x % lines);
    const int head = blockIdx.x / lines % p.heads;
    const int batch = blockIdx.x / lines / p.heads;
    const int group = head / (p.heads / p.groups);
    const Tokens rows = tokens_of(p, p.q, batch, head, line, p.q_lengths[batch]);
    const int keys = rows.there > 0 ? p.kv_lengths[batch] : 0;
    const Sum* w = p.w + i64(head) * p.chunks() * FEATURES;
    const Stored* v = p.v.head(batch, group);

    const u32 planes = shared_base();
    const u32 v_tile = planes + PLANES_SIZE;
    const int own = threadIdx.x / 32 * 16;              // the warp's first row
    const u32 words = v_tile + V_SIZE + own * 8;        // for nonfinite.cuh
    const bool live = own < rows.there;

    Online<E> x;
    clear(x.sums);
    UNROLL
    for (int h = 0; h < 2; h++) {
        x.largest[h] = -INFINITE;
        x.total[h] = 0;
    }
    Walk<1> walk;
    walk.begin(p.lists, p.lists.layout[batch * p.heads + head], line, 0);
    for (; walk.here((keys + TILE - 1) / TILE); walk.advance(p.lists)) {
        const int columns = keys - walk.tile * TILE;
        const int kind = walk.kind(p.lists, 0);
        const bool masked = kind != FULL || columns < TILE;
        load_tokens<TILE, E>(v_tile, v, p.v.n, walk.tile * TILE, keys, p.e);
        commit_copies();

        Sum scores[1][TILE / 8][4];
        find_scores(scores[0], p, w, rows, tokens_of(p, p.k, batch, group, walk.tile, keys), own,
                    live, planes);
        const bool bad = (masked || ELEMENT == F32) && __syncthreads_or(any_bad<TILE, E>(v_tile));
        RowBits<TILE> bits[2];
        UNROLL
        for (int h = 0; h < 2; h++) {
            const int row = own + 8 * h + row_of_lane();
            bits[h].set(bits_of_row(p.lists, row < rows.there ? kind : NONE, row, columns), 0);
            UNROLL
            for (int i = 0; i < TILE / 8; i++)
                UNROLL
                for (int e = 0; e < 2; e++)
                    if (!bits[h].get(i, e))
                        scores[0][i][2 * h + e] = -INFINITE;
            weigh(scores[0], x, h);
        }
        Weights<TILE / 8> weights[1];
        hold(weights[0], scores[0]);
        if (bad) {
            // see nonfinite.cuh
            add_by_weight(words, bits, weights, [&](bool vanished) {
                add_bad<TILE, E>(x.sums, v_tile, 0, TILE, words, vanished);
            });
            __syncthreads();
            clean<TILE, E>(v_tile, 0, TILE);
            __syncthreads();
        }
        // sums += weights v
        multiply_weights<TILE, E>(x.sums, weights, v_tile, 0);
        __syncthreads();            // the next load overwrites what was just read
    }
    wait_copies<0>();

    UNROLL
    for (int h = 0; h < 2; h++) {
        Sum total = x.total[h];
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
        const int row = own + 8 * h + row_of_lane();
        const int query = line * TILE + row;
        if (query >= p.n)
            continue;
        const bool seen = total != 0;
        if (!seen)
            // it may have met what is not finite
            UNROLL
            for (int i = 0; i < E / 8; i++)
                x.sums[0][i][2 * h] = x.sums[0][i][2 * h + 1] = 0;
        if (pair_of_lane() == 0)
            a.lse[(i64(batch) * p.heads + head) * p.n + query]
                = seen ? x.largest[h] + natural_logarithm(total) : -INFINITE;
        store_row(a.out.head(batch, head) + query * a.out.n, x.sums[0], 2 * h,
                  seen ? 1 / total : Sum(0), p.e);
    }
}
