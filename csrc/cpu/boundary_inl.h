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

// acc[r][v] += over begin <= i < end of left[r * across + i * along] * right[i], N vectors of it. Every other
// step does a bit of `aside`, so that memory has something to do meanwhile.
template <int N, typename Aside>
AGORA_FN void accumulate(Floats (&acc)[kRows][N], const float* left, int64_t across, int64_t along,
                         const float* right, int64_t right_stride, int64_t begin, int64_t end,
                         Aside& aside_) {
    Aside aside = aside_;  // in registers
    // Two addresses that the compiler cannot see through reach eight rows with the stride as an index. Left
    // to itself it keeps one a row, runs out of registers, and fetches them back through the multiplier's
    // port.
    const int64_t stride = across * int64_t(sizeof(float));
    const char* low = reinterpret_cast<const char*>(left + begin * along);
    const char* high = low + 4 * stride;
    for (int64_t i = begin; i < end; i++) {
        asm("" : "+r"(low), "+r"(high));
        Floats vectors[N];
        for (int v = 0; v < N; v++) vectors[v] = load_floats(right + i * right_stride + v * kWidth);
        for (int r = 0; r < kRows; r++) {
            const char* at = r < 4 ? low + r * stride : high + (r - 4) * stride;
            Floats factor = *reinterpret_cast<const float*>(at) - Floats{};
            for (int v = 0; v < N; v++) acc[r][v] = multiply_add(factor, vectors[v], acc[r][v]);
        }
        low += along * int64_t(sizeof(float));
        high += along * int64_t(sizeof(float));
        if (i % 2) aside.step();
    }
    aside_ = aside;
}

struct Nothing {
    __attribute__((always_inline)) inline void step() {}
};

// On AVX2 project_difference takes 16.7 ms so, beside 22.3; with AVX-512 it has not been tried.
constexpr bool kAskTwin = kZen;

// Asks for the rows that will be read next, a line a step: the hardware does not foresee the jump from a
// piece of one row to the next row's. Into L2: rows of d numbers often lie at the same places of L1, which
// has room for one group of them beside U.
struct Soon {
    const char *line, *twin;    // twin: of what is subtracted, or the same line again
    int64_t lines, jump, left;  // lines of a row, bytes from one row's end to the next row

    __attribute__((always_inline)) inline void step() {
        __builtin_prefetch(line, 0, 2);
        line += 64;
        if (kAskTwin) {
            __builtin_prefetch(twin, 0, 2);
            twin += 64;
        }
        if (--left == 0) {
            line += jump;
            twin += jump;
            left = lines;
        }
    }
};

// How the left factor lies: row after row, or transposed, column after column.
enum Left { kByRows, kByColumns };

// sums[r][j] += over i < n of left(r, i) * right[i][j]; kRows rows of `left`, N vectors of columns.
// Not inlined: the loop needs the registers of a function of its own.
template <int N, Left kLeft, typename Aside>
static __attribute__((noinline)) void tile_product(float* sums, int64_t sums_stride, const float* left,
                                                   int64_t left_stride, const float* right,
                                                   int64_t right_stride, int64_t n, Aside& aside) {
    const int64_t across = kLeft == kByRows ? left_stride : 1, along = kLeft == kByRows ? 1 : left_stride;
    for (int64_t run = 0; run < n; run += kRun) {
        Floats acc[kRows][N] = {};
        accumulate<N>(acc, left, across, along, right, right_stride, run, run + kRun < n ? run + kRun : n,
                      aside);
        for (int r = 0; r < kRows; r++) {
            for (int v = 0; v < N; v++) {
                float* to = sums + r * sums_stride + v * kWidth;
                store_floats(to, load_floats(to) + acc[r][v]);
            }
        }
    }
}

