// Bindings of slices and reductions.
#include <vector>

#include "../functors/slices.h"
#include "bind.h"

namespace agora {
namespace {

void check_slice(int64_t blocks, int64_t first, int64_t count) {
    require(blocks > 0 && uint64_t(blocks) <= kMaxBlocks, "blocks must lie in [1, 2^31]");
    require(first >= 0 && count >= 0 && count <= blocks && first <= blocks - count,
            "the slice must lie in [0, blocks)");
}

void slice_blocks(py::object out, int64_t blocks, int64_t first, int64_t count, uint64_t key) {
    check_slice(blocks, first, count);
    Operand to(out, 8 * count, true, 8, "out");
    Permutation permutation = make_permutation(uint64_t(blocks), key);
    py::gil_scoped_release unlocked;
    for (int64_t i = 0; i < count; i++)
        to.as<int64_t>()[i] = int64_t(permute(permutation, uint64_t(first + i)));
}

void slice_pack(py::object flat, py::object packed, int64_t blocks, int64_t first, int64_t count,
                uint64_t key, int threads) {
    check_slice(blocks, first, count);
    Operand from(flat, blocks * kBlock * 4, false, 4, "flat"),
        to(packed, count * kBlock * 4, true, 4, "packed");
    PackTask task{from.as<float>(), to.as<float>(), make_permutation(uint64_t(blocks), key), first};
    py::gil_scoped_release unlocked;
    parallel_for(threads, count, grain(kBlock),
                 [&](int64_t begin, int64_t end) { cpu().pack(task, begin, end); });
}

void slice_merge(py::object flat, py::object snapshot, py::object average, int64_t blocks, int64_t first,
                 int64_t count, uint64_t key, int64_t start, int64_t stop, int mode, int threads) {
    check_slice(blocks, first, count);
    require(mode == kDelta || mode == kOverwrite, "mode must be 0 (delta) or 1 (overwrite)");
    require(0 <= start && start <= stop && stop <= count * kBlock,
            "the averaged range must lie within the slice");
    int64_t bytes = count * kBlock * 4;
    Operand to(flat, blocks * kBlock * 4, true, 4, "flat"), mean(average, bytes, false, 4, "average");
    Operand before(snapshot, mode == kDelta ? bytes : 0, false, 4, "snapshot");
    MergeTask task{to.as<float>(),
                   before.as<float>(),
                   mean.as<float>(),
                   make_permutation(uint64_t(blocks), key),
                   first,
                   start,
                   stop,
                   mode};
    py::gil_scoped_release unlocked;
    int64_t skip = start / kBlock, units = start < stop ? (stop + kBlock - 1) / kBlock - skip : 0;
    parallel_for(threads, units, grain(kBlock),
                 [&](int64_t begin, int64_t end) { cpu().merge(task, begin + skip, end + skip); });
}

py::tuple reduce_add(py::object sum, py::object part, int64_t n, int part_dtype, float weight, int threads) {
    check_dimension(n, "n must be positive");
    Operand to(sum, 4 * n, true, 4, "sum"), from(part, n * size_of(part_dtype), false, 1, "part");
    double norm2 = 0;
    bool usable = true;
    {
        py::gil_scoped_release unlocked;
        int64_t chunks = (n + kReduceChunk - 1) / kReduceChunk;
        std::vector<Verdict> verdicts(static_cast<size_t>(chunks));
        ReduceTask task{to.as<float>(), from.as<void>(), n, part_dtype, weight, verdicts.data()};
        parallel_for(threads, chunks, grain(kReduceChunk),
                     [&](int64_t begin, int64_t end) { cpu().inspect(task, begin, end); });
        for (const Verdict& verdict : verdicts) {
            norm2 += verdict.norm2;
            usable = usable && !verdict.bad;
        }
        if (usable)
            parallel_for(threads, n, kGrainFloats,
                         [&](int64_t begin, int64_t end) { cpu().add(task, begin, end); });
    }
    return py::make_tuple(usable, norm2);
}

void reduce_finish(py::object sum, py::object out, int64_t n, float weight_sum, int threads) {
    check_dimension(n, "n must be positive");
    require(weight_sum > 0, "weight_sum must be positive");
    Operand from(sum, 4 * n, false, 4, "sum"), to(out, 4 * n, true, 4, "out");
    FinishTask task{from.as<float>(), to.as<float>(), weight_sum};
    py::gil_scoped_release unlocked;
    parallel_for(threads, n, kGrainFloats,
                 [&](int64_t begin, int64_t end) { cpu().finish(task, begin, end); });
}
}  // namespace

void bind_averaging(py::module_& m) {
    using py::arg;
    m.def("slice_blocks", &slice_blocks, arg("out"), arg("blocks"), arg("first"), arg("count"), arg("key"));
    m.def("slice_pack", &slice_pack, arg("flat"), arg("packed"), arg("blocks"), arg("first"), arg("count"),
          arg("key"), arg("threads"));
    m.def("slice_merge", &slice_merge, arg("flat"), arg("snapshot"), arg("average"), arg("blocks"),
          arg("first"), arg("count"), arg("key"), arg("start"), arg("stop"), arg("mode"), arg("threads"));
    m.def("reduce_add", &reduce_add, arg("sum"), arg("part"), arg("n"), arg("part_dtype"), arg("weight"),
          arg("threads"));
    m.def("reduce_finish", &reduce_finish, arg("sum"), arg("out"), arg("n"), arg("weight_sum"),
          arg("threads"));
}

}  // namespace agora
