// What the generator and the boundary's kernels are told to do.
#pragma once

#include <stdint.h>

namespace agora {

// Values of F or of a genesis tensor. Row r of `out` is table row `ids[r]`; without ids `out` is flat.
struct NormalTask {
    void* out;
    int out_dtype;
    const int64_t* ids;
    int64_t columns;
    uint64_t seed, stream;
    float factor;
    bool bypass;  // the caches: `out` is larger than they are
};

// h = c U^T + table, where the table is given, or made from ids.
struct ExpandTask {
    const void* c;
    const float* basis;  // panels of U^T; `pairs`: of pairs
    const int64_t* ids;
    const void* table;  // of h's dtype; null: rows of F
    void* h;
    int64_t rows, d, k, block;
    int c_dtype, h_dtype;
    uint64_t seed;
    float factor;
    bool bypass;
    bool pairs;  // c and U are bf16, and U's layout is one of pairs
};

// out = (h - table) U.
struct ProjectTask {
    const void* h;
    const void* table;          // of h's dtype, or null
    const float *basis, *last;  // rows of U's whole_columns, and its last kLast columns as rows
    void* out;                  // of any alignment
    int64_t rows, d, k, block;
    int h_dtype, out_dtype;  // kInt8: `rows` scales, then the codes
    bool pairs;              // h and U are bf16, nothing is subtracted, and U's layouts are of pairs
};

// c in its form on the wire.
struct WireTask {
    const void* c;
    void* out;  // of any alignment
    int64_t rows, k;
    int c_dtype, wire;
};

// W <- U (U^T W) for panels of W's columns.
struct SubspaceTask {
    void* w;
    const float* basis;  // rows of U
    int64_t d, n, k, panel;
    int w_dtype;
    bool bypass;
};

// Layouts of U, padded with zeros to whole vectors of any instruction set. Their units are four bytes: a
// number in fp32, or a pair of bf16 that are neighbours along the sum.
constexpr int64_t kPad = 16;    // units to which a row of U, or of U^T, is padded
constexpr int64_t kPanel = 48;  // columns of U^T that lie together: for each, k rows (of units) of kPanel
constexpr int64_t kLast = 3;    // columns of U that project also has as rows (see last_columns)

constexpr int64_t padded(int64_t n, int64_t unit = kPad) { return (n + unit - 1) / unit * unit; }

// Columns of U that project may read as rows of U, on any instruction set: the few past whole vectors are
// read from the last columns.
constexpr int64_t whole_columns(int64_t k) { return k % kPad <= kLast ? k - k % kPad : k; }

constexpr int64_t kMaxK = 1024;    // checked by the bindings: bounds stacks
constexpr int64_t kRowGroup = 8;   // rows are split over threads in multiples of this
constexpr int64_t kMaxBlock = 64;  // rows of a unit of expand and project, which share a panel of U in L2
constexpr int64_t kBlockFloats = kMaxBlock * 256;  // sums of one unit of project
constexpr int64_t kFillChunk = 4096;               // elements of one unit of a flat fill
constexpr int64_t kMaxPanel = 192;                 // columns of a unit of subspace_weights
constexpr int64_t kPanelFloats = 48 * kMaxK;       // products of one unit of subspace_weights

}  // namespace agora