// The same for any number of vectors.
template <Left kLeft, typename Aside>
AGORA_FN void product(float* sums, int64_t sums_stride, const float* left, int64_t left_stride,
                      const float* right, int64_t right_stride, int64_t n, int64_t vectors, Aside& aside) {
    Nothing nothing;
    int64_t v = 0;
    if (vectors >= kVectors) {
        tile_product<kVectors, kLeft>(sums, sums_stride, left, left_stride, right, right_stride, n, aside);
        v = kVectors;
    }
    for (; v + kVectors <= vectors; v += kVectors)
        tile_product<kVectors, kLeft>(sums + v * kWidth, sums_stride, left, left_stride, right + v * kWidth,
                                      right_stride, n, nothing);
    if (vectors - v == 2)
        tile_product<2, kLeft>(sums + v * kWidth, sums_stride, left, left_stride, right + v * kWidth,
                               right_stride, n, nothing);
    else if (vectors - v == 1)
        tile_product<1, kLeft>(sums + v * kWidth, sums_stride, left, left_stride, right + v * kWidth,
                               right_stride, n, nothing);
}

// Floats of a row that stay in L1 between two passes. A tile of four rows reads U twice as often as one of
// eight, and wants less of it between them: on AVX2 15 ms beside 22 for eight panels (two are as fast).
constexpr int64_t kExpandSpan = (kRows == 8 ? 8 : 4) * kPanel;

// Brings a group's sums to memory, a vector a step, adding rows of the table on the way, while the products
// of the next group are made.
struct Delivery {
    const float *sums, *plus;  // plus: null where the sums are complete
    float* to;
    int64_t width, stride;  // floats: of a row here, from row to row of `plus` and `to`
    int64_t ahead;          // floats from here to where `plus` will be read next
    int64_t left, rows;
    bool bypass;

    __attribute__((always_inline)) inline void step() {
        if (rows == 0) return;
        Floats h = load_floats(sums);
        if (plus) {
            h += load_floats(plus);
            __builtin_prefetch(plus + ahead, 0, 2);  // L1 holds the sums
            plus += kWidth;
        }
        if (bypass)
            stream_floats(to, h);
        else
            store_floats(to, h);
        sums += kWidth;
        to += kWidth;
        left -= kWidth;
        if (left == 0) {
            left = width;
            rows--;
            sums += kExpandSpan - width;
            to += stride - width;
            if (plus) plus += stride - width;
        }
    }
};

// sums = c U^T (+ table), N vectors of columns of kRows rows. `c`: k times kRows numbers.
template <int N>
AGORA_FN void expand_tile(float* sums, const float* c, int64_t k, const float* panel, const float* table,
                          Delivery& aside) {
    Floats acc[kRows][N] = {};
    accumulate<N>(acc, c, 1, kRows, panel, kPanel, 0, k < kRun ? k : kRun, aside);
    for (int64_t run = kRun; run < k; run += kRun) {
        Floats more[kRows][N] = {};
        accumulate<N>(more, c, 1, kRows, panel, kPanel, run, run + kRun < k ? run + kRun : k, aside);
        for (int r = 0; r < kRows; r++)
            for (int v = 0; v < N; v++) acc[r][v] += more[r][v];
    }
    for (int r = 0; r < kRows; r++) {
        for (int v = 0; v < N; v++) {
            int64_t at = r * kExpandSpan + v * kWidth;
            if (table) acc[r][v] += load_floats(table + at);
            store_floats(sums + at, acc[r][v]);
        }
    }
}

