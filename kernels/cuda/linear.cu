// linear.cu -- linear attention: all passes, forward and backward.
//
// A step has some rows X and some columns Y and Z of the same positions; a state S sums over the
// columns of all steps before (of all steps, if there is no causal mask):
//
//     result = X S^T + (X Y^T where seen) Z        S (Z wide, Y wide) += Z^T Y
//
//     pass    rows X       columns Y     Z          result
//     OUT     phi(q)       phi(k)        v          numerators of out
//     DQ      g            v             phi(k)     dphi(q), which becomes dq
//     DV      phi(k)       phi(q)        g          dv             steps from the last one on
//     DK      v            g             phi(q)     dphi(k), which becomes dk       likewise
//
// with g = dout / denominator. Of a normalised output v and g have one column more, the ones whose
// sums are the denominators, and their gradients. It is kept apart, as a vector for each state.
//
// A block walks the steps of a span of an item and key/value head. Steps' sums are the same matrix
// for every row, so spans can be summed first (READS = 0), these sums be joined (linear_scan.cu),
// and then all spans be walked at once, each from the state before it. The state is in registers;
// of it, rounded to what products take, there is a copy in shared memory for the step's rows.
//
// Where features or values are wider than SIDE, a launch does a part of both, whose results are added
// to those of the launches before: the pairs X Y^T of OUT and DV are sums over features, those of DQ
// and DK over columns of the values, and of all of these only multiples are taken.
#include "linear.cuh"

enum {
    STRIP_WARPS = WARPS < SIDE / 16 ? WARPS : SIDE / 16,    // warps that share out the state's rows
    STRIPS = SIDE / 16 / STRIP_WARPS,
    STATE_PARTS = WARPS / STRIP_WARPS,                      // and its columns
    STATE_COLUMNS = SIDE / STATE_PARTS,
    VECTOR_OF_WARP = SIDE / WARPS,                          // a warp's numbers of the vector
    SHARES = 32 / VECTOR_OF_WARP                            // lanes that share out the tokens
};
static_assert(TOKENS % (2 * SHARES) == 0, "lanes have as many tokens each");

// A head at a step. Where rows are queries the heads of a group take turns with the same columns;
// where they are keys they take turns as columns for the same rows.
struct Visit {
    int number, head;

    __device__ __forceinline__ bool rows_are_new(const LinearArguments& a) const {
        return READS && (PASS <= DQ || head == 0);
    }

    __device__ __forceinline__ bool columns_are_new(const LinearArguments& a) const {
        return PASS >= DV || head == 0;
    }
};

DEVICE int rows_head(const LinearArguments& a, const Block& block, const Visit& visit) {
    return PASS <= DQ ? block.group * block.shared_heads + visit.head : block.group;
}

DEVICE int columns_head(const LinearArguments& a, const Block& block, const Visit& visit) {
    return PASS >= DV ? block.group * block.shared_heads + visit.head : block.group;
}

DEVICE int width_of_x(const LinearArguments& a) {
    return PASS == OUT || PASS == DV ? a.d : a.e;
}

DEVICE int width_of_z(const LinearArguments& a) {
    return PASS == OUT || PASS == DV ? a.e : a.d;
}

DEVICE void fetch_columns(const LinearArguments& a, const Block& block, const Step& step,
                          const Visit& visit, bool also_y) {
    const int head = columns_head(a, block, visit);
    if (also_y)
        fetch(block.raw_y, a.y, block.batch, head, step.column, step.columns, width_of_x(a));
    fetch(block.raw_z, a.z, block.batch, head, step.column, step.columns, width_of_z(a));
}

DEVICE void fetch_visit(const LinearArguments& a, const Block& block, const Step& step,
                        const Visit& visit) {
    if (visit.rows_are_new(a))
        fetch(block.raw_x, a.x, block.batch, rows_head(a, block, visit), step.row, step.rows,
              width_of_x(a));
    if (visit.columns_are_new(a))
        fetch_columns(a, block, step, visit, true);
}

