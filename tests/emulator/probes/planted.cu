// Kernels that are right, and wrong in one way where `wrong` is set: what the emulator has to find.
#include "primitives.cuh"

enum { THREADS = 128 };

struct PlantedArguments {
    int bug;
    int wrong;
    const float* in;  // (4 THREADS,)
    float* out;       // (THREADS,)
};

enum Bug {
    MISSING_BARRIER,
    WRITE_AFTER_READ,
    MISSING_SYNCWARP,
    HALVES,
    WEAK_WAIT,
    NO_WAIT,
    COPY_INTO_READ,
    NO_SWIZZLE,
    STRIDED_ACCESS,
    ARRIVAL_COUNT,
    TOO_MANY_COME,
    HALF_A_WARP,
    CONSUMER_DOES_NOT_WAIT,
    DIVERGENT_BARRIER,
    BARRIERS_OF_BRANCHES,
    DIFFERENT_COLLECTIVES,
    COLLECTIVE_OF_SOME,
    SHARED_OUT_OF_BOUNDS,
    SHARED_MISALIGNED,
    GLOBAL_OUT_OF_BOUNDS,
    GLOBAL_BEFORE_START,
    COPY_OUT_OF_BOUNDS,
    COPY_MISALIGNED,
    READ_ONLY,
    UNINITIALISED,
    BLOCK_ORDER,
    LIVELOCK,
    RUNAWAY
};

DEVICE u32 slot(int thread) {
    return shared_base() + 4 * (thread % THREADS);
}

DEVICE float missing_barrier(const PlantedArguments& arguments, int thread) {
    store_shared(slot(thread), arguments.in[thread]);
    if (!arguments.wrong) {
        __syncthreads();
    }
    return load_shared<float>(slot(thread + 1));
}

DEVICE float write_after_read(const PlantedArguments& arguments, int thread) {
    float sum = 0;
    for (int round = 0; round < 4; round++) {
        store_shared(slot(thread), arguments.in[thread]);
        __syncthreads();
        sum += load_shared<float>(slot(thread + 64));
        if (!arguments.wrong) {
            __syncthreads();
        }
    }
    return sum / 4;
}

DEVICE float missing_syncwarp(const PlantedArguments& arguments, int thread) {
    store_shared(slot(thread), arguments.in[thread]);
    if (!arguments.wrong) {
        __syncwarp();
    }
    return load_shared<float>(slot(thread ^ 1));
}

// Two threads may write to the halves of one word, not to the same half.
DEVICE float halves(const PlantedArguments& arguments, int thread) {
    const int half = arguments.wrong ? 0 : thread & 1;
    store_shared(slot(thread / 2) + 2 * half, u16(thread));
    __syncthreads();
    return load_shared<u16>(slot(thread / 2) + 2 * half);
}

DEVICE float weak_wait(const PlantedArguments& arguments, int thread) {
    for (int stage = 0; stage < 2; stage++) {
        copy_async<4>(slot(thread) + 4 * THREADS * stage, arguments.in + stage * THREADS + thread,
                      true);
        commit_copies();
    }
    if (arguments.wrong) {
        wait_copies<1>();
    } else {
        wait_copies<0>();
    }
    __syncthreads();
    return load_shared<float>(slot(thread + 1) + 4 * THREADS);
}

DEVICE float no_wait(const PlantedArguments& arguments, int thread) {
    copy_async<16>(shared_base() + 16 * thread, arguments.in + 4 * thread, true);
    commit_copies();
    if (!arguments.wrong) {
        wait_copies<0>();
    }
    return load_shared<float>(shared_base() + 16 * thread);
}

// The next copy may not start before all have read what the last one brought.
DEVICE float copy_into_read(const PlantedArguments& arguments, int thread) {
    float sum = 0;
    for (int stage = 0; stage < 4; stage++) {
        copy_async<4>(slot(thread), arguments.in + stage * THREADS + thread, true);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        sum += load_shared<float>(slot(thread + 1));
        if (!arguments.wrong) {
            __syncthreads();
        }
    }
    return sum;
}

