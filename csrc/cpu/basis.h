// U as the boundary's kernels read it: in units of fp32 or of pairs of bf16 (boundary_tasks.h), on cache
// lines, padded with zeros to whole vectors.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>

#include "boundary_tasks.h"

namespace agora {

// Gives the memory back, to be kept for the next layout of that size.
struct Return {
    size_t bytes = 0;
    void operator()(float* memory) const;
};
using Layout = std::unique_ptr<float[], Return>;

// U [d, k] of any dtype, row after row.
struct Basis {
    const void* u;
    int dtype;
    int64_t d, k;
};

// All throw std::bad_alloc.
// The first `columns` of U: padded(d, kRowGroup) rows of padded(columns).
Layout rows_of(const Basis& basis, int64_t columns);
Layout panels_of(const Basis& basis);     // U^T in panels of kPanel columns: for each, k rows of kPanel
Layout last_columns(const Basis& basis);  // the last kLast columns as rows of padded(d); short k: zeros first

// The same of a U of bf16, with d (of panels: k) halved: rows 2i and 2i + 1 of U (of U^T) make row i of
// pairs.
Layout pair_rows_of(const Basis& basis, int64_t columns);
Layout pair_panels_of(const Basis& basis);
Layout pair_last_columns(const Basis& basis);

}  // namespace agora