// The queries or keys of a step, of a head.
DEVICE Tokens tokens_of(const LinearArguments& a, const Block& block, const Step& step,
                        const Array& from, bool queries, int head) {
    const int heads = queries ? a.heads : a.groups;
    const int length = queries ? a.n : a.m;
    const Sum* most = queries ? a.query_most : a.key_most;
    Tokens tokens = {from, head, queries ? step.query : step.key,
                     queries ? step.queries : step.keys, 0};
    if (KIND == EXP && most)
        tokens.most = most + (i64(block.batch) * heads + head) * length + tokens.first;
    return tokens;
}

// Takes tokens that were fetched as features, as values, or as g; says whether all is finite.
DEVICE bool take_features(const LinearArguments& a, const Block& block, u32 tile, u32 raw,
                          const Tokens& tokens) {
    if (!PROJECTED)
        return take(tile, raw, tokens.count, a.d,
                    [&](int, Sum x) { return feature(a, a.scale * x); });
    Projected projected(a, block, tile, raw, tokens);
    for (int r = 0; r < 2; r++)
        projected.each(block, r, [&](int, Sum& x) { x = feature(a, x); });
    return projected.store(block, tile, tokens.count);
}

DEVICE bool take_values(const LinearArguments& a, u32 tile, u32 raw, int count) {
    return take(tile, raw, count, a.e, [&](int, Sum x) { return x; });
}

// As rows these are dout itself, which is multiplied later.
DEVICE bool take_pulls(const LinearArguments& a, const Block& block, u32 tile, u32 raw, int head,
                       int first, int count) {
    if (!a.normalize)
        return take_values(a, tile, raw, count);
    const Sum* inverse = a.inverse + (i64(block.batch) * a.heads + head) * a.n + first;
    return take(tile, raw, count, a.e, [&](int row, Sum x) {
        const Sum share = inverse[row];
        // what lies in an empty row is never looked at
        return share == 0 ? Sum(0) : PASS == DQ ? x : x * share;
    });
}

DEVICE void take_rows(const LinearArguments& a, const Block& block, const Step& step, int head) {
    if (PASS == OUT || PASS == DV)
        take_features(a, block, block.x, block.raw_x,
                      tokens_of(a, block, step, a.x, PASS == OUT, head));
    else if (PASS == DQ)
        take_pulls(a, block, block.x, block.raw_x, head, step.row, step.rows);
    else
        take_values(a, block.x, block.raw_x, step.rows);
}

DEVICE void take_y(const LinearArguments& a, const Block& block, const Step& step, int head) {
    if (PASS == OUT || PASS == DV)
        take_features(a, block, block.y, block.raw_y,
                      tokens_of(a, block, step, a.y, PASS == DV, head));
    else if (PASS == DQ)
        take_values(a, block.y, block.raw_y, step.columns);
    else
        take_pulls(a, block, block.y, block.raw_y, head, step.column, step.columns);
}

DEVICE bool take_z(const LinearArguments& a, const Block& block, const Step& step, int head) {
    if (PASS == OUT)
        return take_values(a, block.z, block.raw_z, step.columns);
    if (PASS == DV)
        return take_pulls(a, block, block.z, block.raw_z, head, step.column, step.columns);
    return take_features(a, block, block.z, block.raw_z,
                         tokens_of(a, block, step, a.z, PASS == DK, head));
}

// Writes 1 / denominator and the denominators' gradients, of a step's queries, to shared memory.
DEVICE void take_denominators(const LinearArguments& a, const Block& block,
                                           const Step& step, const Visit& visit) {
    const int head = block.group * block.shared_heads + visit.head;
    const int first = PASS == DQ ? step.row : step.column;
    const int count = PASS == DQ ? step.rows : step.columns;
    const int row = threadIdx.x;
    if (row < TOKENS) {
        const i64 line = (i64(block.batch) * a.heads + head) * a.n + first;
        store_sum(block.pulls, row, row < count ? a.pull[line + row] : Sum(0));
        if (PASS == DQ)
            store_sum(block.shares, row, row < count ? a.inverse[line + row] : Sum(0));
    }
}

