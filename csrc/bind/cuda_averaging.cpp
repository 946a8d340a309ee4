// Bindings of the CUDA slices and reductions.
#include "../cuda/averaging.h"
#include "cuda.h"

namespace agora {

void bind_cuda_averaging(py::module_& m) {
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

}  // namespace agora