static void expand_block(const ExpandTask& t, int64_t first, int64_t rows) {
    constexpr int64_t kSpan = kExpandSpan;
    alignas(64) float c[kBlockFloats], table[kRows * kSpan], both[2][kRows * kSpan];
    for (int64_t row = 0; row < padded(rows, kRows); row++) {
        alignas(64) float one[kMaxK];
        widen(one, t.c, t.c_dtype, (first + (row < rows ? row : 0)) * t.k, t.k);
        float* to = c + row / kRows * kRows * t.k + row % kRows;
        for (int64_t j = 0; j < t.k; j++) to[j * kRows] = one[j];
    }
    Delivery delivery = {};
    int turn = 0;
    for (int64_t column = 0; column < t.d; column += kSpan) {
        const int64_t width = t.d - column < kSpan ? t.d - column : kSpan;
        for (int64_t group = 0; group < rows; group += kRows) {
            const int64_t at = (first + group) * t.d + column;
            const int count = int(rows - group < kRows ? rows - group : kRows);
            const bool whole = t.h_dtype == kFloat32 && count == kRows && width % kWidth == 0;
            const bool later = whole && t.table;  // the rows are added on delivery
            if (!later) {
                for (int r = 0; r < count; r++) {
                    if (t.table)
                        widen(table + r * kSpan, t.table, t.h_dtype, at + r * t.d, width);
                    else
                        normal_row(table + r * kSpan, t.seed, kTokenTableStream,
                                   uint32_t(t.ids[first + group + r]), uint32_t(column / 4), width, t.factor);
                }
            }
            turn = 1 - turn;  // the other half may be on its way to memory
            float* sums = both[turn];
            for (int64_t j = 0; j < width; j += kTile) {
                const float* panel = t.basis + (column + j) / kPanel * kPanel * t.k + (column + j) % kPanel;
                const float* plus = later ? nullptr : table + j;
                if (width - j > 2 * kWidth)
                    expand_tile<3>(sums + j, c + group * t.k, t.k, panel, plus, delivery);
                else if (width - j > kWidth)
                    expand_tile<2>(sums + j, c + group * t.k, t.k, panel, plus, delivery);
                else
                    expand_tile<1>(sums + j, c + group * t.k, t.k, panel, plus, delivery);
            }
            while (delivery.rows) delivery.step();
            if (whole) {
                const float* plus = later ? static_cast<const float*>(t.table) + at : nullptr;
                float* to = static_cast<float*>(t.h) + at;
                bool lines = reinterpret_cast<uintptr_t>(to) % 64 == 0 && t.d % kPad == 0;
                bool last = group + kRows == rows;
                delivery = {sums,  plus,  to,
                            width, t.d,   last ? kSpan - group * t.d : kRows * t.d,
                            width, kRows, t.bypass && lines};
            } else {
                for (int r = 0; r < count; r++)
                    narrow(t.h, t.h_dtype, at + r * t.d, sums + r * kSpan, width, t.bypass);
            }
        }
    }
    while (delivery.rows) delivery.step();
    if (t.bypass) finish_streams();
}

static void expand(const ExpandTask& t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
        expand_block(t, i * t.block, t.rows - i * t.block < t.block ? t.rows - i * t.block : t.block);
}