// The largest of the first `count` <= 64 numbers up to number `last`; a whole warp asks, each lane
// with its own `last`.
DEVICE Sum most_up_to(const Sum* numbers, int count, int last) {
    const int own = 2 * lane_number();
    Sum first = larger_number(-INFINITE, own < count ? numbers[own] : -INFINITE);
    Sum both = larger_number(first, own + 1 < count ? numbers[own + 1] : -INFINITE);
    UNROLL
    for (int apart = 1; apart < 32; apart *= 2) {
        const Sum other = __shfl_up_sync(~0u, both, apart);
        if (lane_number() >= apart)
            both = larger_number(both, other);
    }
    const Sum before = __shfl_up_sync(~0u, both, 1);
    if (lane_number() > 0)
        first = larger_number(first, before);
    const int lane = clipped(last, 63) / 2;
    first = __shfl_sync(~0u, first, lane);
    both = __shfl_sync(~0u, both, lane);
    return last < 0 ? -INFINITE : last % 2 || last >= 64 ? both : first;
}

// Of kind EXP: writes what the queries and keys of a step are weighed by to shared memory, and
// returns by what the state is multiplied.
//
//     base      of a query, the largest stabiliser of the keys that it sees
//     query     exp(before - base): its share of the state
//     key       exp(top - after): a key's share of the state behind the step
//
// with `before` and `after`, the largest stabilisers before and behind the step. Pairs of the step
// itself have the weight exp(top - base). No factor is above 1, and no query knows a later key's.
DEVICE Sum weigh(const LinearArguments& a, const Block& block, const Step& step) {
    const Sum* running = a.running + i64(blockIdx.x) * (a.chunks + 1);
    const bool all = !CAUSAL && (READS || PASS >= DV);      // keys are behind the steps
    const Sum before = running[all ? a.chunks : clipped(step.chunk, a.chunks)];
    const Sum after = running[all ? a.chunks : clipped(step.chunk + 1, a.chunks)];
    const int token = threadIdx.x;
    const Sum* tops = a.tops + i64(blockIdx.x) * a.m + step.key;
    Sum base = before;
    // whole warps
    if (CAUSAL && token < (TOKENS + 31) / 32 * 32)
        base = larger_number(before, most_up_to(tops, step.keys, token + step.shift));
    base = subtractable(base);
    if (token < TOKENS) {
        const Sum top = token < step.keys ? tops[token] : -INFINITE;
        const Sum query = exponential(before - base);
        const Sum key = exponential(top - subtractable(after));
        store_sum(block.tops, token, top);
        store_sum(block.bases, token, base);
        store_sum(block.row_factors, token, PASS <= DQ ? query : key);
        store_sum(block.column_factors, token, PASS <= DQ ? key : query);
    }
    return exponential(before - subtractable(after));
}

// Of dv nothing needs the vector.
DEVICE bool has_vector(const LinearArguments& a) {
    return a.vector && PASS != DV;
}

// The block's state: a warp has STRIPS strips of 16 rows of it, in one of STATE_PARTS parts.
struct State {
    Sum sums[STRIPS][STATE_COLUMNS / 8][4];
    Sum last;                   // of the vector's number own_number(), what this thread has added

    __device__ __forceinline__ int own_number() const {
        return int(threadIdx.x) / 32 * VECTOR_OF_WARP + lane_number() % VECTOR_OF_WARP;
    }

    __device__ __forceinline__ Sum whole_last() const {
        Sum sum = last;
        UNROLL
        for (int apart = VECTOR_OF_WARP; apart < 32; apart *= 2)
            sum += __shfl_xor_sync(~0u, sum, apart);
        return sum;
    }

    __device__ __forceinline__ int row(int strip, int h) const {
        return (int(threadIdx.x) / 32 % STRIP_WARPS * STRIPS + strip) * 16 + 8 * h + row_of_lane();
    }

    __device__ __forceinline__ int column(int tile) const {
        return int(threadIdx.x) / 32 / STRIP_WARPS * STATE_COLUMNS + 8 * tile + 2 * pair_of_lane();
    }

