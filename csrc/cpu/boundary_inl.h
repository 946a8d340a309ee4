// expand (c -> h), project (h -> c), the wire form of c, and subspace_weights. Included once per
// instruction set by kernels_inl.h.
//
// All are products with a tall, thin U: k is 16 to 64 where d is in the thousands. kRows rows at a time
// share every loaded vector of U; each output element has its own chain of additions in a fixed order, so
// that a row's result depends on nothing but that row, however many rows or threads there are.
// A unit is a block of rows that share panels of U, which stay in L2; pieces of its rows pass through L1,
// where they are converted to fp32, and each ends in the pass that writes its output.

namespace agora::AGORA_TARGET {

constexpr int kVectors = 3;               // of the register tile's columns: kRows x 3 sums in flight
constexpr int kTile = kVectors * kWidth;  // divides kPanel
#if defined(__AVX512F__)
constexpr int kRows = 8;  // of 32 registers: 24 sums, 3 of U, a factor
#else
constexpr int kRows = 4;  // of 16 registers: 12 sums, 3 of U, a factor
#endif
static_assert(kPanel % kTile == 0 && kRowGroup % kRows == 0, "layouts hold whole tiles");

// Sums run over kRun products and then over the runs: one long chain would lose two to four times the
// precision of a library's product.
constexpr int64_t kRun = 128;

// sums[r][j] += over i < n of left[r][i] * right[i][j]; kRows rows of `left`, N vectors of columns.
template <int N>
AGORA_FN void tile_product(float* sums, int64_t sums_stride, const float* left, int64_t left_stride,
                           const float* right, int64_t right_stride, int64_t n) {
    for (int64_t run = 0; run < n; run += kRun) {
        int64_t end = run + kRun < n ? run + kRun : n;
        Floats acc[kRows][N] = {};
        for (int64_t i = run; i < end; i++) {
            Floats row[N];
            for (int v = 0; v < N; v++) row[v] = load_floats(right + i * right_stride + v * kWidth);
            for (int r = 0; r < kRows; r++) {
                Floats factor = left[r * left_stride + i] - Floats{};
                for (int v = 0; v < N; v++) acc[r][v] = multiply_add(factor, row[v], acc[r][v]);
            }
        }
        for (int r = 0; r < kRows; r++) {
            for (int v = 0; v < N; v++) {
                float* to = sums + r * sums_stride + v * kWidth;
                store_floats(to, load_floats(to) + acc[r][v]);
            }
        }
    }
}

// The same for any number of vectors.
static void product(float* sums, int64_t sums_stride, const float* left, int64_t left_stride,
                    const float* right, int64_t right_stride, int64_t n, int64_t vectors) {
    int64_t v = 0;
    for (; v + kVectors <= vectors; v += kVectors)
        tile_product<kVectors>(sums + v * kWidth, sums_stride, left, left_stride, right + v * kWidth,
                               right_stride, n);
    if (vectors - v == 2)
        tile_product<2>(sums + v * kWidth, sums_stride, left, left_stride, right + v * kWidth, right_stride,
                        n);
    else if (vectors - v == 1)
        tile_product<1>(sums + v * kWidth, sums_stride, left, left_stride, right + v * kWidth, right_stride,
                        n);
}

constexpr int64_t kExpandSpan = 8 * kPanel;  // floats of a row between two passes over them

static void expand_block(const ExpandTask& t, int64_t first, int64_t rows) {
    constexpr int64_t kSpan = kExpandSpan;
    float c[kRows * kMaxK], table[kSpan], sums[kRows * kSpan];
    for (int64_t column = 0; column < t.d; column += kSpan) {
        int64_t width = t.d - column < kSpan ? t.d - column : kSpan;
        for (int64_t group = 0; group < rows; group += kRows) {
            int count = int(rows - group < kRows ? rows - group : kRows);
            for (int r = 0; r < kRows; r++)
                widen(c + r * t.k, t.c, t.c_dtype, (first + group + (r < count ? r : 0)) * t.k, t.k);
            memset(sums, 0, sizeof sums);
            for (int64_t j = 0; j < width; j += kPanel)
                product(sums + j, kSpan, c, t.k, t.basis + (column + j) * t.k, kPanel, t.k, kPanel / kWidth);
            for (int r = 0; r < count; r++) {
                int64_t row = first + group + r, at = row * t.d + column;
                if (t.table)
                    widen(table, t.table, t.h_dtype, at, width);
                else
                    normal_row(table, t.seed, kTokenTableStream, uint32_t(t.ids[row]), uint32_t(column / 4),
                               width, t.factor);
                float* sum = sums + r * kSpan;
                for (int64_t j = 0; j < width; j++) sum[j] = add_rounded(sum[j], table[j]);
                narrow(t.h, t.h_dtype, at, sum, width, t.bypass);
            }
        }
    }
    if (t.bypass) finish_streams();
}

static void expand(const ExpandTask& t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
        expand_block(t, i * t.block, t.rows - i * t.block < t.block ? t.rows - i * t.block : t.block);
}

constexpr int64_t kProjectSpan = 256;  // floats of a row that stay in L1 while U's panel passes

// sums[r][j], as lanes: += left[r] times row j of `last`, j < N; n is a multiple of kWidth.
template <int N>
AGORA_FN void dots(float* lanes, const float* left, int64_t left_stride, const float* last,
                   int64_t last_stride, int64_t n) {
    Floats acc[kRows][N] = {};
    for (int64_t i = 0; i < n; i += kWidth) {
        Floats column[N];
        for (int j = 0; j < N; j++) column[j] = load_floats(last + j * last_stride + i);
        for (int r = 0; r < kRows; r++) {
            Floats row = load_floats(left + r * left_stride + i);
            for (int j = 0; j < N; j++) acc[r][j] = multiply_add(row, column[j], acc[r][j]);
        }
    }
    for (int r = 0; r < kRows; r++) {
        for (int j = 0; j < N; j++) {
            float* to = lanes + (r * kLast + j) * kWidth;
            store_floats(to, load_floats(to) + acc[r][j]);
        }
    }
}

static void wire_row(void* out, int64_t row, int64_t rows, const float* c, int64_t k) {
    uint32_t largest = 0;
    for (int64_t j = 0; j < k; j++) {
        uint32_t size = magnitude_bits(c[j]);
        largest = size > largest ? size : largest;
    }
    float scale = wire_scale(largest), divisor = wire_divisor(scale);
    memcpy(static_cast<char*>(out) + row * int64_t(sizeof scale), &scale, sizeof scale);
    int8_t* codes = static_cast<int8_t*>(out) + rows * int64_t(sizeof scale) + row * k;
    for (int64_t j = 0; j < k; j++) codes[j] = wire_code(c[j], divisor);
}

// One row of c in fp32 to its place in `out`.
static void put_row(void* out, int dtype, int64_t row, int64_t rows, const float* c, int64_t k) {
    if (dtype == kInt8)
        wire_row(out, row, rows, c, k);
    else
        narrow(out, dtype, row * k, c, k, false);
}

static void project_block(const ProjectTask& t, int64_t first, int64_t rows) {
    constexpr int64_t kSpan = kProjectSpan;
    // A few columns past the last whole vector are cheaper as sums of lanes along d than as one more vector.
    const int64_t stride = padded(t.k), last_stride = padded(t.d);
    const int64_t few = t.k % kWidth <= kLast ? t.k % kWidth : 0;
    const int64_t vectors = (t.k - few + kWidth - 1) / kWidth;
    float left[kRows * kSpan], sums[kBlockFloats], lanes[kMaxBlock * kLast * kWidth];
    memset(sums, 0, size_t(padded(rows, kRows) * stride) * sizeof(float));
    memset(lanes, 0, sizeof lanes);
    for (int64_t column = 0; column < t.d; column += kSpan) {
        int64_t width = t.d - column < kSpan ? t.d - column : kSpan;
        for (int64_t group = 0; group < rows; group += kRows) {
            for (int64_t r = 0; r < kRows; r++) {
                int64_t row = group + r < rows ? group + r : group, at = (first + row) * t.d + column;
                widen(left + r * kSpan, t.h, t.h_dtype, at, width);
                if (t.table) subtract(left + r * kSpan, t.table, t.h_dtype, at, width);
                for (int64_t j = width; j < padded(width); j++) left[r * kSpan + j] = 0;
            }
            product(sums + group * stride, stride, left, kSpan, t.basis + column * stride, stride, width,
                    vectors);
            float* to = lanes + group * kLast * kWidth;
            const float* columns = t.last + (kLast - few) * last_stride + column;
            if (few == 3)
                dots<3>(to, left, kSpan, columns, last_stride, padded(width));
            else if (few == 2)
                dots<2>(to, left, kSpan, columns, last_stride, padded(width));
            else if (few == 1)
                dots<1>(to, left, kSpan, columns, last_stride, padded(width));
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        float* sum = sums + r * stride;
        for (int64_t j = 0; j < few; j++) {
            const float* lane = lanes + (r * kLast + j) * kWidth;
            float total = 0;
            for (int i = 0; i < kWidth; i++) total += lane[i];
            sum[t.k - few + j] = total;
        }
        put_row(t.out, t.out_dtype, first + r, t.rows, sum, t.k);
    }
}

static void project(const ProjectTask& t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
        project_block(t, i * t.block, t.rows - i * t.block < t.block ? t.rows - i * t.block : t.block);
}

static void wire(const WireTask& t, int64_t begin, int64_t end) {
    float c[kMaxK];
    for (int64_t row = begin; row < end; row++) {
        widen(c, t.c, t.c_dtype, row * t.k, t.k);
        put_row(t.out, t.wire, row, t.rows, c, t.k);
    }
}

static void subspace_panel(const SubspaceTask& t, int64_t first) {
    float block[kRun * kMaxPanel], products[kPanelFloats], sums[kRows * kMaxPanel];
    const int64_t panel = t.panel, width = t.n - first < panel ? t.n - first : panel;
    const int64_t vectors = (width + kWidth - 1) / kWidth, stride = padded(t.k), length = padded(t.d);
    memset(products, 0, size_t(padded(t.k, kRowGroup) * panel) * sizeof(float));
    for (int64_t row = 0; row < t.d; row += kRun) {
        int64_t depth = t.d - row < kRun ? t.d - row : kRun;
        for (int64_t i = 0; i < depth; i++) {
            widen(block + i * panel, t.w, t.w_dtype, (row + i) * t.n + first, width);
            for (int64_t j = width; j < vectors * kWidth; j++) block[i * panel + j] = 0;
        }
        for (int64_t j = 0; j < t.k; j += kRows)
            product(products + j * panel, panel, t.columns_of_u + j * length + row, length, block, panel,
                    depth, vectors);
    }
    for (int64_t row = 0; row < t.d; row += kRows) {
        memset(sums, 0, sizeof sums);
        product(sums, panel, t.rows_of_u + row * stride, stride, products, panel, t.k, vectors);
        for (int64_t r = 0; r < kRows && row + r < t.d; r++)
            narrow(t.w, t.w_dtype, (row + r) * t.n + first, sums + r * panel, width, false);
    }
}

static void subspace(const SubspaceTask& t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) subspace_panel(t, i * t.panel);
}

}  // namespace agora::AGORA_TARGET