DEVICE float no_swizzle(const PlantedArguments& arguments, int thread) {
    const int row = thread % 32;
    const int warp = thread / 32;
    for (int chunk = 0; chunk < 8; chunk++) {
        const int place = arguments.wrong ? chunk : chunk ^ (row & 7);
        store_shared(shared_base() + 4096 * warp + 128 * row + 16 * place, make_uint4(row, 0, 0, 0));
    }
    __syncwarp();
    u32 fragments[4];
    const int place = arguments.wrong ? 3 : 3 ^ (row & 7);
    load_matrix_x4(fragments, shared_base() + 4096 * warp + 128 * row + 16 * place);
    return fragments[0];
}

DEVICE float strided_access(const PlantedArguments& arguments, int thread) {
    const int stride = arguments.wrong ? 8 : 9;
    store_shared(shared_base() + 4 * stride * thread, arguments.in[thread]);
    return load_shared<float>(shared_base() + 4 * stride * thread);
}

DEVICE float arrival_count(const PlantedArguments& arguments, int thread) {
    if (thread < 64) {
        barrier_sync(1, arguments.wrong ? 96 : 64);
    }
    return thread;
}

DEVICE float too_many_come(const PlantedArguments& arguments, int thread) {
    if (thread < (arguments.wrong ? 96 : 64)) {
        barrier_sync(2, 64);
    }
    return thread;
}

DEVICE float half_a_warp(const PlantedArguments& arguments, int thread) {
    if (arguments.wrong ? thread % 32 < 16 : thread < 64) {
        barrier_sync(3, 64);
    }
    return thread;
}

DEVICE float consumer_does_not_wait(const PlantedArguments& arguments, int thread) {
    if (thread < 64) {
        store_shared(slot(thread), arguments.in[thread]);
        barrier_arrive(4, 128);
        return 0;
    }
    if (arguments.wrong) {
        barrier_arrive(4, 128);
    } else {
        barrier_sync(4, 128);
    }
    return load_shared<float>(slot(thread - 64));
}

DEVICE float divergent_barrier(const PlantedArguments& arguments, int thread) {
    if (!arguments.wrong || thread < 64) {
        __syncthreads();
    }
    return thread;
}

DEVICE float barriers_of_branches(const PlantedArguments& arguments, int thread) {
    if (arguments.wrong && thread < 64) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    return thread;
}

DEVICE float different_collectives(const PlantedArguments& arguments, int thread) {
    if (arguments.wrong && thread % 32 < 16) {
        return __shfl_xor_sync(0xffffffffu, thread, 1);
    }
    return __shfl_sync(0xffffffffu, thread, 0);
}

DEVICE float collective_of_some(const PlantedArguments& arguments, int thread) {
    if (!arguments.wrong || thread != 5) {
        return __shfl_xor_sync(0xffffffffu, thread, 1);
    }
    return 0;
}

DEVICE float shared_out_of_bounds(const PlantedArguments& arguments, int thread) {
    const u32 last = shared_base() + 20480 - 4 * THREADS;
    store_shared(last + 4 * (thread + arguments.wrong), arguments.in[thread]);
    return thread;
}

DEVICE float shared_misaligned(const PlantedArguments& arguments, int thread) {
    store_shared(shared_base() + 16 * thread + 8 * arguments.wrong, make_float4(0, 0, 0, 0));
    return thread;
}

DEVICE float global_out_of_bounds(const PlantedArguments& arguments, int thread) {
    return arguments.in[3 * THREADS + thread + arguments.wrong];
}

DEVICE float global_before_start(const PlantedArguments& arguments, int thread) {
    arguments.out[thread - 40 * arguments.wrong] = 1;
    return thread;
}

DEVICE float copy_out_of_bounds(const PlantedArguments& arguments, int thread) {
    copy_async<16>(shared_base() + 16 * thread, arguments.in + 4 * (thread + arguments.wrong), true);
    return thread;
}