    // visit(number of the feature, of the value, reference) for all that this thread has.
    template<class Each>
    __device__ __forceinline__ void each(const LinearArguments& a, Each visit) {
        UNROLL
        for (int s = 0; s < STRIPS; s++)
            UNROLL
            for (int i = 0; i < STATE_COLUMNS / 8; i++)
                UNROLL
                for (int x = 0; x < 4; x++) {
                    const int z = row(s, x / 2);
                    const int y = column(i) + x % 2;
                    const bool values_first = PASS == OUT || PASS == DV;
                    const int f = values_first ? y : z;
                    const int e = values_first ? z : y;
                    if (f < a.f && e < a.e)
                        visit(f, e, sums[s][i][x]);
                }
    }

    __device__ __forceinline__ void load(const LinearArguments& a, const States& from, int pair,
                                         int span) {
        clear(sums);
        last = 0;
        if (!from.at)
            return;
        const Sum* place = from.of(pair, span);
        each(a, [&](int f, int e, Sum& x) { x = place[i64(f) * from.row + e]; });
        if (has_vector(a) && own_number() < a.f && lane_number() < VECTOR_OF_WARP)
            last = place[from.last + i64(own_number()) * from.last_row];
    }

    __device__ __forceinline__ void store(const LinearArguments& a, const States& to, int pair,
                                          int span) {
        if (!to.at)
            return;
        Sum* place = to.of(pair, span);
        each(a, [&](int f, int e, Sum& x) { place[i64(f) * to.row + e] = x; });
        const Sum whole = whole_last();
        if (has_vector(a) && own_number() < a.f && lane_number() < VECTOR_OF_WARP)
            place[to.last + i64(own_number()) * to.last_row] = whole;
    }

    // Writes it to shared memory for the rows of a step.
    __device__ __forceinline__ void publish(const LinearArguments& a, const Block& block) const {
        UNROLL
        for (int s = 0; s < STRIPS; s++) {
            const u32 first = place<SIDE>(block.state, row(s, 0), column(0));
            UNROLL
            for (int i = 0; i < STATE_COLUMNS / 8; i++)
                UNROLL
                for (int h = 0; h < 2; h++)
                    store_tile_pair(moved<SIDE>(first, 8 * i) + h * 8 * 128, sums[s][i][2 * h],
                                    sums[s][i][2 * h + 1]);
        }
        if (!has_vector(a))
            return;
        const Sum whole = whole_last();
        if (lane_number() < VECTOR_OF_WARP)
            store_sum(block.lasts, own_number(), whole);
    }

    // Adds the columns of a step.
    __device__ __forceinline__ void absorb(const LinearArguments& a, const Block& block) {
        multiply_columns<STRIPS, STATE_COLUMNS / 8>(
            sums, block.z, int(threadIdx.x) / 32 % STRIP_WARPS * STRIPS * 16, block.y,
            int(threadIdx.x) / 32 / STRIP_WARPS * STATE_COLUMNS,
            KIND == EXP ? block.column_factors : 0u);
        if (!has_vector(a))
            return;
        _Pragma("unroll 4")
        for (int i = 0; i < TOKENS / SHARES; i++) {
            // rows 2 apart have no bank in common
            const int token = 2 * (i / 2 * SHARES + lane_number() / VECTOR_OF_WARP) + i % 2;
            const u32 from = place<TOKENS>(PASS == OUT ? block.y : block.z, token, own_number());
            const Sum phi = number(load_shared<Stored>(from));
            Sum factor = KIND == EXP ? shared_sum(block.column_factors, token) : Sum(1);
            if (PASS == DK)
                factor *= shared_sum(block.pulls, token);
            last = times_plus(phi, factor, last);
        }
    }

    __device__ __forceinline__ void shrink(Sum factor) {
        UNROLL
        for (int s = 0; s < STRIPS; s++)
            UNROLL
            for (int i = 0; i < STATE_COLUMNS / 8; i++)
                UNROLL
                for (int x = 0; x < 4; x++)
                    sums[s][i][x] *= factor;
        last *= factor;
    }
};

// What a warp finds for 16 rows of a step, and a part of its columns.
struct Found {
    Sum sums[1][RESULT / 8][4];
    Sum den[2];

