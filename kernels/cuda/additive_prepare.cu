// additive_prepare.cu -- exponentials of queries or keys, from which additive.cuh has tanhs.
//
// A block does TILE tokens and FEATURES features, and turns them: lanes read features, and write
// tokens side by side.
#include "additive.cuh"

// so d e of additive.cuh is below 2^93, and there is room for weights up to 2^34
#define WILD 8.0f
// below this the exponential is so near to 1 that tanh would lose digits
#define LARGE 0.5f

struct PrepareArguments {
    Features x;             // what is written to are its own planes
    float* powers;
    float* rises;           // or 0
    u32* wild;
    u32* large;
    const int* lengths;     // (batch,)
    int a, chunks;
};

enum { TURNED = TILE + 1, WARPS = THREADS / 32 };

extern "C" __global__ void __launch_bounds__(THREADS)
additive_prepare(const __grid_constant__ PrepareArguments a) {
    const i64 number = blockIdx.x;
    const int chunk = number % a.chunks;
    const int tile = number / a.chunks % a.x.tiles;
    const int head = number / a.chunks / a.x.tiles % a.x.heads;
    const int batch = number / a.chunks / a.x.tiles / a.x.heads;
    const int feature = chunk * FEATURES + lane_number();
    const int tokens = feature < a.a ? a.lengths[batch] - tile * TILE : 0;
    const float* from = a.x.at + batch * a.x.b + head * a.x.h + tile * TILE * a.x.n + feature;
    const u32 powers = shared_base();
    const u32 rises = powers + FEATURES * TURNED * 4;
    const u32 marks = rises + FEATURES * TURNED * 4;
    const int warp = threadIdx.x / 32;

    bool wild = false;
    bool large = false;
    for (int token = warp; token < TILE; token += WARPS) {
        // what is not there is met by nobody, and may be anything that is finite
        float x = token < tokens ? from[token * a.x.n] : 0;
        const bool tame = fabsf(x) <= WILD;
        wild |= !tame;
        large |= !(fabsf(x) <= LARGE);
        x = tame ? x : 0;
        const u32 at = (lane_number() * TURNED + token) * 4;
        store_shared(powers + at, expf(2 * x));
        store_shared(rises + at, expm1f(2 * x));
    }
    const u32 some_wild = __ballot_sync(~0u, wild);
    const u32 some_large = __ballot_sync(~0u, large);
    if (lane_number() == 0)
        store_shared(marks + warp * 8, uint2{some_wild, some_large});
    __syncthreads();

    for (int i = threadIdx.x; i < PLANE; i += THREADS) {
        const u32 at = (i / TILE * TURNED + i % TILE) * 4;
        a.powers[number * PLANE + i] = load_shared<float>(powers + at);
        if (a.rises)
            a.rises[number * PLANE + i] = load_shared<float>(rises + at);
    }
    if (threadIdx.x == 0) {
        uint2 all = {0, 0};
        for (int other = 0; other < WARPS; other++) {
            const uint2 mark = load_shared<uint2>(marks + other * 8);
            all.x |= mark.x;
            all.y |= mark.y;
        }
        a.wild[number] = all.x;
        a.large[number] = all.y;
    }
}
