// What the generator, expand and project are told to do.
#pragma once

#include <stdint.h>

namespace agora {

// Values of F or of a genesis tensor. Row r of `out` is table row `ids[r]`, or r itself without ids.
struct NormalTask {
    float* out;
    const int64_t* ids;
    int64_t columns;
    uint64_t seed, stream;
    float factor;
};

// h = c * U^T + F[ids]. `basis` is U transposed to fp32 rows of `stride` floats (columns padded by zeros).
struct ExpandTask {
    const void* c;
    void* h;
    const float* basis;
    const int64_t* ids;
    int64_t rows, d, k, stride;
    int c_dtype, h_dtype;
    uint64_t seed;
    float factor;
};

// out = dh * U. `basis` is U in fp32 rows of `stride` floats (columns padded by zeros).
struct ProjectTask {
    const void* dh;
    void* out;
    const float* basis;
    int64_t rows, d, k, stride;
    int dh_dtype, out_dtype;
};

constexpr int64_t kRowGroup = 4;      // rows that expand and project handle together
constexpr int64_t kPad = 32;          // floats to which basis rows are padded
constexpr int64_t kFillChunk = 4096;  // elements of one unit of a flat fill

}  // namespace agora