    // What the rows read in the state.
    __device__ __forceinline__ void read(const LinearArguments& a, const Block& block) {
        clear(sums);
        den[0] = den[1] = 0;
        multiply_rows<SIDE>(sums, block.x, block.own, block.state, block.part_column);
        UNROLL
        for (int h = 0; h < 2; h++) {
            const int row = block.row(h);
            const Sum factor = KIND == EXP ? shared_sum(block.row_factors, row) : Sum(1);
            if (PASS == OUT && a.vector) {
                // a thread does a quarter of the row
                for (int chunk = pair_of_lane(); chunk < SIDE / CHUNK; chunk += 4) {
                    Chunk phi;
                    phi.all = load_shared<uint4>(place<TOKENS>(block.x, row, chunk * CHUNK));
                    UNROLL
                    for (int c = 0; c < CHUNK; c++)
                        den[h] = times_plus(number(phi.stored[c]),
                                            shared_sum(block.lasts, chunk * CHUNK + c), den[h]);
                }
                den[h] *= factor;
            }
            const bool also_last = a.vector && (PASS == DQ || PASS == DK);
            const bool divided = a.normalize && PASS == DQ;
            if (!also_last && !divided && KIND != EXP)
                continue;
            const Sum pull = divided ? shared_sum(block.pulls, row) : Sum(1);
            const Sum share = divided ? shared_sum(block.shares, row) : Sum(1);
            UNROLL
            for (int i = 0; i < RESULT / 8; i++)
                UNROLL
                for (int c = 0; c < 2; c++) {
                    const int f = block.part_column + 8 * i + 2 * pair_of_lane() + c;
                    Sum& x = sums[0][i][2 * h + c];
                    x *= share;
                    if (also_last)
                        x = times_plus(pull, shared_sum(block.lasts, f), x);
                    x *= factor;
                }
        }
    }

    // What the rows find at the columns of their own step; `bad`: some of Z is not finite.
    __device__ __forceinline__ void meet(const LinearArguments& a, const Block& block,
                                         const Step& step, bool bad) {
        Sum pairs[1][TOKENS / 8][4];
        clear(pairs);
        multiply_rows<TOKENS>(pairs, block.x, block.own, block.y, 0);
        RowBits<TOKENS> bits[2];
        UNROLL
        for (int h = 0; h < 2; h++) {
            const int row = block.row(h);
            const u64 columns = bits_below(step.columns);
            bits[h].set(PASS <= DQ ? bits_below(row + step.shift + 1) & columns
                                   : ~bits_below(row - step.shift) & columns, 0);
            const bool changed = a.normalize && PASS == DQ;
            const Sum pull = changed && a.vector ? shared_sum(block.pulls, row) : Sum(0);
            const Sum share = changed ? shared_sum(block.shares, row) : Sum(1);
            UNROLL
            for (int i = 0; i < TOKENS / 8; i++)
                UNROLL
                for (int c = 0; c < 2; c++) {
                    Sum& x = pairs[0][i][2 * h + c];
                    if (changed)
                        x = times_plus(share, x, pull);
                    if (a.vector && PASS == DK)
                        x += shared_sum(block.pulls, 8 * i + 2 * pair_of_lane() + c);
                    if (KIND == EXP) {
                        const int column = 8 * i + 2 * pair_of_lane() + c;
                        const Sum top = shared_sum(block.tops, PASS <= DQ ? column : row);
                        const Sum base = shared_sum(block.bases, PASS <= DQ ? row : column);
                        x *= exponential(top > base ? Sum(0) : top - base);
                    }
                    x = bits[h].get(i, c) ? x : Sum(0);
                    // a row of one key is its value: the denominator adds up what products take
                    if (PASS == OUT)
                        den[h] += as_taken(x);
                }
        }
        Weights<TOKENS / 8> weights[1];
        hold(weights[0], pairs[0]);
        const u32 z = block.z + block.part_column / PANEL * TOKENS * 128;
        if (bad) {
            // see nonfinite.cuh
            UNROLL
            for (int h = 0; h < 2; h++)
                bits[h].share(block.words + 8 * (8 * h + row_of_lane()));
            __syncwarp();
            const bool either_sign = PASS != OUT || KIND == IDENTITY;
            add_bad<TOKENS, RESULT>(sums, z, 0, TOKENS, block.words, either_sign);
            __syncthreads();
            clean<TOKENS, SIDE>(block.z, 0, TOKENS);
            __syncthreads();
        }
        multiply_weights<TOKENS, RESULT>(sums, weights, z, 0);
    }

