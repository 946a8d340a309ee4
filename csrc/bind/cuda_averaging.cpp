// Bindings of the CUDA slices and reductions.
#include "../cuda/averaging.h"
#include "cuda.h"

namespace agora {

void bind_cuda_averaging(py::module_& m) {
    m.def("cuda_slice_pack", [](P table, P consensus, int64_t tensors, P packed, int dtype, P snapshot,
                                int64_t blocks, int64_t first, int64_t count, uint64_t key, P stream) {
        cuda::Slice slice{device<const TensorRow>(table), tensors, blocks, first, count, key};
        launched(cuda::pack(slice, device<const TensorRow>(consensus), device<void>(packed), dtype,
                            device<float>(snapshot), device<void>(stream)));
    });
    m.def("cuda_slice_merge",
          [](P table, P snapshot, P average, int average_dtype, P drift, P consensus, P compute,
             int compute_dtype, int64_t tensors, int64_t blocks, int64_t first, int64_t count, uint64_t key,
             int64_t start, int64_t stop, int mode, float mu, P stream) {
              cuda::Slice slice{device<const TensorRow>(table), tensors, blocks, first, count, key};
              cuda::Merge merge{device<const TensorRow>(drift),
                                device<const TensorRow>(consensus),
                                device<const TensorRow>(compute),
                                device<const float>(snapshot),
                                device<const void>(average),
                                start,
                                stop,
                                average_dtype,
                                compute_dtype,
                                mode,
                                mu};
              launched(cuda::merge(slice, merge, device<void>(stream)));
          });
    m.def("cuda_reduce_inspect", [](P part, int part_dtype, int64_t n, float weight, P verdicts, P stream) {
        launched(cuda::inspect(device<void>(part), part_dtype, n, weight, device<cuda::Verdict>(verdicts),
                               device<void>(stream)));
    });
    m.def("cuda_reduce_add", [](P sum, P part, P out, int64_t n, int part_dtype, float weight, P verdict,
                                P stream) {
        launched(cuda::add(device<const float>(sum), device<void>(part), device<float>(out), n, part_dtype,
                           weight, device<const cuda::Verdict>(verdict), device<void>(stream)));
    });
    m.def("cuda_reduce_finish", [](P sum, P out, int64_t n, float weight_sum, P stream) {
        launched(
            cuda::finish(device<const float>(sum), device<float>(out), n, weight_sum, device<void>(stream)));
    });
}

}  // namespace agora
