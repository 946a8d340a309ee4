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

// Rows that describe `blocks` blocks of real memory: the kernels trust them.
const TensorRow* check_table(const Operand& table, int64_t tensors, int64_t blocks, size_t align) {
    const TensorRow* rows = table.as<TensorRow>();
    int64_t next = 0;
    for (int64_t i = 0; i < tensors; i++) {
        require(
            rows[i].numel > 0 && rows[i].numel <= int64_t(kMaxBlocks) * kBlock && rows[i].first_block == next,
            "the table's rows must be in order, without gaps and not empty");
        require(rows[i].address != 0 && uint64_t(rows[i].address) % align == 0,
                "the table's addresses must be aligned to their elements");
        next += (rows[i].numel + kBlock - 1) / kBlock;
    }
    require(next == blocks, "the table does not have that number of blocks");
    return rows;
}

const TensorRow* check_twin(const Operand& table, const TensorRow* weights, int64_t tensors, int64_t blocks,
                            size_t align) {
    const TensorRow* rows = table.as<TensorRow>();
    if (rows == nullptr) return nullptr;
    check_table(table, tensors, blocks, align);
    for (int64_t i = 0; i < tensors; i++)
        require(rows[i].numel == weights[i].numel, "the tables' tensors must have the same lengths");
    return rows;
}

int64_t table_bytes(int64_t tensors) {
    require(tensors > 0 && tensors <= kMaxTensors, "tensors must lie in [1, 2^20]");
    return tensors * int64_t(sizeof(TensorRow));
}

int64_t packed_bytes(int64_t count, int dtype) {
    require(dtype == kFloat32 || dtype == kBfloat16 || dtype == kInt8,
            "a packed slice is 0 (float32), 1 (bfloat16) or 3 (int8)");
    return count * (dtype == kInt8 ? kInt8Block : dtype == kBfloat16 ? kBlock * 2 : kBlock * 4);
}

size_t packed_align(int dtype) { return dtype == kFloat32 ? 4 : dtype == kBfloat16 ? 2 : 1; }

// A twin that is absent is the number 0.
int64_t twin_bytes(const py::object& twin, int64_t bytes) {
    return PyLong_Check(twin.ptr()) && twin.equal(py::int_(0)) ? 0 : bytes;
}

void slice_pack(py::object table, py::object consensus, int64_t tensors, py::object packed, int dtype,
                py::object snapshot, int64_t blocks, int64_t first, int64_t count, uint64_t key,
                int threads) {
    check_slice(blocks, first, count);
    int64_t rows = table_bytes(tensors), bytes = packed_bytes(count, dtype), fp32 = count * kBlock * 4;
    Operand weights(table, rows, false, 8, "table"),
        twin(consensus, twin_bytes(consensus, rows), false, 8, "consensus");
    Operand to(packed, bytes, true, packed_align(dtype), "packed"),
        keep(snapshot, twin_bytes(snapshot, fp32), true, 4, "snapshot");
    const TensorRow* from = check_table(weights, tensors, blocks, 4);
    const TensorRow* before = check_twin(twin, from, tensors, blocks, 4);
    require(dtype != kInt8 || before != nullptr, "int8 is the difference to a consensus: give one");
    PackTask task{{from, tensors, make_permutation(uint64_t(blocks), key), first},
                  before,
                  to.as<void>(),
                  keep.as<float>(),
                  dtype,
                  fp32 > kBypassBytes};
    py::gil_scoped_release unlocked;
    parallel_for(threads, count, grain(kBlock),
                 [&](int64_t begin, int64_t end) { cpu().pack(task, begin, end); });
}

void slice_merge(py::object table, py::object snapshot, py::object average, int average_dtype,
                 py::object drift, py::object consensus, py::object compute, int compute_dtype,
                 int64_t tensors, int64_t blocks, int64_t first, int64_t count, uint64_t key, int64_t start,
                 int64_t stop, int mode, float mu, int threads) {
    check_slice(blocks, first, count);
    require(mode == kDelta || mode == kOverwrite || mode == kEma,
            "mode must be 0 (delta), 1 (overwrite) or 2 (ema)");
    require(0 <= start && start <= stop && stop <= count * kBlock,
            "the averaged range must lie within the slice");
    require(compute_dtype == kBfloat16 || compute_dtype == kFloat16,
            "the compute copy is 1 (bfloat16) or 2 (float16)");
    int64_t rows = table_bytes(tensors);
    Operand weights(table, rows, false, 8, "table"),
        twin(consensus, twin_bytes(consensus, rows), false, 8, "consensus");
    Operand moved(drift, twin_bytes(drift, rows), false, 8, "drift"),
        copy(compute, twin_bytes(compute, rows), false, 8, "compute");
    Operand mean(average, packed_bytes(count, average_dtype), false, packed_align(average_dtype), "average");
    Operand before(snapshot, mode == kOverwrite ? 0 : count * kBlock * 4, false, 4, "snapshot");
    const TensorRow* to = check_table(weights, tensors, blocks, 4);
    MergeTask task{{to, tensors, make_permutation(uint64_t(blocks), key), first},
                   check_twin(moved, to, tensors, blocks, 4),
                   check_twin(twin, to, tensors, blocks, 4),
                   check_twin(copy, to, tensors, blocks, 2),
                   before.as<float>(),
                   mean.as<void>(),
                   start,
                   stop,
                   average_dtype,
                   compute_dtype,
                   mode,
                   mu};
    require(mode != kEma || task.drift != nullptr, "an EMA merge needs the drift");
    require(average_dtype != kInt8 || task.consensus != nullptr, "an int8 average needs the consensus");
    py::gil_scoped_release unlocked;
    int64_t skip = start / kBlock, units = start < stop ? (stop + kBlock - 1) / kBlock - skip : 0;
    parallel_for(threads, units, grain(kBlock),
                 [&](int64_t begin, int64_t end) { cpu().merge(task, begin + skip, end + skip); });
}

