// additive_backward.cuh -- what both backward kernels of additive attention do: gradients of scores,
// and what they bring to the features of the tile that a block owns.
#pragma once
#include "additive.cuh"

enum {
    // of a tile of v or dout
    SIZE = TileSize<TILE, E>::SIZE,
    // numbers of a row of gradients of scores, which warps write two by two
    GRADIENT_LINE = TILE + 8,
    GRADIENTS_SIZE = TILE * GRADIENT_LINE * sizeof(Sum)
};

#if ELEMENT == F64
typedef double2 Two;
#else
typedef float2 Two;
#endif

// Where a thread's pair of columns of row h lies among gradients of scores.
DEVICE u32 place_of_gradient(u32 gradients, int own, int h, int i) {
    const int row = own + 8 * h + row_of_lane();
    return gradients + (row * GRADIENT_LINE + 8 * i + 2 * pair_of_lane()) * sizeof(Sum);
}

// Puts weights where gradients will be, as pulls need their registers: -1 for pairs that are hidden.
DEVICE void store_weights(u32 gradients, const Sum (&weights)[TILE / 8][4],
                          const RowBits<TILE> (&bits)[2], int own) {
    UNROLL
    for (int h = 0; h < 2; h++)
        UNROLL
        for (int i = 0; i < TILE / 8; i++)
            store_shared(place_of_gradient(gradients, own, h, i),
                         Two{bits[h].get(i, 0) ? weights[i][2 * h] : Sum(-1),
                             bits[h].get(i, 1) ? weights[i][2 * h + 1] : Sum(-1)});
}

DEVICE Sum gradient_of(Sum weight, Sum pull, Sum delta) {
    // of what is hidden a pull may be NaN
    return weight == -1 ? Sum(0) : weight * (pull - delta);
}

// Weights become gradients, which `add_slopes` reads of its own warp only. `deltas(h, i)` are those
// of a pair of columns.
template<class Deltas>
DEVICE void store_gradients(u32 gradients, const Sum (&pulls)[TILE / 8][4], int own,
                            Deltas deltas) {
    UNROLL
    for (int i = 0; i < TILE / 8; i++)
        UNROLL
        for (int h = 0; h < 2; h++) {
            const u32 at = place_of_gradient(gradients, own, h, i);
            const Two weight = load_shared<Two>(at);
            const Two delta = deltas(h, i);
            store_shared(at, Two{gradient_of(weight.x, pulls[i][2 * h], delta.x),
                                 gradient_of(weight.y, pulls[i][2 * h + 1], delta.y)});
        }
    __syncwarp();
}

// What the gradients of scores bring to 8 rows of a warp in a lane's own feature, and to its weight.
struct Slopes {
    Sum sums[8];
    Sum of_weight;
};

// `numbers` are those of a chunk; `columns` of the columns are there.
DEVICE void add_slopes_by_tanh(Slopes& s, u32 gradients, u32 numbers, int first, int columns) {
    const u32 line = numbers + lane_number() * NUMBERS_LINE * sizeof(Sum);
    Sum x[8];
    UNROLL
    for (int i = 0; i < 8; i++)
        x[i] = load_shared<Sum>(line + (first + i) * sizeof(Sum));
    _Pragma("unroll 1")
    for (int j = 0; j < columns; j++) {
        const Sum y = load_shared<Sum>(line + NUMBERS_SIZE + j * sizeof(Sum));
        UNROLL
        for (int i = 0; i < 8; i++) {
            const Sum gradient = load_shared<Sum>(
                gradients + ((first + i) * GRADIENT_LINE + j) * sizeof(Sum));
            // what is masked may hold NaN
            if (gradient == 0)
                continue;
            const Sum tanh_ = hyperbolic_tangent(x[i] + y);
            s.sums[i] = times_plus(gradient, 1 - tanh_ * tanh_, s.sums[i]);
            s.of_weight = times_plus(gradient, tanh_, s.of_weight);
        }
    }
}

