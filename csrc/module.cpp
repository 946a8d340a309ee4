// The Python module `agora_kernels`: addresses, sizes, threads; no framework.
//
// stage/kernels.py is the front: it knows shapes, dtypes, devices and autograd. This file checks what would
// crash the process (null, misaligned, too short, out of range), drops the GIL and calls the launchers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cpu/dispatch.h"
#include "cpu/pool.h"
#include "functors/normal.h"
#include "functors/slices.h"
#include "operand.h"
#if defined(AGORA_CUDA)
#include "cuda/module_cuda.h"
#endif

namespace py = pybind11;

namespace agora {
namespace {

// Work below this is not worth waking a thread for (about 20 us of it).
constexpr int64_t kGrainFloats = 32768;

int64_t grain(int64_t floats_a_unit) {
    return floats_a_unit >= kGrainFloats ? 1 : kGrainFloats / floats_a_unit;
}

void require(bool condition, const char* why) {
    if (!condition) throw py::value_error(why);
}

int64_t size_of(int dtype) {
    require(dtype == kFloat32 || dtype == kBfloat16, "dtype must be 0 (float32) or 1 (bfloat16)");
    return dtype == kFloat32 ? 4 : 2;
}

// Dimensions small enough that a product of any two, in bytes, fits 64 bits.
void check_dimension(int64_t n, const char* why) { require(n > 0 && n < (int64_t(1) << 40), why); }

void check_ids(const int64_t* ids, int64_t n) {
    uint64_t all = 0;
    for (int64_t i = 0; i < n; i++) all |= uint64_t(ids[i]);
    require(all >> 32 == 0, "token ids must lie in [0, 2^32)");
}

void normal(py::object out, int64_t n, uint64_t seed, uint64_t stream, float factor, int threads) {
    check_dimension(n, "n must be positive");
    Operand to(out, 4 * n, true, 4, "out");
    NormalTask task{to.as<float>(), nullptr, n, seed, stream, factor};
    py::gil_scoped_release unlocked;
    parallel_for(threads, (n + kFillChunk - 1) / kFillChunk, grain(kFillChunk),
                 [&](int64_t begin, int64_t end) { cpu().fill(task, begin, end); });
}

void token_rows(py::object out, py::object ids, int64_t rows, int64_t d, uint64_t seed, float factor,
                int threads) {
    check_dimension(rows, "rows must be positive");
    check_dimension(d, "d must be positive");
    Operand to(out, 4 * rows * d, true, 4, "out"), from(ids, 8 * rows, false, 8, "ids");
    check_ids(from.as<int64_t>(), rows);
    NormalTask task{to.as<float>(), from.as<int64_t>(), d, seed, kTokenTableStream, factor};
    py::gil_scoped_release unlocked;
    parallel_for(threads, rows, grain(d), [&](int64_t begin, int64_t end) { cpu().rows(task, begin, end); });
}

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// U in fp32, in rows padded with zeros to whole register tiles, as it is or transposed.
template <typename From>
std::vector<float> laid_out(const From* basis, int64_t d, int64_t k, bool transpose) {
    int64_t stride = padded(transpose ? d : k);
    std::vector<float> out(size_t((transpose ? k : d) * stride));
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < k; j++)
            out[size_t(transpose ? j * stride + i : i * stride + j)] = load(basis[i * k + j]);
    return out;
}

std::vector<float> laid_out(const Operand& basis, int dtype, int64_t d, int64_t k, bool transpose) {
    return dtype == kFloat32 ? laid_out(basis.as<float>(), d, k, transpose)
                             : laid_out(basis.as<Bf16>(), d, k, transpose);
}

void check_boundary(int64_t rows, int64_t d, int64_t k) {
    check_dimension(rows, "rows must be positive");
    require(d > 0 && d <= (1 << 20), "d must lie in [1, 2^20]");
    require(k > 0 && k <= 1024, "k must lie in [1, 1024]");
}

void expand(py::object c, int c_dtype, py::object basis, int basis_dtype, py::object ids, py::object h,
            int h_dtype, int64_t rows, int64_t d, int64_t k, uint64_t seed, float factor, int threads) {
    check_boundary(rows, d, k);
    int64_t cw = size_of(c_dtype), uw = size_of(basis_dtype), hw = size_of(h_dtype);
    Operand from(c, rows * k * cw, false, size_t(cw), "c"), u(basis, d * k * uw, false, size_t(uw), "U");
    Operand tokens(ids, 8 * rows, false, 8, "ids"), to(h, rows * d * hw, true, size_t(hw), "h");
    check_ids(tokens.as<int64_t>(), rows);
    py::gil_scoped_release unlocked;
    std::vector<float> transposed = laid_out(u, basis_dtype, d, k, true);
    ExpandTask task{from.as<void>(),
                    to.as<void>(),
                    transposed.data(),
                    tokens.as<int64_t>(),
                    rows,
                    d,
                    k,
                    padded(d),
                    c_dtype,
                    h_dtype,
                    seed,
                    factor};
    parallel_for(threads, (rows + kRowGroup - 1) / kRowGroup, grain(kRowGroup * d),
                 [&](int64_t begin, int64_t end) { cpu().expand(task, begin, end); });
}

void project(py::object dh, int dh_dtype, py::object basis, int basis_dtype, py::object out, int out_dtype,
             int64_t rows, int64_t d, int64_t k, int threads) {
    check_boundary(rows, d, k);
    int64_t dw = size_of(dh_dtype), uw = size_of(basis_dtype), ow = size_of(out_dtype);
    Operand from(dh, rows * d * dw, false, size_t(dw), "dh"), u(basis, d * k * uw, false, size_t(uw), "U");
    Operand to(out, rows * k * ow, true, size_t(ow), "out");
    py::gil_scoped_release unlocked;
    std::vector<float> rows_of_u = laid_out(u, basis_dtype, d, k, false);
    ProjectTask task{from.as<void>(), to.as<void>(), rows_of_u.data(), rows, d, k,
                     padded(k),       dh_dtype,      out_dtype};
    parallel_for(threads, (rows + kRowGroup - 1) / kRowGroup, grain(kRowGroup * d),
                 [&](int64_t begin, int64_t end) { cpu().project(task, begin, end); });
}

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

py::tuple philox_words(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint64_t key) {
    Words4<uint32_t> words = philox(Words4<uint32_t>{a, b, c, d}, key);
    return py::make_tuple(words.a, words.b, words.c, words.d);
}

}  // namespace
}  // namespace agora

