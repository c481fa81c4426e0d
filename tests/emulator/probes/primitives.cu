// Each primitive by itself, on numbers from global memory: for comparison with NumPy, and on a GPU.
#include "primitives.cuh"

struct ProbeArguments {
    int probe;
    int parameter;
    const void* in;
    const void* second;
    void* out;
};

enum Probe {
    MMA_F16,
    MMA_BF16,
    MMA_TF32,
    MMA_F64,
    MATRICES_F16,
    LOAD_MATRIX,
    LOAD_MATRIX_TRANSPOSED,
    SHUFFLES,
    SHUFFLES_F64,
    VOTES,
    BLOCK_VOTES,
    COPIES,
    SHARED_TYPES,
    FORMATS,
    APPROXIMATIONS,
    INTEGERS,
    NAMED_BARRIERS
};

// The 16-bit elements of two places, as a fragment holds them.
DEVICE u32 pair_of(const u16* elements, int first, int second) {
    return elements[first] | u32(elements[second]) << 16;
}

// Matrices a (16 x 16) and b (16 x 8), row by row; out (16 x 8) is increased by their product.
DEVICE void mma_16_bits(const ProbeArguments& arguments, int lane, bool bfloat) {
    const u16* a = static_cast<const u16*>(arguments.in);
    const u16* b = static_cast<const u16*>(arguments.second);
    float* out = static_cast<float*>(arguments.out);
    const int group = lane / 4;
    const int pair = lane % 4 * 2;
    u32 fragments[4];
    for (int i = 0; i < 4; i++) {
        const int at = (group + i % 2 * 8) * 16 + pair + i / 2 * 8;
        fragments[i] = pair_of(a, at, at + 1);
    }
    const u32 b0 = pair_of(b, pair * 8 + group, (pair + 1) * 8 + group);
    const u32 b1 = pair_of(b, (pair + 8) * 8 + group, (pair + 9) * 8 + group);
    float sums[4];
    for (int i = 0; i < 4; i++) {
        sums[i] = out[(group + i / 2 * 8) * 8 + pair + i % 2];
    }
    if (bfloat) {
        mma_bf16(sums, fragments, b0, b1);
    } else {
        mma_f16(sums, fragments, b0, b1);
    }
    for (int i = 0; i < 4; i++) {
        out[(group + i / 2 * 8) * 8 + pair + i % 2] = sums[i];
    }
}

// Matrices a (16 x 8) and b (8 x 8), row by row.
DEVICE void mma_tf32_alone(const ProbeArguments& arguments, int lane) {
    const u32* a = static_cast<const u32*>(arguments.in);
    const u32* b = static_cast<const u32*>(arguments.second);
    float* out = static_cast<float*>(arguments.out);
    const int group = lane / 4;
    const int column = lane % 4;
    u32 fragments[4];
    for (int i = 0; i < 4; i++) {
        fragments[i] = a[(group + i % 2 * 8) * 8 + column + i / 2 * 4];
    }
    float sums[4];
    for (int i = 0; i < 4; i++) {
        sums[i] = out[(group + i / 2 * 8) * 8 + column * 2 + i % 2];
    }
    mma_tf32(sums, fragments, b[column * 8 + group], b[(column + 4) * 8 + group]);
    for (int i = 0; i < 4; i++) {
        out[(group + i / 2 * 8) * 8 + column * 2 + i % 2] = sums[i];
    }
}

// Matrices a (8 x 4) and b (4 x 8), row by row.
DEVICE void mma_f64_alone(const ProbeArguments& arguments, int lane) {
    const double* a = static_cast<const double*>(arguments.in);
    const double* b = static_cast<const double*>(arguments.second);
    double* out = static_cast<double*>(arguments.out);
    const int group = lane / 4;
    const int column = lane % 4;
    double sums[2] = {out[group * 8 + column * 2], out[group * 8 + column * 2 + 1]};
    mma_f64(sums, a[group * 4 + column], b[column * 8 + group]);
    out[group * 8 + column * 2] = sums[0];
    out[group * 8 + column * 2 + 1] = sums[1];
}

// The address of a 16-byte chunk in a tile of rows of 64 halves.
DEVICE u32 swizzled(u32 tile, int row, int chunk) {
    return tile + 128 * row + 16 * (chunk ^ (row & 7));
}

