// What slice pack and merge and the reduction are told to do.
#pragma once

#include <stdint.h>

#include "../functors/feistel.h"

namespace agora {

struct PackTask {
    const float* flat;
    float* packed;
    Permutation permutation;
    int64_t first;  // position of packed block 0 in the permutation
};

struct MergeTask {
    float* flat;
    const float* snapshot;  // null when overwriting
    const float* average;
    Permutation permutation;
    int64_t first;
    int64_t start, stop;  // floats of the packed buffer that were averaged
    int mode;
};

// What a look at one chunk of a part found.
struct Verdict {
    double norm2;
    int bad;
};

struct ReduceTask {
    float* sum;
    const void* part;
    int64_t n;
    int part_dtype;
    float weight;
    Verdict* verdicts;  // one a chunk
};

struct FinishTask {
    const float* sum;
    float* out;
    float weight_sum;
};

constexpr int64_t kReduceChunk = 4096;  // elements of one verdict: fixed, so that norms are reproducible

}  // namespace agora