PYBIND11_MODULE(agora_kernels, m) {
    using namespace agora;
    using py::arg;
    m.doc() = "Kernels of the data path. Memory arguments are addresses (int) or contiguous buffers.";
    m.def("normal", &normal, arg("out"), arg("n"), arg("seed"), arg("stream"), arg("factor"), arg("threads"));
    m.def("token_rows", &token_rows, arg("out"), arg("ids"), arg("rows"), arg("d"), arg("seed"),
          arg("factor"), arg("threads"));
    m.def("expand", &expand, arg("c"), arg("c_dtype"), arg("basis"), arg("basis_dtype"), arg("ids"), arg("h"),
          arg("h_dtype"), arg("rows"), arg("d"), arg("k"), arg("seed"), arg("factor"), arg("threads"));
    m.def("project", &project, arg("dh"), arg("dh_dtype"), arg("basis"), arg("basis_dtype"), arg("out"),
          arg("out_dtype"), arg("rows"), arg("d"), arg("k"), arg("threads"));
    m.def("slice_blocks", &slice_blocks, arg("out"), arg("blocks"), arg("first"), arg("count"), arg("key"));
    m.def("slice_pack", &slice_pack, arg("flat"), arg("packed"), arg("blocks"), arg("first"), arg("count"),
          arg("key"), arg("threads"));
    m.def("slice_merge", &slice_merge, arg("flat"), arg("snapshot"), arg("average"), arg("blocks"),
          arg("first"), arg("count"), arg("key"), arg("start"), arg("stop"), arg("mode"), arg("threads"));
    m.def("reduce_add", &reduce_add, arg("sum"), arg("part"), arg("n"), arg("part_dtype"), arg("weight"),
          arg("threads"));
    m.def("reduce_finish", &reduce_finish, arg("sum"), arg("out"), arg("n"), arg("weight_sum"),
          arg("threads"));
    m.def("philox", &philox_words, arg("a"), arg("b"), arg("c"), arg("d"), arg("key"));
    m.def("instruction_sets", &instruction_sets, "Usable on this machine, slowest first.");
    m.def("instruction_set", [] { return std::string(cpu().name); });
    m.def("use_instruction_set", &use_instruction_set, arg("name"));
#if defined(AGORA_CUDA)
    m.attr("has_cuda") = true;
    define_cuda(m);
#else
    m.attr("has_cuda") = false;
#endif
}
