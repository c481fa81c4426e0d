// edges_kept.cuh -- what the backward keeps of each edge and head, between its two passes.
#pragma once
#include "element.cuh"

// The weight of an edge that has no say.
#define NOT_SEEN -1

struct alignas(2 * sizeof(Sum)) Kept {
    Sum weight;
    Sum dproduct;           // gradient of scale q.k
};
