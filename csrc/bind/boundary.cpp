// Bindings of the generator and of the boundary's kernels.
#include <algorithm>

#include "../cpu/basis.h"
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
    NormalTask task{to.as<void>(), kFloat32, nullptr, n, seed, stream, factor, 4 * n > kBypassBytes};
    py::gil_scoped_release unlocked;
    team_for(threads, (n + kFillChunk - 1) / kFillChunk, grain(kFillChunk),
             [&](int64_t begin, int64_t end) { cpu().fill(task, begin, end); });
}

void token_rows(py::object out, int out_dtype, py::object ids, int64_t rows, int64_t d, uint64_t seed,
                float factor, int threads) {
    check_dimension(rows, "rows must be positive");
    require(d > 0 && d <= (1 << 20), "d must lie in [1, 2^20]");
    int64_t ow = size_of(out_dtype), bytes = ow * rows * d;
    Operand to(out, bytes, true, size_t(ow), "out"), from(ids, 8 * rows, false, 8, "ids");
    check_ids(from.as<int64_t>(), rows);
    NormalTask task{to.as<void>(),     out_dtype, from.as<int64_t>(),  d, seed,
                    kTokenTableStream, factor,    bytes > kBypassBytes};
    py::gil_scoped_release unlocked;
    team_for(threads, rows, grain(d), [&](int64_t begin, int64_t end) { cpu().rows(task, begin, end); });
}

struct Shape {
    int64_t rows, d, k;
};

void check_shape(const Shape& shape) {
    check_dimension(shape.rows, "rows must be positive");
    require(shape.d > 0 && shape.d <= (1 << 20), "d must lie in [1, 2^20]");
    require(shape.k > 0 && shape.k <= kMaxK, "k must lie in [1, 1024]");
}

// Rows of one unit: enough to share a panel of U, few enough that every thread gets some, and that the sums
// of a unit stay bounded.
int64_t block_of(const Shape& s, int threads) {
    int64_t shares = 2 * std::max<int64_t>(threads, 1), share = (s.rows + shares - 1) / shares;
    int64_t most = std::min(kMaxBlock, kBlockFloats / padded(s.k) / kRowGroup * kRowGroup);
    return std::min(padded(std::max<int64_t>(share, 1), kRowGroup), most);
}

template <typename Work>
void parallel_blocks(const Shape& s, int64_t block, int threads, Work work) {
    team_for(threads, (s.rows + block - 1) / block, grain(block * s.d), work);
}

void run_expand(const Operand& c, int c_dtype, const Operand& basis, int basis_dtype, const int64_t* ids,
                const void* table, const Operand& h, int h_dtype, const Shape& s, uint64_t seed, float factor,
                int threads) {
    py::gil_scoped_release unlocked;
    const CpuKernels& kernels = cpu();
    const bool pairs = kernels.pairs && c_dtype == kBfloat16 && basis_dtype == kBfloat16;
    Basis whole{basis.as<void>(), basis_dtype, s.d, s.k};
    Layout panels = pairs ? pair_panels_of(whole) : panels_of(whole);
    ExpandTask task{c.as<void>(),
                    panels.get(),
                    ids,
                    table,
                    h.as<void>(),
                    s.rows,
                    s.d,
                    s.k,
                    block_of(s, threads),
                    c_dtype,
                    h_dtype,
                    seed,
                    factor,
                    s.rows * s.d * (h_dtype == kFloat32 ? 4 : 2) > kBypassBytes,
                    pairs};
    parallel_blocks(s, task.block, threads,
                    [&](int64_t begin, int64_t end) { kernels.expand(task, begin, end); });
}

void expand(py::object c, int c_dtype, py::object basis, int basis_dtype, py::object ids, py::object h,
            int h_dtype, int64_t rows, int64_t d, int64_t k, uint64_t seed, float factor, int threads) {
    Shape s{rows, d, k};
    check_shape(s);
    int64_t cw = size_of(c_dtype), uw = size_of(basis_dtype), hw = size_of(h_dtype);
    Operand from(c, rows * k * cw, false, size_t(cw), "c"), u(basis, d * k * uw, false, size_t(uw), "U");
    Operand tokens(ids, 8 * rows, false, 8, "ids"), to(h, rows * d * hw, true, size_t(hw), "h");
    check_ids(tokens.as<int64_t>(), rows);
    run_expand(from, c_dtype, u, basis_dtype, tokens.as<int64_t>(), nullptr, to, h_dtype, s, seed, factor,
               threads);
}

void expand_rows(py::object c, int c_dtype, py::object basis, int basis_dtype, py::object table, py::object h,
                 int h_dtype, int64_t rows, int64_t d, int64_t k, int threads) {
    Shape s{rows, d, k};
    check_shape(s);
    int64_t cw = size_of(c_dtype), uw = size_of(basis_dtype), hw = size_of(h_dtype);
    Operand from(c, rows * k * cw, false, size_t(cw), "c"), u(basis, d * k * uw, false, size_t(uw), "U");
    Operand plus(table, rows * d * hw, false, size_t(hw), "rows");
    Operand to(h, rows * d * hw, true, size_t(hw), "h");
    run_expand(from, c_dtype, u, basis_dtype, nullptr, plus.as<void>(), to, h_dtype, s, 0, 0, threads);
}

// Bytes of c in the dtype, or in the wire form kInt8.
int64_t packed_bytes(int dtype, int64_t rows, int64_t k) {
    return dtype == kInt8 ? rows * (k + 4) : rows * k * size_of(dtype);
}

