// Bindings of the generator, expand and project.
#include <vector>

#include "../functors/normal.h"
#include "bind.h"

namespace agora {
namespace {

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

py::tuple philox_words(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint64_t key) {
    Words4<uint32_t> words = philox(Words4<uint32_t>{a, b, c, d}, key);
    return py::make_tuple(words.a, words.b, words.c, words.d);
}

}  // namespace

void bind_boundary(py::module_& m) {
    using py::arg;
    m.def("normal", &normal, arg("out"), arg("n"), arg("seed"), arg("stream"), arg("factor"), arg("threads"));
    m.def("token_rows", &token_rows, arg("out"), arg("ids"), arg("rows"), arg("d"), arg("seed"),
          arg("factor"), arg("threads"));
    m.def("expand", &expand, arg("c"), arg("c_dtype"), arg("basis"), arg("basis_dtype"), arg("ids"), arg("h"),
          arg("h_dtype"), arg("rows"), arg("d"), arg("k"), arg("seed"), arg("factor"), arg("threads"));
    m.def("project", &project, arg("dh"), arg("dh_dtype"), arg("basis"), arg("basis_dtype"), arg("out"),
          arg("out_dtype"), arg("rows"), arg("d"), arg("k"), arg("threads"));
    m.def("philox", &philox_words, arg("a"), arg("b"), arg("c"), arg("d"), arg("key"));
}

}  // namespace agora