// As kernels do it: a (16 x 64) b (64 x 8)^T and so on, by copies, swizzled tiles and ldmatrix.
// in: rows (32 x 64) of halves; second: (64 x 16), of which columns are taken by transposed loads.
// out (32 x 16) = in second.
DEVICE void matrices_f16(const ProbeArguments& arguments, int thread) {
    const u16* a = static_cast<const u16*>(arguments.in);
    const u16* b = static_cast<const u16*>(arguments.second);
    float* out = static_cast<float*>(arguments.out);
    const u32 rows = shared_base();
    const u32 columns = rows + 32 * 128;
    for (int chunk = thread; chunk < 32 * 8; chunk += 64) {
        copy_async<16>(swizzled(rows, chunk / 8, chunk % 8), a + 8 * chunk, true);
    }
    for (int chunk = thread; chunk < 64 * 8; chunk += 64) {
        const bool given = chunk % 8 < 2;
        copy_async<16>(swizzled(columns, chunk / 8, chunk % 8),
                       b + 16 * (chunk / 8) + 8 * (given ? chunk % 8 : 0), given);
    }
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    const int warp = thread / 32;
    const int lane = thread % 32;
    float sums[2][4] = {};
    for (int step = 0; step < 4; step++) {
        u32 left[4];
        u32 right[4];
        load_matrix_x4(left, swizzled(rows, 16 * warp + lane % 16, 2 * step + lane / 16));
        load_matrix_x4_transposed(right, swizzled(columns, 16 * step + lane % 16, lane / 16));
        mma_f16(sums[0], left, right[0], right[1]);
        mma_f16(sums[1], left, right[2], right[3]);
    }
    for (int half = 0; half < 2; half++) {
        for (int i = 0; i < 4; i++) {
            const int row = 16 * warp + lane / 4 + i / 2 * 8;
            out[row * 16 + 8 * half + lane % 4 * 2 + i % 2] = sums[half][i];
        }
    }
}

// Rows of 16 bytes, one a lane; out: a lane's four registers.
DEVICE void load_matrix(const ProbeArguments& arguments, int lane, bool transposed) {
    store_shared(shared_base() + 16 * lane, static_cast<const uint4*>(arguments.in)[lane]);
    __syncwarp();
    u32 fragments[4];
    if (transposed) {
        load_matrix_x4_transposed(fragments, shared_base() + 16 * lane);
    } else {
        load_matrix_x4(fragments, shared_base() + 16 * lane);
    }
    for (int i = 0; i < 4; i++) {
        static_cast<u32*>(arguments.out)[4 * lane + i] = fragments[i];
    }
}

// out (4 x 32): xor, from one lane, down, up.
template <class T>
DEVICE void shuffles(const ProbeArguments& arguments, int lane) {
    const T own = static_cast<const T*>(arguments.in)[lane];
    T* out = static_cast<T*>(arguments.out);
    out[lane] = __shfl_xor_sync(0xffffffffu, own, arguments.parameter);
    out[32 + lane] = __shfl_sync(0xffffffffu, own, arguments.parameter);
    out[64 + lane] = __shfl_down_sync(0xffffffffu, own, arguments.parameter);
    out[96 + lane] = __shfl_up_sync(0xffffffffu, own, arguments.parameter);
}

DEVICE void votes(const ProbeArguments& arguments, int lane) {
    const int own = static_cast<const int*>(arguments.in)[lane];
    u32* out = static_cast<u32*>(arguments.out);
    out[lane] = __ballot_sync(0xffffffffu, own);
    out[32 + lane] = __any_sync(0xffffffffu, own);
    out[64 + lane] = __all_sync(0xffffffffu, own);
}

// Rounds of votes of all threads, of which some rounds have one that is not 0.
DEVICE void block_votes(const ProbeArguments& arguments, int thread) {
    const int* in = static_cast<const int*>(arguments.in);
    int* out = static_cast<int*>(arguments.out);
    for (int round = 0; round < 4; round++) {
        out[64 * round + thread] = __syncthreads_or(in[64 * round + thread]) != 0;
    }
}

// Threads copy 4, 8 and 16 bytes, every third one zeros.
DEVICE void copies(const ProbeArguments& arguments, int lane) {
    const u8* in = static_cast<const u8*>(arguments.in);
    const u32 base = shared_base();
    const bool valid = lane % 3 != 2;
    copy_async<4>(base + 4 * lane, in + 4 * lane, valid);
    commit_copies();
    copy_async<8>(base + 128 + 8 * lane, in + 128 + 8 * lane, valid);
    copy_async<16>(base + 384 + 16 * lane, valid ? in + 384 + 16 * lane : nullptr, valid);
    commit_copies();
    wait_copies<1>();
    __syncwarp();
    u32* out = static_cast<u32*>(arguments.out);
    out[lane] = load_shared<u32>(base + 4 * (31 - lane));
    wait_copies<0>();
    __syncwarp();
    for (int word = 32 + lane; word < 224; word += 32) {
        out[word] = load_shared<u32>(base + 4 * word);
    }
}