// Floats of a row that stay in L1 while U's rows pass: these from L2, or for tiles of four rows from L1 too.
constexpr int64_t kProjectSpan = kRows == 8 ? 512 : 128;

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
    const int64_t stride = padded(t.k), u_stride = padded(whole_columns(t.k)), last_stride = padded(t.d);
    const int64_t few = t.k % kWidth <= kLast ? t.k % kWidth : 0;
    const int64_t vectors = (t.k - few + kWidth - 1) / kWidth;
    alignas(64) float left[kRows * kSpan], sums[kBlockFloats], lanes[kMaxBlock * kLast * kWidth];
    memset(sums, 0, size_t(padded(rows, kRows) * stride) * sizeof(float));
    memset(lanes, 0, sizeof lanes);
    const int64_t size = t.h_dtype == kFloat32 ? 4 : 2;
    for (int64_t column = 0; column < t.d; column += kSpan) {
        int64_t width = t.d - column < kSpan ? t.d - column : kSpan;
        for (int64_t group = 0; group < rows; group += kRows) {
            const float* from = left;
            int64_t from_stride = kSpan;
            if (t.h_dtype == kFloat32 && !t.table && group + kRows <= rows && width % kWidth == 0) {
                from = static_cast<const float*>(t.h) + (first + group) * t.d + column;
                from_stride = t.d;
            } else {
                for (int64_t r = 0; r < kRows; r++) {
                    int64_t row = group + r < rows ? group + r : group, at = (first + row) * t.d + column;
                    if (t.table)
                        difference(left + r * kSpan, t.h, t.table, t.h_dtype, at, width);
                    else
                        widen(left + r * kSpan, t.h, t.h_dtype, at, width);
                    for (int64_t j = width; j < padded(width); j++) left[r * kSpan + j] = 0;
                }
            }
            // The next group, or the first one's next columns.
            const int64_t next =
                group + kRows < rows ? (first + group + kRows) * t.d + column : first * t.d + column + kSpan;
            const void* twin = t.table ? t.table : t.h;
            Soon soon = {static_cast<const char*>(t.h) + next * size,
                         static_cast<const char*>(twin) + next * size, kSpan * size / 64,
                         (t.d - kSpan) * size, kSpan * size / 64};
            product<kByRows>(sums + group * stride, stride, from, from_stride, t.basis + column * u_stride,
                             u_stride, width, vectors, soon);
            float* to = lanes + group * kLast * kWidth;
            const float* columns = t.last + (kLast - few) * last_stride + column;
            if (few == 3)
                dots<3>(to, from, from_stride, columns, last_stride, padded(width, kWidth));
            else if (few == 2)
                dots<2>(to, from, from_stride, columns, last_stride, padded(width, kWidth));
            else if (few == 1)
                dots<1>(to, from, from_stride, columns, last_stride, padded(width, kWidth));
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
    alignas(64) float c[kMaxK];
    for (int64_t row = begin; row < end; row++) {
        widen(c, t.c, t.c_dtype, row * t.k, t.k);
        put_row(t.out, t.wire, row, t.rows, c, t.k);
    }
}

static void subspace_panel(const SubspaceTask& t, int64_t first) {
    Nothing nothing;
    alignas(64) float block[kRun * kMaxPanel], products[kPanelFloats], sums[kRows * kMaxPanel];
    const int64_t panel = t.panel, width = t.n - first < panel ? t.n - first : panel;
    const int64_t vectors = (width + kWidth - 1) / kWidth, stride = padded(t.k);
    const int64_t size = t.w_dtype == kFloat32 ? 4 : 2;
    constexpr int64_t kAhead = 8;  // rows
    memset(products, 0, size_t(padded(t.k, kRowGroup) * panel) * sizeof(float));
    for (int64_t row = 0; row < t.d; row += kRun) {
        int64_t depth = t.d - row < kRun ? t.d - row : kRun;
        for (int64_t i = 0; i < depth; i++) {
            int64_t at = (row + i) * t.n + first;
            const char* soon = static_cast<const char*>(t.w) + (at + kAhead * t.n) * size;
            for (int64_t byte = 0; byte < width * size; byte += 64) __builtin_prefetch(soon + byte);
            widen(block + i * panel, t.w, t.w_dtype, at, width);
            for (int64_t j = width; j < vectors * kWidth; j++) block[i * panel + j] = 0;
        }
        for (int64_t j = 0; j < t.k; j += kRows)
            product<kByColumns>(products + j * panel, panel, t.basis + row * stride + j, stride, block, panel,
                                depth, vectors, nothing);
    }
    for (int64_t row = 0; row < t.d; row += kRows) {
        memset(sums, 0, sizeof sums);
        product<kByRows>(sums, panel, t.basis + row * stride, stride, products, panel, t.k, vectors, nothing);
        for (int64_t r = 0; r < kRows && row + r < t.d; r++)
            narrow(t.w, t.w_dtype, (row + r) * t.n + first, sums + r * panel, width, t.bypass);
    }
    if (t.bypass) finish_streams();
}

static void subspace(const SubspaceTask& t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) subspace_panel(t, i * t.panel);
}

}  // namespace agora::AGORA_TARGET
