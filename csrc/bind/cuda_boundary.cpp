// Bindings of the CUDA generator, expand and project.
#include "../cuda/boundary.h"
#include "cuda.h"

namespace agora {

void bind_cuda_boundary(py::module_& m) {
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
}

}  // namespace agora
