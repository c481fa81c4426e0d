// talking_heads_backward_weights.cu -- talking heads, backward: gradients of the matrices that mix.
//
//     dw_pre[h, s] = sum_pairs scale products_h dscores_s
//     dw_post[s, v] = sum_pairs weights_s dmixed_v        db_post[v] = sum_pairs dmixed_v
//
// Sums over pairs are products of strips, heads by heads. A warp takes the pairs of its own threads,
// so that it meets no other until the end. Each block writes sums of its own;
// talking_heads_join.cu adds them.
#define LONG_SUMS 1
#include "talking_heads_backward.cuh"

enum {
    COLUMN_TILES = (HEADS + 15) / 16,
    SHOWN = HEADS < 16 ? HEADS : 16     // heads of the softmax that have strips at a time
};

struct WeightsArguments {
    Problem problem;
    Operand dout;
    const Sum* lse;         // (batch, heads, n)
    const Sum* delta;
    Sum* parts;             // (blocks, numbers): dw_pre, dw_post^T, each (its heads, HEADS), db_post
    int numbers;
};

typedef Sum Tiles[ROW_TILES][2][4];      // of sums, 16 columns wide

// Of strips of 16 heads the DEPTH pairs from `pair` on, as A. Which pair comes where does not
// matter, as long as it is the same in all heads.
DEVICE void load_heads(A& a, u32 strips, int first, int heads, int pair, Sum factor) {
    Sum c[DEPTH / 8][4];
    UNROLL
    for (int half = 0; half < 2; half++) {
        const int head = first + 8 * half + row_of_lane();
        Pack x = {};
        if (head < heads)
            x = load_shared<Pack>(strips + head * STRIP
                                  + (pair + PACK * pair_of_lane()) * sizeof(Sum));
        UNROLL
        for (int i = 0; i < PACK; i++)
            c[i / 2][2 * half + i % 2] = x.x[i] * factor;
    }
    Weights<DEPTH / 8> held;
    hold(held, c);
    as_a(a, held, 0);
}

// The rows of A as columns of B.
DEVICE void as_columns(B (&b)[2], const A& a) {
    UNROLL
    for (int half = 0; half < 2; half++) {
#if ELEMENT <= BF16
        b[half].x[0] = a.x[half];
        b[half].x[1] = a.x[2 + half];
#elif ELEMENT == F32
        UNROLL
        for (int i = 0; i < 3; i++) {
            b[half].x[i][0] = a.x[i][half];
            b[half].x[i][1] = a.x[i][2 + half];
        }
#else
        b[half].x[0] = a.x[0][half];
        b[half].x[1] = a.x[1][half];
#endif
    }
}

// Writes the thread's numbers of SHOWN heads from `first` on.
DEVICE void show(u32 strips, const Sum (&x)[HEADS][OWN], int first) {
    UNROLL
    for (int s = 0; s < SHOWN; s++) {
        Own own = {};
        if (first + s < HEADS)
            UNROLL
            for (int o = 0; o < OWN; o++)
                own.x[o] = x[first + s][o];
        store_own(strips + s * STRIP, own);
    }
}

// Adds to `sums` the products of strips of `rows` heads and of SHOWN heads, over the pairs of the
// warp.
DEVICE void add_products(Tiles& sums, u32 row_strips, int rows, Sum factor, u32 column_strips) {
    _Pragma("unroll 1")
    for (int step = 0; step < 32 * OWN; step += DEPTH) {
        const int pair = warp_number() * 32 * OWN + step;
        A a;
        B columns[2];
        load_heads(a, column_strips, 0, SHOWN, pair, 1);
        as_columns(columns, a);
        UNROLL
        for (int i = 0; i < ROW_TILES; i++) {
            load_heads(a, row_strips, 16 * i, rows, pair, factor);
            UNROLL
            for (int half = 0; half < 2; half++)
                multiply(sums[i][half], a, columns[half]);
        }
    }
}

// Adds the strips of `rows` heads themselves: all columns of `sums` are alike.
DEVICE void add_totals(Sum (&sums)[ROW_TILES][4], u32 row_strips, int rows) {
    A a;
    B ones[2];
    Sum c[DEPTH / 8][4];
    UNROLL
    for (int i = 0; i < DEPTH / 8; i++)
        UNROLL
        for (int x = 0; x < 4; x++)
            c[i][x] = 1;
    Weights<DEPTH / 8> held;
    hold(held, c);
    as_a(a, held, 0);
    as_columns(ones, a);
    _Pragma("unroll 1")
    for (int step = 0; step < 32 * OWN; step += DEPTH)
        UNROLL
        for (int i = 0; i < ROW_TILES; i++) {
            load_heads(a, row_strips, 16 * i, rows, warp_number() * 32 * OWN + step, 1);
            multiply(sums[i], a, ones[0]);
        }
}

// Clears the thread's pairs that are not seen.
DEVICE void clear_hidden(u32 strips, int heads, u32 seen) {
    for (int h = 0; h < heads; h++) {
        Own x = load_own(strips + h * STRIP);
        UNROLL
        for (int o = 0; o < OWN; o++)
            x.x[o] = seen >> o & 1 ? x.x[o] : Sum(0);
        store_own(strips + h * STRIP, x);
    }
}

