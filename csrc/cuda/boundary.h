// CUDA launchers of the generator, expand and project; see launch.h.
#pragma once

#include <stdint.h>

namespace agora::cuda {

int fill(float* out, int64_t n, uint64_t seed, uint64_t stream_number, float factor, void* stream);
int rows(float* out, const int64_t* ids, int64_t count, int64_t d, uint64_t seed, float factor, void* stream);
int expand(const void* c, int c_dtype, const void* basis, int basis_dtype, const int64_t* ids, void* h,
           int h_dtype, int64_t rows, int64_t d, int64_t k, uint64_t seed, float factor, void* stream);
int project(const void* dh, int dh_dtype, const void* basis, int basis_dtype, void* out, int out_dtype,
            int64_t rows, int64_t d, int64_t k, void* stream);

}  // namespace agora::cuda