    // Gradients of projected features become those of the tokens, and are written.
    __device__ __forceinline__ void project_back(const LinearArguments& a, const Block& block,
                                                 const Step& step, int head) {
        wait_copies<0>();
        __syncthreads();            // the rows have been read
        Projected projected(a, block, block.x, block.raw_tokens,
                            tokens_of(a, block, step, a.tokens, PASS == DQ, head));
        UNROLL
        for (int h = 0; h < 2; h++) {
            UNROLL
            for (int i = 0; i < RESULT / 8; i++)
                UNROLL
                for (int c = 0; c < 2; c++) {
                    Sum& x = projected.h[0][i][2 * h + c];
                    x = slope(a, x) * sums[0][i][2 * h + c];
                }
            Sum total = 0;
            projected.each(block, h, [&](int, Sum& x) { total += x; });
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            if (pair_of_lane() == 0)
                store_sum(block.totals, block.part * TOKENS + block.row(h), total);
        }
        projected.store(block, block.x, step.rows);
        _Pragma("unroll 1")
        for (int begin = 0; begin == 0 || (DEEP && begin < a.d); begin += SIDE) {
            __syncthreads();        // they are there, and the projection before has been read
            if (DEEP) {
                fetch_projection(a, block, 0, begin);
                commit_copies();
                wait_copies<0>();
                __syncthreads();
            }
            clear(sums);
            multiply_by(sums, block.x, block.own, block.projection, block.part_column);
            write(a, block, step, head, begin);
        }
    }

    // Denominators of a query, or 0 for an empty row, when all parts before were added.
    __device__ __forceinline__ Sum denominator(const LinearArguments& a, const Block& block,
                                               i64 line, Sum total) const {
        if (a.den_before)
            total += a.den_before[line];
        if (a.vector && a.final)
            total = larger(total, -total) <= a.least ? Sum(0) : total + a.added;
        if (a.vector && block.part_column == 0 && pair_of_lane() == 0)
            a.den[line] = total;
        return total;
    }

    // `begin`: of the columns, the first.
    __device__ __forceinline__ void write(const LinearArguments& a, const Block& block,
                                          const Step& step, int head, int begin) const {
        UNROLL
        for (int h = 0; h < 2; h++) {
            const int row = block.row(h);
            Sum share = 1;
            if (PASS == OUT && a.normalize) {
                Sum total = a.vector ? den[h] : Sum(0);
                total += __shfl_xor_sync(~0u, total, 1);
                total += __shfl_xor_sync(~0u, total, 2);
                if (row < step.rows)
                    total = denominator(a, block, (i64(block.batch) * a.heads + head) * a.n
                                                      + step.row + row, total);
                share = total == 0 ? Sum(0) : 1 / total;
            }
            if (row >= step.rows)
                continue;
            Sum total = 0;
            if (PROJECTED && KIND == EXP && (PASS == DQ || PASS == DK))
                UNROLL
                for (int part = 0; part < PARTS; part++)
                    total += shared_sum(block.totals, part * TOKENS + row);
            const i64 place = a.out.place(block.batch, head, step.row + row);
            const int width = width_of_z(a);
            UNROLL
            for (int i = 0; i < RESULT / 8; i++) {
                const int column = begin + block.part_column + 8 * i + 2 * pair_of_lane();
                if (column >= width)
                    continue;
                Sum x = sums[0][i][2 * h];
                Sum y = sums[0][i][2 * h + 1];
                if (PASS == DQ || PASS == DK) {
                    Sum token[2];
                    load_pair(a.tokens.token(block.batch, head, step.row + row) + column, token[0],
                              token[1]);
                    if (!PROJECTED) {
                        x *= slope(a, a.scale * token[0]);
                        y *= slope(a, a.scale * token[1]);
                    } else if (KIND == EXP) {
                        // forward: phi = exp(h - |x|^2 / 2)
                        x -= total * (a.scale * token[0]);
                        y -= total * (a.scale * token[1]);
                    }
                    x *= a.scale;
                    y *= a.scale;
                }
                if (!a.first) {
                    const SumPair before = *(const SumPair*)(a.partial + place + column);
                    x += before.x;
                    y += before.y;
                }
                if (!a.final) {
                    *(SumPair*)(a.partial + place + column) = SumPair{x, y};
                    continue;
                }
                if (PASS == OUT) {
                    x = share == 0 ? Sum(0) : x * share;
                    y = share == 0 ? Sum(0) : y * share;
                }
                store_raw_pair(a.out.at + place + column, x, y);
            }
        }
    }