// Adds a warp's sums to those of the warps before it, (rows, HEADS) in shared memory.
DEVICE void add_matrix(u32 to, const Tiles (&sums)[COLUMN_TILES], int rows) {
    UNROLL
    for (int j = 0; j < COLUMN_TILES; j++)
        UNROLL
        for (int i = 0; i < ROW_TILES; i++)
            UNROLL
            for (int half = 0; half < 2; half++)
                UNROLL
                for (int x = 0; x < 4; x++) {
                    const int row = 16 * i + x / 2 * 8 + row_of_lane();
                    const int column = 16 * j + 8 * half + 2 * pair_of_lane() + x % 2;
                    const u32 at = to + (row * HEADS + column) * sizeof(Sum);
                    if (row < rows && column < HEADS)
                        store_shared(at, load_shared<Sum>(at) + sums[j][i][half][x]);
                }
}

extern "C" __global__ void __launch_bounds__(THREADS)
talking_heads_backward_weights(const __grid_constant__ WeightsArguments a) {
    const Problem& p = a.problem;
    const Place block = place_of_queries(p, 1);
    Backward work;
    work.begin(p, a.dout, block, false);
    const u32 shifts = work.end;
    const u32 deltas = shifts + HEADS * ROWS * sizeof(Sum);
    const u32 mixed = deltas + HEADS * ROWS * sizeof(Sum);      // strips of SHOWN heads
    load_rows<ROWS>(shifts, p, a.lse, block.batch, block.first, block.rows, INFINITE, shift_of);
    load_rows<ROWS>(deltas, p, a.delta, block.batch, block.first, block.rows, 0,
                    [](Sum x) { return x; });

    Tiles dw_pre[COLUMN_TILES] = {}, dw_post[COLUMN_TILES] = {};
    Sum db_post[ROW_TILES][4] = {};
    Steps steps;
    steps.begin(p, block);
    const auto first_job = [&] {
        return steps.here() ? work.scores.job(0, steps.column()) : Job{};
    };
    first_job().begin(work.ring.here());
    commit_copies();
    _Pragma("unroll 1")
    while (steps.here()) {
        const bool masked = steps.note(p, block, work.words);
        const int column = steps.column();
        steps.advance(p);
        work.multiply(column, first_job);
        __syncthreads();
        Sum weights[HEADS][OWN], dscores[HEADS][OWN];
        const u32 seen = own_bits(work.words);
        if (masked) {
            clear_hidden(work.scores.strips, p.heads_in, seen);
            clear_hidden(work.pulls.strips, p.heads_out, seen);
        }
        work.weights_of(p, weights, seen, [&](int s, int) {
            return load_shared<Sum>(shifts + (s * ROWS + own_row()) * sizeof(Sum));
        });
        UNROLL
        for (int j = 0; j < COLUMN_TILES; j++) {
            show(mixed, weights, 16 * j);
            __syncwarp();
            add_products(dw_post[j], work.pulls.strips, p.heads_out, 1, mixed);
            __syncwarp();
        }
        work.gradients_of_weights(p, dscores);
        differentiate(weights, dscores, p.heads, seen, [&](int s, int) {
            return load_shared<Sum>(deltas + (s * ROWS + own_row()) * sizeof(Sum));
        });
        UNROLL
        for (int j = 0; j < COLUMN_TILES; j++) {
            show(mixed, dscores, 16 * j);
            __syncwarp();
            add_products(dw_pre[j], work.scores.strips, p.heads_in, p.scale, mixed);
            __syncwarp();
        }
        add_totals(db_post, work.pulls.strips, p.heads_out);
        __syncthreads();        // the next products overwrite what was just read
    }
    wait_copies<0>();

    const u32 sums = work.scores.strips;
    const int of_pre = p.heads_in * HEADS;
    const int of_post = p.heads_out * HEADS;
    __syncthreads();
    for (int i = threadIdx.x; i < a.numbers; i += THREADS)
        store_shared(sums + i * sizeof(Sum), Sum(0));
    for (int warp = 0; warp < WARPS; warp++) {
        __syncthreads();
        if (warp != warp_number())
            continue;
        add_matrix(sums, dw_pre, p.heads_in);
        add_matrix(sums + of_pre * sizeof(Sum), dw_post, p.heads_out);
        UNROLL
        for (int i = 0; i < ROW_TILES; i++)
            UNROLL
            for (int half = 0; half < 2; half++) {
                const int row = 16 * i + 8 * half + row_of_lane();
                const u32 at = sums + (of_pre + of_post + row) * sizeof(Sum);
                // all columns are alike
                if (row < p.heads_out && pair_of_lane() == 0)
                    store_shared(at, load_shared<Sum>(at) + db_post[i][2 * half]);
            }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < a.numbers; i += THREADS)
        a.parts[i64(blockIdx.x) * a.numbers + i] = load_shared<Sum>(sums + i * sizeof(Sum));
}
