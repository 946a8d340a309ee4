// Bindings of the CUDA launchers: the names and arguments of the CPU's, prefixed by `cuda_`, addresses only,
// and a stream instead of a number of threads. Included by csrc/module.cpp alone.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace agora {
namespace {

template <typename T>
T* device(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void launched(int error) {
    if (error != 0)
        throw std::runtime_error(std::string("CUDA kernel not launched: ") + cuda::error_text(error));
}

void define_cuda(pybind11::module_& m) {
    using P = uintptr_t;
    m.def("cuda_normal", [](P out, int64_t n, uint64_t seed, uint64_t number, float factor, P stream) {
        launched(cuda::fill(device<float>(out), n, seed, number, factor, device<void>(stream)));
    });
    m.def("cuda_token_rows",
          [](P out, P ids, int64_t rows, int64_t d, uint64_t seed, float factor, P stream) {
              launched(cuda::rows(device<float>(out), device<const int64_t>(ids), rows, d, seed, factor,
                                  device<void>(stream)));
          });
    m.def("cuda_expand", [](P c, int c_dtype, P basis, int basis_dtype, P ids, P h, int h_dtype, int64_t rows,
                            int64_t d, int64_t k, uint64_t seed, float factor, P stream) {
        launched(cuda::expand(device<void>(c), c_dtype, device<void>(basis), basis_dtype,
                              device<const int64_t>(ids), device<void>(h), h_dtype, rows, d, k, seed, factor,
                              device<void>(stream)));
    });
    m.def("cuda_project", [](P dh, int dh_dtype, P basis, int basis_dtype, P out, int out_dtype, int64_t rows,
                             int64_t d, int64_t k, P stream) {
        launched(cuda::project(device<void>(dh), dh_dtype, device<void>(basis), basis_dtype,
                               device<void>(out), out_dtype, rows, d, k, device<void>(stream)));
    });
    m.def("cuda_slice_pack",
          [](P flat, P packed, int64_t blocks, int64_t first, int64_t count, uint64_t key, P stream) {
              launched(cuda::pack(device<float>(flat), device<float>(packed), blocks, first, count, key,
                                  device<void>(stream)));
          });
    m.def("cuda_slice_merge", [](P flat, P snapshot, P average, int64_t blocks, int64_t first, int64_t,
                                 uint64_t key, int64_t start, int64_t stop, int mode, P stream) {
        launched(cuda::merge(device<float>(flat), device<float>(snapshot), device<float>(average), blocks,
                             first, key, start, stop, mode, device<void>(stream)));
    });
    m.def("cuda_reduce_inspect", [](P part, int part_dtype, int64_t n, float weight, P verdicts, P stream) {
        launched(cuda::inspect(device<void>(part), part_dtype, n, weight, device<cuda::Verdict>(verdicts),
                               device<void>(stream)));
    });
    m.def("cuda_reduce_add", [](P sum, P part, int64_t n, int part_dtype, float weight, P stream) {
        launched(
            cuda::add(device<float>(sum), device<void>(part), part_dtype, n, weight, device<void>(stream)));
    });
    m.def("cuda_reduce_finish", [](P sum, P out, int64_t n, float weight_sum, P stream) {
        launched(cuda::finish(device<float>(sum), device<float>(out), n, weight_sum, device<void>(stream)));
    });
}

}  // namespace
}  // namespace agora