    static __device__ __forceinline__ u64 bits_below(int count) {
        return count >= 64 ? ~u64(0) : count <= 0 ? u64(0) : (u64(1) << count) - 1;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
linear(const __grid_constant__ LinearArguments a) {
    const Block block(a);
    const Sequence sequence(a, block.batch);
    const int begin = min(int(blockIdx.y) * a.each, sequence.steps);
    const int end = min(begin + a.each, sequence.steps);
    const bool backwards = PASS >= DV;
    const int visits = (PASS <= DQ && !READS ? 1 : block.shared_heads) * (end - begin);
    auto visit_of = [&](int number) {
        const int heads = PASS <= DQ && !READS ? 1 : block.shared_heads;
        const int step = number / heads;
        return Visit{backwards ? end - 1 - step : begin + step, number % heads};
    };

    if (PROJECTED && !DEEP)
        fetch_projection(a, block, 0, 0);
    State state;
    state.load(a, a.before, blockIdx.x, CAUSAL || !READS ? blockIdx.y : 0);
    Found found;
    bool bad = false;
    if (visits > 0)
        fetch_visit(a, block, sequence.step(a, visit_of(0).number), visit_of(0));
    commit_copies();

    _Pragma("unroll 1")
    for (int number = 0; number < visits; number++) {
        const Visit visit = visit_of(number);
        const Step step = sequence.step(a, visit.number);
        const int rows_of = rows_head(a, block, visit);
        const int columns_of = columns_head(a, block, visit);
        wait_copies<0>();
        __syncthreads();            // the tiles are free; the projection is there
        if (visit.rows_are_new(a))
            take_rows(a, block, step, rows_of);
        if (visit.columns_are_new(a)) {
            take_y(a, block, step, columns_of);
            bad = !take_z(a, block, step, columns_of);
        } else if (bad) {
            // it was cleaned
            fetch_columns(a, block, step, visit, false);
            commit_copies();
            wait_copies<0>();
            take_z(a, block, step, columns_of);
        }
        if (a.normalize && (PASS == DQ || PASS == DK) && (READS || PASS == DK))
            take_denominators(a, block, step, visit);
        if (READS && visit.head == 0)
            state.publish(a, block);
        if (KIND == EXP && visit.head == 0)
            state.shrink(weigh(a, block, step));
        if (number + 1 < visits) {
            const Visit next = visit_of(number + 1);
            fetch_visit(a, block, sequence.step(a, next.number), next);
        }
        const bool projects_back = PROJECTED && READS && (PASS == DQ || PASS == DK);
        if (projects_back && visit.rows_are_new(a))
            fetch(block.raw_tokens, a.tokens, block.batch, rows_of, step.row, step.rows, a.d);
        commit_copies();
        if (CAUSAL && READS) {
            bad = __syncthreads_or(bad);
        } else {
            bad = false;            // nothing is masked
            __syncthreads();
        }

        if (visit.columns_are_new(a) && step.columns > 0)
            state.absorb(a, block);
        if (bad)
            __syncthreads();        // before it is cleaned
        if (READS) {
            if (visit.rows_are_new(a))
                found.read(a, block);
            if (CAUSAL && step.columns > 0)
                found.meet(a, block, step, bad);
            if (PASS <= DQ || visit.head == block.shared_heads - 1) {
                if (projects_back)
                    found.project_back(a, block, step, rows_of);
                else
                    found.write(a, block, step, rows_of, 0);
            }
        }
    }
    wait_copies<0>();
    state.store(a, a.after, blockIdx.x, blockIdx.y);
}
