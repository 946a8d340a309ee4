// What all bindings share: checks that keep the process alive, and how finely work is split over threads.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/dispatch.h"
#include "../cpu/pool.h"
#include "operand.h"

namespace agora {

namespace py = pybind11;

void bind_boundary(py::module_& m);
void bind_averaging(py::module_& m);
#if defined(AGORA_CUDA)
void bind_cuda_boundary(py::module_& m);
void bind_cuda_averaging(py::module_& m);
#endif

// Work below this is not worth waking a thread for (about 20 us of it).
constexpr int64_t kGrainFloats = 32768;

// Results that are larger than this would push everything else out of the caches on their way to memory.
constexpr int64_t kBypassBytes = int64_t(16) << 20;

inline int64_t grain(int64_t floats_a_unit) {
    return floats_a_unit >= kGrainFloats ? 1 : kGrainFloats / floats_a_unit;
}

inline void require(bool condition, const char* why) {
    if (!condition) throw py::value_error(why);
}

inline int64_t size_of(int dtype) {
    require(dtype >= kFloat32 && dtype <= kFloat16, "dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)");
    return dtype == kFloat32 ? 4 : 2;
}

// Dimensions small enough that a product of any two, in bytes, fits 64 bits.
inline void check_dimension(int64_t n, const char* why) { require(n > 0 && n < (int64_t(1) << 40), why); }

}  // namespace agora