int64_t part_bytes(int64_t n, int dtype) {
    if (dtype != kInt8) return n * size_of(dtype);
    require(n % kBlock == 0, "an int8 part is a whole number of blocks");
    return n / kBlock * kInt8Block;
}

// A part is looked at as a whole before its sum counts: into another buffer in one pass, in place in two.
py::tuple reduce_add(py::object sum, py::object part, py::object out, int64_t n, int part_dtype, float weight,
                     int threads) {
    check_dimension(n, "n must be positive");
    Operand total(sum, 4 * n, true, 4, "sum"), from(part, part_bytes(n, part_dtype), false, 1, "part");
    Operand to(out, 4 * n, true, 4, "out");
    double norm2 = 0;
    bool usable = true;
    {
        py::gil_scoped_release unlocked;
        int64_t chunks = (n + kReduceChunk - 1) / kReduceChunk;
        std::vector<Verdict> verdicts(static_cast<size_t>(chunks));
        bool in_place = to.as<float>() == total.as<float>();
        ReduceTask task{
            total.as<float>(), in_place ? nullptr : to.as<float>(), from.as<void>(), n, part_dtype, weight,
            verdicts.data(),   !in_place && 4 * n > kBypassBytes};
        auto run = [&] {
            parallel_for(threads, chunks, grain(kReduceChunk),
                         [&](int64_t begin, int64_t end) { cpu().reduce(task, begin, end); });
        };
        run();
        for (const Verdict& verdict : verdicts) {
            norm2 += verdict.norm2;
            usable = usable && !verdict.bad;
        }
        if (usable && in_place) {
            task.out = to.as<float>();
            task.verdicts = nullptr;
            run();
        }
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

// A part of a round between fp32 and the form in which it travels; a short last block stays short.
using PartKernel = void (*)(const PartTask&, int64_t, int64_t);

void code_part(py::object from, py::object to, int64_t n, int dtype, bool pack, int threads) {
    check_dimension(n, "n must be positive");
    require(dtype == kBfloat16 || dtype == kInt8, "a coded part is 1 (bfloat16) or 3 (int8)");
    int64_t blocks = (n + kBlock - 1) / kBlock, coded = dtype == kInt8 ? n + 4 * blocks : 2 * n;
    Operand values(from, pack ? 4 * n : coded, false, 1, "from"),
        out(to, pack ? coded : 4 * n, true, 1, "to");
    PartTask task{values.as<void>(), out.as<void>(), n, dtype};
    PartKernel kernel = pack ? cpu().part_pack : cpu().part_unpack;
    py::gil_scoped_release unlocked;
    parallel_for(threads, blocks, grain(kBlock),
                 [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

void part_pack(py::object part, py::object out, int64_t n, int dtype, int threads) {
    code_part(part, out, n, dtype, true, threads);
}

void part_unpack(py::object part, py::object out, int64_t n, int dtype, int threads) {
    code_part(part, out, n, dtype, false, threads);
}
}  // namespace

void bind_averaging(py::module_& m) {
    using py::arg;
    m.def("slice_blocks", &slice_blocks, arg("out"), arg("blocks"), arg("first"), arg("count"), arg("key"));
    m.def("slice_pack", &slice_pack, arg("table"), arg("consensus"), arg("tensors"), arg("packed"),
          arg("dtype"), arg("snapshot"), arg("blocks"), arg("first"), arg("count"), arg("key"),
          arg("threads"));
    m.def("slice_merge", &slice_merge, arg("table"), arg("snapshot"), arg("average"), arg("average_dtype"),
          arg("drift"), arg("consensus"), arg("compute"), arg("compute_dtype"), arg("tensors"), arg("blocks"),
          arg("first"), arg("count"), arg("key"), arg("start"), arg("stop"), arg("mode"), arg("mu"),
          arg("threads"));
    m.def("reduce_add", &reduce_add, arg("sum"), arg("part"), arg("out"), arg("n"), arg("part_dtype"),
          arg("weight"), arg("threads"));
    m.def("part_pack", &part_pack, arg("part"), arg("out"), arg("n"), arg("dtype"), arg("threads"));
    m.def("part_unpack", &part_unpack, arg("part"), arg("out"), arg("n"), arg("dtype"), arg("threads"));
    m.def("reduce_finish", &reduce_finish, arg("sum"), arg("out"), arg("n"), arg("weight_sum"),
          arg("threads"));
}

}  // namespace agora
