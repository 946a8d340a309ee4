// The CPU kernels as one table of functions per instruction set.
//
// A kernel works on units [begin, end) of a task; the caller splits the units over threads. What a unit is
// stands beside each function. Results do not depend on how units were split.
#pragma once

#include <stdint.h>

#include "../functors/feistel.h"

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

constexpr int64_t kRowGroup = 4;        // rows that expand and project handle together
constexpr int64_t kPad = 32;            // floats to which basis rows are padded
constexpr int64_t kReduceChunk = 4096;  // elements of one verdict: fixed, so that norms are reproducible
constexpr int64_t kFillChunk = 4096;    // elements of one unit of a flat fill

struct CpuKernels {
    const char* name;
    void (*fill)(const NormalTask&, int64_t begin, int64_t end);      // chunks of a flat vector
    void (*rows)(const NormalTask&, int64_t begin, int64_t end);      // rows of a table
    void (*expand)(const ExpandTask&, int64_t begin, int64_t end);    // groups of kRowGroup rows
    void (*project)(const ProjectTask&, int64_t begin, int64_t end);  // groups of kRowGroup rows
    void (*pack)(const PackTask&, int64_t begin, int64_t end);        // packed blocks
    void (*merge)(const MergeTask&, int64_t begin, int64_t end);      // packed blocks
    void (*inspect)(const ReduceTask&, int64_t begin, int64_t end);   // chunks
    void (*add)(const ReduceTask&, int64_t begin, int64_t end);       // elements
    void (*finish)(const FinishTask&, int64_t begin, int64_t end);    // elements
};

extern const CpuKernels baseline_kernels;
#if defined(__x86_64__)
extern const CpuKernels avx2_kernels;
extern const CpuKernels avx512_kernels;
#endif

}  // namespace agora
