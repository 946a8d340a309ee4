// CUDA launchers of slices and reductions; see launch.h. Tables of tensors lie on the device too.
#pragma once

#include <stdint.h>

#include "../functors/slices.h"

namespace agora::cuda {

struct Verdict {
    double norm2;
    double bad;
};

// What a packed buffer holds.
struct Slice {
    const TensorRow* table;
    int64_t tensors, blocks, first, count;
    uint64_t key;
};

struct Merge {
    const TensorRow *drift, *consensus, *compute;  // null: not there
    const float* snapshot;
    const void* average;
    int64_t start, stop;  // elements of the packed buffer that were averaged
    int average_dtype, compute_dtype, mode;
    float mu;
};

int pack(const Slice& slice, const TensorRow* consensus, void* packed, int dtype, float* snapshot,
         void* stream);
int merge(const Slice& slice, const Merge& merge, void* stream);
// `verdicts`: one for each 4096 elements.
int inspect(const void* part, int part_dtype, int64_t n, float weight, Verdict* verdicts, void* stream);
// out = sum + weight * part unless `verdict` (the sum of all verdicts) is bad; `out` may be `sum`.
int add(const float* sum, const void* part, float* out, int64_t n, int part_dtype, float weight,
        const Verdict* verdict, void* stream);
int finish(const float* sum, float* out, int64_t n, float weight_sum, void* stream);

}  // namespace agora::cuda
