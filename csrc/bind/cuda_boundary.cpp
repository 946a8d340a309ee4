// Bindings of the CUDA generator and of the boundary's kernels.
//
// Beyond the CPU's arguments: `prepared`, U as cuda_prepare_basis wrote it for h's dtype (0: none, plain
// arithmetic), and `scratch`, cuda_scratch_numbers floats.
#include "../cuda/boundary.h"
#include "cuda.h"

namespace agora {
namespace {

constexpr int64_t kMaxColumns = 1024;

void check_shape(int64_t rows, int64_t d, int64_t k) {
    require(rows > 0 && rows < (int64_t(1) << 33), "rows must lie in [1, 2^33)");
    require(d > 0 && d <= (1 << 20), "d must lie in [1, 2^20]");
    require(k > 0 && k <= kMaxColumns, "k must lie in [1, 1024]");
}

void expand(const cuda::Expand& task, P stream) {
    check_shape(task.rows, task.d, task.k);
    size_of(task.c_dtype), size_of(task.basis_dtype), size_of(task.h_dtype);
    launched(cuda::expand(task, device<void>(stream)));
}

}  // namespace

void bind_cuda_boundary(py::module_& m) {
    m.def("cuda_normal", [](P out, int64_t n, uint64_t seed, uint64_t number, float factor, P stream) {
        check_dimension(n, "n must be positive");
        launched(cuda::fill(device<float>(out), n, seed, number, factor, device<void>(stream)));
    });
    m.def("cuda_token_rows",
          [](P out, int out_dtype, P ids, int64_t rows, int64_t d, uint64_t seed, float factor, P stream) {
              check_shape(rows, d, 1);
              size_of(out_dtype);
              launched(cuda::rows(device<void>(out), out_dtype, device<const int64_t>(ids), rows, d, seed,
                                  factor, device<void>(stream)));
          });
    m.def("cuda_prepared_numbers", &cuda::prepared_numbers,
          "Numbers of h's dtype that U takes for tensor cores; 0: they are not used for these.");
    m.def("cuda_scratch_numbers", [](int64_t rows, int64_t d, int64_t k) {
        check_shape(rows, d, k);
        return cuda::scratch_numbers(rows, d, k);
    });
    m.def("cuda_prepare_basis",
          [](P basis, int basis_dtype, P prepared, int h_dtype, int64_t d, int64_t k, P stream) {
              require(cuda::prepared_numbers(h_dtype, basis_dtype, d, k) > 0,
                      "tensor cores are not used for these");
              launched(cuda::prepare_basis(device<void>(basis), basis_dtype, device<void>(prepared), h_dtype,
                                           d, k, device<void>(stream)));
          });
    m.def("cuda_expand", [](P c, int c_dtype, P basis, int basis_dtype, P ids, P h, int h_dtype, int64_t rows,
                            int64_t d, int64_t k, uint64_t seed, float factor, P prepared, P stream) {
        expand({device<void>(c), device<void>(basis), device<void>(prepared), device<const int64_t>(ids),
                nullptr, device<void>(h), rows, d, k, c_dtype, basis_dtype, h_dtype, seed, factor},
               stream);
    });
    m.def("cuda_expand_rows", [](P c, int c_dtype, P basis, int basis_dtype, P table, P h, int h_dtype,
                                 int64_t rows, int64_t d, int64_t k, P prepared, P stream) {
        require(table != 0, "rows is a null pointer");
        expand({device<void>(c), device<void>(basis), device<void>(prepared), nullptr, device<void>(table),
                device<void>(h), rows, d, k, c_dtype, basis_dtype, h_dtype, 0, 0},
               stream);
    });
    m.def("cuda_project", [](P h, int h_dtype, P table, P basis, int basis_dtype, P out, int out_dtype,
                             int64_t rows, int64_t d, int64_t k, P prepared, P scratch, P stream) {
        check_shape(rows, d, k);
        size_of(h_dtype), size_of(basis_dtype);
        require(out_dtype >= kFloat32 && out_dtype <= kInt8, "out_dtype must lie in [0, 3]");
        launched(cuda::project(
            {device<void>(h), device<void>(table), device<void>(basis), device<void>(prepared),
             device<float>(scratch), device<void>(out), rows, d, k, h_dtype, basis_dtype, out_dtype},
            device<void>(stream)));
    });
    m.def("cuda_wire_pack", [](P c, int c_dtype, P out, int wire, int64_t rows, int64_t k, P stream) {
        check_shape(rows, 1, k);
        size_of(c_dtype);
        require(wire >= kFloat32 && wire <= kInt8, "wire must lie in [0, 3]");
        launched(cuda::wire_pack(device<void>(c), c_dtype, device<void>(out), wire, rows, k,
                                 device<void>(stream)));
    });
}

}  // namespace agora
