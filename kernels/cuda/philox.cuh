// philox.cuh -- Philox4x32-10, the counter-based generator behind dropout: Salmon, Moraes, Dror, Shaw,
// "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3. All backends draw the same.
#pragma once
#include "primitives.cuh"

DEVICE uint4 philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 key0, u32 key1) {
    _Pragma("unroll 1")
    for (int round = 0; round < 10; round++) {
        const u64 a = u64(0xD2511F53u) * c0;
        const u64 b = u64(0xCD9E8D57u) * c2;
        c0 = u32(b >> 32) ^ c1 ^ key0;
        c1 = u32(b);
        c2 = u32(a >> 32) ^ c3 ^ key1;
        c3 = u32(a);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    uint4 words;
    words.x = c0;
    words.y = c1;
    words.z = c2;
    words.w = c3;
    return words;
}