DEVICE float copy_misaligned(const PlantedArguments& arguments, int thread) {
    copy_async<16>(shared_base() + 16 * thread, arguments.in + (thread % 8) * 4 + arguments.wrong,
                   true);
    return thread;
}

DEVICE float read_only(const PlantedArguments& arguments, int thread) {
    if (arguments.wrong) {
        const_cast<float*>(arguments.in)[thread] = 0;
    }
    return thread;
}

DEVICE float uninitialised(const PlantedArguments& arguments, int thread) {
    if (!arguments.wrong) {
        store_shared(slot(thread), arguments.in[thread]);
    }
    return load_shared<float>(slot(thread));
}

// A sum that depends on which block comes first.
DEVICE float block_order(const PlantedArguments& arguments, int thread) {
    if (arguments.wrong) {
        return 2 * arguments.out[thread] + blockIdx.x;
    }
    return gridDim.x;
}

// Spins, in shared memory, for what another thread does (or nobody).
DEVICE float livelock(const PlantedArguments& arguments, int thread) {
    store_shared(slot(thread), 0.0f);
    __syncthreads();
    if (thread == 64 && !arguments.wrong) {
        store_shared(slot(0), 1.0f);
    }
    if (thread == 0) {
        while (load_shared<float>(slot(0)) == 0) {
        }
    }
    return thread;
}

DEVICE float runaway(const PlantedArguments& arguments, int thread) {
    const volatile float* flag = arguments.in;
    while (arguments.wrong && *flag >= 0) {
    }
    return thread;
}

DEVICE float run(const PlantedArguments& arguments, int thread) {
    switch (arguments.bug) {
        case MISSING_BARRIER: return missing_barrier(arguments, thread);
        case WRITE_AFTER_READ: return write_after_read(arguments, thread);
        case MISSING_SYNCWARP: return missing_syncwarp(arguments, thread);
        case HALVES: return halves(arguments, thread);
        case WEAK_WAIT: return weak_wait(arguments, thread);
        case NO_WAIT: return no_wait(arguments, thread);
        case COPY_INTO_READ: return copy_into_read(arguments, thread);
        case NO_SWIZZLE: return no_swizzle(arguments, thread);
        case STRIDED_ACCESS: return strided_access(arguments, thread);
        case ARRIVAL_COUNT: return arrival_count(arguments, thread);
        case TOO_MANY_COME: return too_many_come(arguments, thread);
        case HALF_A_WARP: return half_a_warp(arguments, thread);
        case CONSUMER_DOES_NOT_WAIT: return consumer_does_not_wait(arguments, thread);
        case DIVERGENT_BARRIER: return divergent_barrier(arguments, thread);
        case BARRIERS_OF_BRANCHES: return barriers_of_branches(arguments, thread);
        case DIFFERENT_COLLECTIVES: return different_collectives(arguments, thread);
        case COLLECTIVE_OF_SOME: return collective_of_some(arguments, thread);
        case SHARED_OUT_OF_BOUNDS: return shared_out_of_bounds(arguments, thread);
        case SHARED_MISALIGNED: return shared_misaligned(arguments, thread);
        case GLOBAL_OUT_OF_BOUNDS: return global_out_of_bounds(arguments, thread);
        case GLOBAL_BEFORE_START: return global_before_start(arguments, thread);
        case COPY_OUT_OF_BOUNDS: return copy_out_of_bounds(arguments, thread);
        case COPY_MISALIGNED: return copy_misaligned(arguments, thread);
        case READ_ONLY: return read_only(arguments, thread);
        case UNINITIALISED: return uninitialised(arguments, thread);
        case BLOCK_ORDER: return block_order(arguments, thread);
        case LIVELOCK: return livelock(arguments, thread);
        case RUNAWAY: return runaway(arguments, thread);
    }
    return -1;
}

extern "C" __global__ void __launch_bounds__(THREADS)
planted(const __grid_constant__ PlantedArguments arguments) {
    arguments.out[threadIdx.x] = run(arguments, threadIdx.x);
}
