// CUDA launchers of the generator and of the boundary's kernels; see launch.h.
#pragma once

#include <stdint.h>

namespace agora::cuda {

int fill(float* out, int64_t n, uint64_t seed, uint64_t stream_number, float factor, void* stream);
int rows(void* out, int out_dtype, const int64_t* ids, int64_t count, int64_t d, uint64_t seed, float factor,
         void* stream);

// U in the form in which tensor cores read it, for h of a dtype. 0 numbers: they are not used for these.
int64_t prepared_numbers(int h_dtype, int basis_dtype, int64_t d, int64_t k);
int prepare_basis(const void* basis, int basis_dtype, void* prepared, int h_dtype, int64_t d, int64_t k,
                  void* stream);

struct Expand {
    const void* c;
    const void* basis;
    const void* prepared;  // null: plain arithmetic
    const int64_t* ids;    // null: the table is given
    const void* table;     // of h's dtype
    void* h;
    int64_t rows, d, k;
    int c_dtype, basis_dtype, h_dtype;
    uint64_t seed;
    float factor;
};
int expand(const Expand& task, void* stream);

struct Project {
    const void* h;
    const void* table;  // of h's dtype, or null
    const void* basis;
    const void* prepared;  // null: plain arithmetic
    float* scratch;        // scratch_numbers
    void* out;             // of any alignment
    int64_t rows, d, k;
    int h_dtype, basis_dtype, out_dtype;
};
int64_t scratch_numbers(int64_t rows, int64_t d, int64_t k);
int project(const Project& task, void* stream);

int wire_pack(const void* c, int c_dtype, void* out, int wire, int64_t rows, int64_t k, void* stream);

// How project's sums lie in its scratch: `spans` parts of d, each [rows, columns] padded to whole tiles.
struct Partial {
    int64_t spans, chunks_each, rows, columns;
};
Partial partial_of(int64_t rows, int64_t d, int64_t k);

// Without tensor cores: any dtype, any d and k. project_plain writes the scratch only.
int expand_plain(const Expand& task, void* stream);
int project_plain(const Project& task, void* stream);

}  // namespace agora::cuda
