#include "basis.h"

#include <stdlib.h>

#include <algorithm>
#include <new>

#include "../functors/common.h"

namespace agora {
namespace {

Layout zeros(int64_t floats) {
    size_t bytes = size_t(padded(floats)) * sizeof(float);
    void* memory = aligned_alloc(64, bytes);
    if (memory == nullptr) throw std::bad_alloc();
    memset(memory, 0, bytes);
    return Layout(static_cast<float*>(memory));
}

// U's number (i, j) goes to place i * down + j * right.
template <typename From>
void spread(float* out, const From* u, int64_t d, int64_t k, int64_t stride, int64_t down, int64_t right) {
    for (int64_t i = 0; i < d; i++) {
        if (right == 1)
            for (int64_t j = 0; j < k; j++) out[i * down + j] = load(u[i * stride + j]);
        else
            for (int64_t j = 0; j < k; j++) out[i * down + j * right] = load(u[i * stride + j]);
    }
}

// Rows [row, row + d) and columns [column, column + k) of U.
void spread(float* out, const Basis& basis, int64_t row, int64_t d, int64_t column, int64_t k, int64_t down,
            int64_t right) {
    int64_t at = row * basis.k + column;
    if (basis.dtype == kFloat32)
        spread(out, static_cast<const float*>(basis.u) + at, d, k, basis.k, down, right);
    else if (basis.dtype == kBfloat16)
        spread(out, static_cast<const Bf16*>(basis.u) + at, d, k, basis.k, down, right);
    else
        spread(out, static_cast<const Fp16*>(basis.u) + at, d, k, basis.k, down, right);
}

}  // namespace

void Free::operator()(float* memory) const { free(memory); }

Layout rows_of(const Basis& basis) {
    Layout out = zeros(padded(basis.d, kRowGroup) * padded(basis.k));
    spread(out.get(), basis, 0, basis.d, 0, basis.k, padded(basis.k), 1);
    return out;
}

Layout panels_of(const Basis& basis) {
    Layout out = zeros(padded(basis.d, kPanel) * basis.k);
    for (int64_t row = 0; row < basis.d; row += kPanel)
        spread(out.get() + row * basis.k, basis, row, std::min(kPanel, basis.d - row), 0, basis.k, 1, kPanel);
    return out;
}

Layout last_columns(const Basis& basis) {
    int64_t columns = std::min(kLast, basis.k), length = padded(basis.d);
    Layout out = zeros(kLast * length);
    spread(out.get() + (kLast - columns) * length, basis, 0, basis.d, basis.k - columns, columns, 1, length);
    return out;
}

}  // namespace agora