// Bytes go through shared memory as each of the types.
template <class T>
DEVICE void pass(const ProbeArguments& arguments, int lane, int bytes_before) {
    const T value = static_cast<const T*>(arguments.in)[lane];
    const u32 place = shared_base() + sizeof(T) * lane;
    __syncwarp();
    store_shared(place, value);
    T* out = reinterpret_cast<T*>(static_cast<u8*>(arguments.out) + bytes_before);
    out[lane] = load_shared<T>(place);
}

DEVICE void shared_types(const ProbeArguments& arguments, int lane) {
    pass<u16>(arguments, lane, 0);
    pass<u32>(arguments, lane, 512);
    pass<float>(arguments, lane, 1024);
    pass<u64>(arguments, lane, 1536);
    pass<double>(arguments, lane, 2048);
    pass<float2>(arguments, lane, 2560);
    pass<uint2>(arguments, lane, 3072);
    pass<uint4>(arguments, lane, 3584);
    pass<double2>(arguments, lane, 4096);
}

// in: `parameter` floats. out (5 x parameter): words that hold each one as f16, as bf16, both of
// these as floats again, and as TF32.
DEVICE void formats(const ProbeArguments& arguments, int lane) {
    const float* in = static_cast<const float*>(arguments.in);
    u32* out = static_cast<u32*>(arguments.out);
    const int count = arguments.parameter;
    for (int i = lane; i < count; i += 32) {
        const float next = in[(i + 1) % count];
        out[i] = pack_f16(in[i], next);
        out[count + i] = pack_bf16(in[i], next);
        out[2 * count + i] = __float_as_uint(unpack_f16(out[i]));
        out[3 * count + i] = __float_as_uint(unpack_bf16(out[count + i] & 0xffff));
        out[4 * count + i] = round_tf32(in[i]);
    }
}

DEVICE void approximations(const ProbeArguments& arguments, int lane) {
    const float* in = static_cast<const float*>(arguments.in);
    float* out = static_cast<float*>(arguments.out);
    const int count = arguments.parameter;
    for (int i = lane; i < count; i += 32) {
        out[i] = exp2_approx(in[i]);
        out[count + i] = log2_approx(in[i]);
        out[2 * count + i] = reciprocal_approx(in[i]);
    }
}

DEVICE void integers(const ProbeArguments& arguments, int lane) {
    const u64 x = static_cast<const u64*>(arguments.in)[lane];
    const u64 y = static_cast<const u64*>(arguments.second)[lane];
    u64* out = static_cast<u64*>(arguments.out);
    out[lane] = __popc(u32(x));
    out[32 + lane] = __popcll(x);
    out[64 + lane] = __ffs(int(x));
    out[96 + lane] = __ffsll(i64(x));
    out[128 + lane] = __umulhi(u32(x), u32(y));
    out[160 + lane] = __clz(int(x));
    out[192 + lane] = __brev(u32(x));
    out[224 + lane] = min(x, y);
    out[256 + lane] = max(x, y);
}

// Two warps fill a slot each round, two others empty it.
DEVICE void named_barriers(const ProbeArguments& arguments, int thread) {
    const u32 slot = shared_base() + 4 * (thread % 64);
    u32* out = static_cast<u32*>(arguments.out);
    for (int round = 0; round < 4; round++) {
        if (thread < 64) {
            if (round > 0) {
                barrier_sync(2, 128);
            }
            store_shared(slot, u32(100 * round + thread));
            barrier_arrive(1, 128);
        } else {
            barrier_sync(1, 128);
            out[64 * round + thread - 64] = load_shared<u32>(shared_base() + 4 * (127 - thread));
            if (round < 3) {
                barrier_arrive(2, 128);
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(128)
primitives(const __grid_constant__ ProbeArguments arguments) {
    const int thread = threadIdx.x;
    switch (arguments.probe) {
        case MMA_F16: mma_16_bits(arguments, thread, false); break;
        case MMA_BF16: mma_16_bits(arguments, thread, true); break;
        case MMA_TF32: mma_tf32_alone(arguments, thread); break;
        case MMA_F64: mma_f64_alone(arguments, thread); break;
        case MATRICES_F16: matrices_f16(arguments, thread); break;
        case LOAD_MATRIX: load_matrix(arguments, thread, false); break;
        case LOAD_MATRIX_TRANSPOSED: load_matrix(arguments, thread, true); break;
        case SHUFFLES: shuffles<float>(arguments, thread); break;
        case SHUFFLES_F64: shuffles<double>(arguments, thread); break;
        case VOTES: votes(arguments, thread); break;
        case BLOCK_VOTES: block_votes(arguments, thread); break;
        case COPIES: copies(arguments, thread); break;
        case SHARED_TYPES: shared_types(arguments, thread); break;
        case FORMATS: formats(arguments, thread); break;
        case APPROXIMATIONS: approximations(arguments, thread); break;
        case INTEGERS: integers(arguments, thread); break;
        case NAMED_BARRIERS: named_barriers(arguments, thread); break;
    }
}
