// softmax_backward_terms.cu -- flash attention, backward: gradients of bias, offsets and gate.
//
// All tiles that add to the same numbers of a term's gradient at the same places within a tile are
// one owner's: for a full bias a tile by itself, for a bias by key a column of tiles, for a table by
// offset a diagonal; and in each case through all heads and batch items that share the numbers.
// The launch code cuts owners into pieces, one for a block, which adds its tiles up in registers:
//
//     sums (64 x 64) += dscores of tile, for each tile of the piece, for each (batch, head) of it
//
// What is left, as adding rows, columns or diagonals of the sums, is little; see term_gradients.py.
#include "softmax.cuh"

enum {
    ROWS = 16 * WARPS,
    Q_SIZE = TileSize<ROWS, D>::SIZE,
    DOUT_SIZE = TileSize<ROWS, E>::SIZE,
    K_SIZE = TileSize<LOAD, D>::SIZE
};

struct TermsArguments {
    Problem problem;
    Operand dout;
    const Sum* lse;         // (batch, heads, n)
    const Sum* delta;
    const int* pieces;      // (pieces, 4): first tile, tiles, first pair, pairs
    const int* tiles;       // (tiles, 3): query tile, key tile, and FULL or the number of its bits
    const int* pairs;       // (pairs, 2): batch item, head
    Sum* sums;              // (pieces, 64, 64)
    int of_gate;
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
softmax_backward_terms(const __grid_constant__ TermsArguments a) {
    const Problem& p = a.problem;
    const int* piece = a.pieces + 4 * blockIdx.x;
    const u32 q_tile = shared_base();
    const u32 dout_tile = q_tile + Q_SIZE;
    const u32 k_tile = dout_tile + DOUT_SIZE;
    const u32 v_tile = k_tile + K_SIZE;
    const int own = threadIdx.x / 32 * 16;                  // the warp's first row
    const int in_tile = blockIdx.y * ROWS + own + row_of_lane();

    Sum sums[1][TILE / 8][4];
    clear(sums);
    _Pragma("unroll 1")
    for (int visit = 0; visit < piece[1] * piece[3]; visit++) {
        const int* pair = a.pairs + 2 * (piece[2] + visit / piece[1]);
        const int* tile = a.tiles + 3 * (piece[0] + visit % piece[1]);
        const int batch = pair[0];
        const int head = pair[1];
        const int kind = tile[2];
        const int group = head / (p.heads / p.groups);
        const int queries = p.q_lengths[batch];
        const int keys = p.kv_lengths[batch];
        const int first = tile[0] * TILE + blockIdx.y * ROWS;
        const int columns = keys - tile[1] * TILE;
        if (tile[0] * TILE >= queries || columns <= 0)
            continue;
        const Sum scale = p.scores.scale[head];

        load_tokens<ROWS, D>(q_tile, p.q.head(batch, head), p.q.n, first, queries, p.d);
        load_tokens<ROWS, E>(dout_tile, a.dout.head(batch, head), a.dout.n, first, queries, p.e);
        Sum shift[2];
        Sum delta[2];
        u64 bits[2];
        UNROLL
        for (int h = 0; h < 2; h++) {
            const int query = tile[0] * TILE + in_tile + 8 * h;
            const i64 row = (i64(batch) * p.heads + head) * p.n + query;
            const bool live = query < queries;
            shift[h] = live ? shift_of(a.lse[row]) : INFINITE;
            delta[h] = live ? a.delta[row] : Sum(0);
            bits[h] = bits_of_row(p.lists, shift[h] == INFINITE ? NONE : kind, in_tile + 8 * h,
                                  columns);
        }

        UNROLL
        for (int part = 0; part < TILE / LOAD; part++) {
            const int key = tile[1] * TILE + part * LOAD;
            load_tokens<LOAD, D>(k_tile, p.k.head(batch, group), p.k.n, key, keys, p.d);
            load_tokens<LOAD, E>(v_tile, p.v.head(batch, group), p.v.n, key, keys, p.e);
            commit_copies();
            wait_copies<0>();
            bool bad = false;
            if (ELEMENT == F32)
                bad = __syncthreads_or(any_bad<ROWS, D>(q_tile) | any_bad<ROWS, E>(dout_tile)
                                       | any_bad<LOAD, D>(k_tile) | any_bad<LOAD, E>(v_tile));
            else
                __syncthreads();

            _Pragma("unroll")
            for (int step = 0; step < LOAD; step += STEP) {
                // forward: scores = q k^T, out = weights v
                Sum products[1][STEP / 8][4];
                Sum pulls[1][STEP / 8][4];
                clear(products);
                clear(pulls);
                if (ELEMENT == F32 && bad) {
                    multiply_numbers<ROWS, LOAD, D>(products, q_tile, own, k_tile, step);
                    multiply_numbers<ROWS, LOAD, E>(pulls, dout_tile, own, v_tile, step);
                } else {
                    multiply_transposed<ROWS, LOAD, D>(products, q_tile, own, k_tile, step);
                    multiply_transposed<ROWS, LOAD, E>(pulls, dout_tile, own, v_tile, step);
                }
                UNROLL
                for (int h = 0; h < 2; h++) {
                    const QueryOfTerms terms = {batch, head, tile[0] * TILE + in_tile + 8 * h};
                    RowBits<STEP> seen;
                    seen.set(bits[h], part * LOAD + step);
                    UNROLL
                    for (int i = 0; i < STEP / 8; i++)
                        UNROLL
                        for (int e = 0; e < 2; e++) {
                            const int x = 2 * h + e;
                            const Pair found = pair_of(
                                p.scores, terms, key + step + 8 * i + 2 * pair_of_lane() + e,
                                seen.get(i, e), products[0][i][x], scale, shift[h],
                                pulls[0][i][x], delta[h]);
                            sums[0][(part * LOAD + step) / 8 + i][x] += a.of_gate ? found.dgate
                                                                                  : found.dscore;
                        }
                }
            }
            __syncthreads();        // the next load overwrites what was just read
        }
    }
    UNROLL
    for (int h = 0; h < 2; h++) {
        const i64 row = i64(blockIdx.x) * TILE + in_tile + 8 * h;
        store_wide_row(a.sums + row * TILE, sums[0], 2 * h, 1, TILE);
    }
}
