// What the CUDA launchers offer to the bindings. All pointers are device memory; the launch is asynchronous
// on `stream`; the result is what cudaGetLastError says after it (0: launched).
#pragma once

#include <stdint.h>

namespace agora::cuda {

struct Verdict {
    double norm2;
    double bad;
};

int fill(float* out, int64_t n, uint64_t seed, uint64_t stream_number, float factor, void* stream);
int rows(float* out, const int64_t* ids, int64_t count, int64_t d, uint64_t seed, float factor, void* stream);
int expand(const void* c, int c_dtype, const void* basis, int basis_dtype, const int64_t* ids, void* h,
           int h_dtype, int64_t rows, int64_t d, int64_t k, uint64_t seed, float factor, void* stream);
int project(const void* dh, int dh_dtype, const void* basis, int basis_dtype, void* out, int out_dtype,
            int64_t rows, int64_t d, int64_t k, void* stream);
int pack(const float* flat, float* packed, int64_t blocks, int64_t first, int64_t count, uint64_t key,
         void* stream);
int merge(float* flat, const float* snapshot, const float* average, int64_t blocks, int64_t first,
          uint64_t key, int64_t start, int64_t stop, int mode, void* stream);
// `verdicts`: one for each 4096 elements.
int inspect(const void* part, int part_dtype, int64_t n, float weight, Verdict* verdicts, void* stream);
int add(float* sum, const void* part, int part_dtype, int64_t n, float weight, void* stream);
int finish(const float* sum, float* out, int64_t n, float weight_sum, void* stream);
const char* error_text(int error);

}  // namespace agora::cuda