#if ELEMENT != F64
// Where all features of both tiles are small, tanh keeps their digits by
// exp(2 (a + c)) - 1 = (x - 1) y + (y - 1); elsewhere that is x y - 1.
DEVICE void add_slopes_by_powers(Slopes& s, u32 gradients, const Tokens& rows,
                                 const Tokens& columns, u32 planes, int first, int chunk) {
    const bool small = !(large_of(rows, columns, chunk) >> lane_number() & 1);
    const u32 line = planes + lane_number() * LINE * 4;
    const float* own = (small ? rows.x.rises : rows.x.powers) + (rows.chunk + chunk) * PLANE
        + lane_number() * TILE + first;
    float x[8];
    UNROLL
    for (int i = 0; i < 8; i += 4) {
        const float4 four = *(const float4*)(own + i);
        x[i] = four.x;
        x[i + 1] = four.y;
        x[i + 2] = four.z;
        x[i + 3] = four.w;
    }
    _Pragma("unroll 1")
    for (int j = 0; j < TILE; j += 4) {
        const float4 powers = load_shared<float4>(line + j * 4);
        float4 rises = load_shared<float4>(line + PLANE_SIZE + j * 4);
        if (!small)
            rises = {-1, -1, -1, -1};
        const float y[4] = {powers.x, powers.y, powers.z, powers.w};
        const float z[4] = {rises.x, rises.y, rises.z, rises.w};
        UNROLL
        for (int i = 0; i < 8; i++) {
            const float4 four = load_shared<float4>(
                gradients + ((first + i) * GRADIENT_LINE + j) * 4);
            const float gradient[4] = {four.x, four.y, four.z, four.w};
            UNROLL
            for (int e = 0; e < 4; e++) {
                const float above = fmaf(x[i], y[e], z[e]);
                const float tanh_ = above * reciprocal_approx(above + 2);
                s.sums[i] = fmaf(gradient[e], fmaf(-tanh_, tanh_, 1), s.sums[i]);
                s.of_weight = fmaf(gradient[e], tanh_, s.of_weight);
            }
        }
    }
}
#endif

// Adds to `result`, rows of `width` numbers from the tile's first on, and where it is not 0 to
// `dw`, of this warp alone, what the gradients of scores bring to the tile's rows:
//
//     result_if += w_f sum_j gradient_ij (1 - tanh_ijf^2)        dw_f += sum_ij gradient_ij tanh_ijf
//
// A lane has a feature. So nothing is summed across lanes, and each sum has one order.
DEVICE void add_slopes(Sum* result, i64 width, Sum* dw, const Problem& p, const Sum* w,
                       const Tokens& rows, const Tokens& columns, int own, u32 gradients,
                       u32 planes) {
    auto load = [&](int chunk) {
        const u32 to = planes_of(planes, chunk);
        load_plane(to, columns.x.powers + (columns.chunk + chunk) * PLANE);
        load_plane(to + PLANE_SIZE, columns.x.rises + (columns.chunk + chunk) * PLANE);
    };
    if (PREPARED)
        load(0);
    commit_copies();
    for (int chunk = 0; chunk < p.chunks(); chunk++) {
        if (PREPARED && chunk + 1 < p.chunks())
            load(chunk + 1);
        commit_copies();
        wait_copies<1>();
        __syncthreads();
        const u32 here = planes_of(planes, chunk);
        const bool wild = wild_of(rows, columns, chunk) != 0;
        if (wild) {
            load_numbers(here, p, rows, columns, chunk);
            __syncthreads();
        }
        const int feature = chunk * FEATURES + lane_number();
        Sum of_weight = 0;
        _Pragma("unroll 1")
        for (int first = own; first < min(own + 16, rows.there); first += 8) {
            Slopes s = {{0, 0, 0, 0, 0, 0, 0, 0}, 0};
            if (wild)
                add_slopes_by_tanh(s, gradients, here, first, columns.there);
#if ELEMENT != F64
            else
                add_slopes_by_powers(s, gradients, rows, columns, here, first, chunk);
#endif
            of_weight += s.of_weight;
            UNROLL
            for (int i = 0; i < 8; i++)
                if (feature < p.a && first + i < rows.there) {
                    // forward: score = sum_f w_f tanh_f
                    Sum& found = result[(first + i) * width + feature];
                    found = times_plus(w[feature], s.sums[i], found);
                }
        }
        if (dw && feature < p.a)
            dw[feature] += of_weight;
        __syncthreads();            // the next load overwrites what was just read
    }
}

// pulls (16 x TILE of a warp) = x y^T for rows from `own` on of one tile and all of another, of which E
// columns are there at a time. `load(from)` copies both from a column on, and has done so for 0.
template<class Load>
DEVICE void find_pulls(Sum (&pulls)[1][TILE / 8][4], u32 x_tile, u32 y_tile, int own, int width,
                       Load load) {
    clear(pulls);
    for (int from = 0; from < width; from += E) {
        if (from > 0)
            load(from);
        commit_copies();
        wait_copies<0>();
        bool bad = false;
        if (ELEMENT == F32)
            bad = __syncthreads_or(any_bad<TILE, E>(x_tile) | any_bad<TILE, E>(y_tile));
        else
            __syncthreads();
        if (ELEMENT == F32 && bad)
            multiply_numbers<TILE, TILE, E>(pulls, x_tile, own, y_tile, 0);
        else
            multiply_transposed<TILE, TILE, E>(pulls, x_tile, own, y_tile, 0);
        __syncthreads();            // the next load overwrites what was just read
    }
}
