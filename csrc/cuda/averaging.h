// CUDA launchers of slices and reductions; see launch.h.
#pragma once

#include <stdint.h>

namespace agora::cuda {

struct Verdict {
    double norm2;
    double bad;
};

int pack(const float* flat, float* packed, int64_t blocks, int64_t first, int64_t count, uint64_t key,
         void* stream);
int merge(float* flat, const float* snapshot, const float* average, int64_t blocks, int64_t first,
          uint64_t key, int64_t start, int64_t stop, int mode, void* stream);
// `verdicts`: one for each 4096 elements.
int inspect(const void* part, int part_dtype, int64_t n, float weight, Verdict* verdicts, void* stream);
int add(float* sum, const void* part, int part_dtype, int64_t n, float weight, void* stream);
int finish(const float* sum, float* out, int64_t n, float weight_sum, void* stream);

}  // namespace agora::cuda