// `table`: 0 (subtract nothing) or rows of h's dtype. `out` may lie at any address: it may be a message.
void project(py::object h, int h_dtype, py::object table, py::object basis, int basis_dtype, py::object out,
             int out_dtype, int64_t rows, int64_t d, int64_t k, int threads) {
    Shape s{rows, d, k};
    check_shape(s);
    int64_t hw = size_of(h_dtype), uw = size_of(basis_dtype);
    bool minus = !(PyLong_Check(table.ptr()) && table.equal(py::int_(0)));
    Operand from(h, rows * d * hw, false, size_t(hw), "h"), u(basis, d * k * uw, false, size_t(uw), "U");
    Operand less(table, minus ? rows * d * hw : 0, false, size_t(hw), "rows");
    Operand to(out, packed_bytes(out_dtype, rows, k), true, 1, "out");
    py::gil_scoped_release unlocked;
    Basis whole{u.as<void>(), basis_dtype, d, k};
    const CpuKernels& kernels = cpu();
    const bool pairs = kernels.pairs && !minus && h_dtype == kBfloat16 && basis_dtype == kBfloat16;
    Layout u_rows = pairs ? pair_rows_of(whole, whole_columns(k)) : rows_of(whole, whole_columns(k));
    Layout last = pairs ? pair_last_columns(whole) : last_columns(whole);
    ProjectTask task{from.as<void>(),
                     minus ? less.as<void>() : nullptr,
                     u_rows.get(),
                     last.get(),
                     to.as<void>(),
                     rows,
                     d,
                     k,
                     block_of(s, threads),
                     h_dtype,
                     out_dtype,
                     pairs};
    parallel_blocks(s, task.block, threads,
                    [&](int64_t begin, int64_t end) { kernels.project(task, begin, end); });
}

void wire_pack(py::object c, int c_dtype, py::object out, int wire, int64_t rows, int64_t k, int threads) {
    check_shape({rows, 1, k});
    int64_t cw = size_of(c_dtype);
    Operand from(c, rows * k * cw, false, size_t(cw), "c");
    Operand to(out, packed_bytes(wire, rows, k), true, 1, "out");
    WireTask task{from.as<void>(), to.as<void>(), rows, k, c_dtype, wire};
    py::gil_scoped_release unlocked;
    team_for(threads, rows, grain(k), [&](int64_t begin, int64_t end) { cpu().wire(task, begin, end); });
}

// W [d, n] in place.
void subspace_weights(py::object w, int w_dtype, py::object basis, int basis_dtype, int64_t d, int64_t n,
                      int64_t k, int threads) {
    Shape s{n, d, k};
    check_shape(s);
    int64_t ww = size_of(w_dtype), uw = size_of(basis_dtype);
    Operand to(w, d * n * ww, true, size_t(ww), "W"), u(basis, d * k * uw, false, size_t(uw), "U");
    py::gil_scoped_release unlocked;
    Layout u_rows = rows_of({u.as<void>(), basis_dtype, d, k}, k);
    // Columns of a unit: wide, so that pieces of W's rows are long; but every thread gets some.
    int64_t panel = kMaxPanel;
    while (panel > kPanel && (padded(k, kRowGroup) * panel > kPanelFloats || n < panel * threads)) panel /= 2;
    SubspaceTask task{to.as<void>(), u_rows.get(), d, n, k, panel, w_dtype, d * n * ww > kBypassBytes};
    team_for(threads, (n + panel - 1) / panel, grain(panel * d),
             [&](int64_t begin, int64_t end) { cpu().subspace(task, begin, end); });
}

py::tuple philox_words(uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint64_t key) {
    Words4<uint32_t> words = philox(Words4<uint32_t>{a, b, c, d}, key);
    return py::make_tuple(words.a, words.b, words.c, words.d);
}

}  // namespace

void bind_boundary(py::module_& m) {
    using py::arg;
    m.def("normal", &normal, arg("out"), arg("n"), arg("seed"), arg("stream"), arg("factor"), arg("threads"));
    m.def("token_rows", &token_rows, arg("out"), arg("out_dtype"), arg("ids"), arg("rows"), arg("d"),
          arg("seed"), arg("factor"), arg("threads"));
    m.def("expand", &expand, arg("c"), arg("c_dtype"), arg("basis"), arg("basis_dtype"), arg("ids"), arg("h"),
          arg("h_dtype"), arg("rows"), arg("d"), arg("k"), arg("seed"), arg("factor"), arg("threads"));
    m.def("expand_rows", &expand_rows, arg("c"), arg("c_dtype"), arg("basis"), arg("basis_dtype"),
          arg("table"), arg("h"), arg("h_dtype"), arg("rows"), arg("d"), arg("k"), arg("threads"));
    m.def("project", &project, arg("h"), arg("h_dtype"), arg("table"), arg("basis"), arg("basis_dtype"),
          arg("out"), arg("out_dtype"), arg("rows"), arg("d"), arg("k"), arg("threads"));
    m.def("wire_pack", &wire_pack, arg("c"), arg("c_dtype"), arg("out"), arg("wire"), arg("rows"), arg("k"),
          arg("threads"));
    m.def("subspace_weights", &subspace_weights, arg("w"), arg("w_dtype"), arg("basis"), arg("basis_dtype"),
          arg("d"), arg("n"), arg("k"), arg("threads"));
    m.def("philox", &philox_words, arg("a"), arg("b"), arg("c"), arg("d"), arg("key"));
}

}  // namespace agora
