// What slice pack and merge and the reduction are told to do.
#pragma once

#include <stdint.h>

#include "../functors/slices.h"

namespace agora {

// Which blocks of which tensors a packed buffer holds.
struct SliceOf {
    const TensorRow* table;
    int64_t tensors;
    Permutation permutation;
    int64_t first;  // position of packed block 0 in the permutation
};

struct PackTask {
    SliceOf slice;
    const TensorRow* consensus;  // of int8; the same lengths as the weights
    void* packed;
    float* snapshot;  // null: not wanted
    int dtype;        // of `packed`
    bool bypass;      // the caches: what is written is larger than they are
};

struct MergeTask {
    SliceOf slice;
    const TensorRow* drift;      // null but for EMA
    const TensorRow* consensus;  // null: not kept
    const TensorRow* compute;    // null: no copy in a smaller dtype
    const float* snapshot;       // null when overwriting
    const void* average;
    int64_t start, stop;  // elements of the packed buffer that were averaged
    int average_dtype, compute_dtype, mode;
    float mu;
};

// What a look at one chunk of a part found.
struct Verdict {
    double norm2;
    int bad;
};

// out = sum + weight * part, where `out` may be `sum`, or null: only the look.
struct ReduceTask {
    const float* sum;
    float* out;
    const void* part;
    int64_t n;
    int part_dtype;
    float weight;
    Verdict* verdicts;  // one a chunk; null: no look
    bool bypass;        // the caches: `out` is larger than they are
};

// Numbers of a part into the form in which they travel, or back. fp32 lies at any address.
struct PartTask {
    const void* from;
    void* to;
    int64_t n;
    int dtype;  // of the coded side: bf16 or int8
};

struct FinishTask {
    const float* sum;
    float* out;
    float weight_sum;
};

// Elements of one verdict: fixed, so that norms are reproducible; a part's chunk stays in L1.
constexpr int64_t kReduceChunk = 4096;
static_assert(kReduceChunk % kBlock == 0, "a chunk is a whole number of int8 blocks");

}  // namespace agora
