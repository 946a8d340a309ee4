// project (h -> c) and the wire form of c. Included once per instruction set by kernels_inl.h.
//
// A unit of work is a block of rows that share pieces of U, which stay in L2; pieces of its rows pass through
// L1, where they are converted if need be.

namespace agora::AGORA_TARGET {

// Units of a row that stay in L1 while U's rows pass: these from L2, or for tiles of four rows from L1 too.
constexpr int64_t kProjectSpan = kRows == 8 ? 512 : 128;

// On AVX2 project_difference takes 16.7 ms so, beside 22.3; with AVX-512 11.6 beside 14.2.
constexpr bool kAskTwin = kZen;

// Asks for the rows that will be read next, a line a step: the hardware does not foresee the jump from a
// piece of one row to the next row's. Into L2: rows of d numbers often lie at the same places of L1, which
// has room for one group of them beside U.
struct Soon {
    static constexpr int kEvery = 2;
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

// sums[r][j], as lanes: += left[r] times row j of `last`, j < N; n is a multiple of kWidth.
template <typename Unit, int N>
AGORA_FN void dots(float* lanes, const float* left, int64_t left_stride, const float* last,
                   int64_t last_stride, int64_t n) {
    Floats acc[kRows][N] = {};
    for (int64_t i = 0; i < n; i += kWidth) {
        Floats column[N];
        for (int j = 0; j < N; j++) column[j] = load_floats(last + j * last_stride + i);
        for (int r = 0; r < kRows; r++) {
            Floats row = load_floats(left + r * left_stride + i);
            for (int j = 0; j < N; j++) acc[r][j] = Unit::add(row, column[j], acc[r][j]);
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

// `n` numbers of a row of h as units, with zeros behind them to a whole vector.
template <typename Unit>
AGORA_FN void lay_row(float* to, const ProjectTask& t, int64_t at, int64_t n) {
    int64_t units = (n + Unit::kNumbers - 1) / Unit::kNumbers;
    for (int64_t j = n / Unit::kNumbers; j < padded(units); j++) to[j] = 0;
    if (Unit::kNumbers == 2)
        memcpy(to, static_cast<const Bf16*>(t.h) + at, size_t(n) * sizeof(Bf16));
    else if (t.table)
        difference(to, t.h, t.table, t.h_dtype, at, n);
    else
        widen(to, t.h, t.h_dtype, at, n);
}

// Whether rows of h are rows of units as they lie.
template <typename Unit>
AGORA_FN bool in_units(const ProjectTask& t) {
    if (Unit::kNumbers == 2) return t.d % 2 == 0 && reinterpret_cast<uintptr_t>(t.h) % sizeof(float) == 0;
    return t.h_dtype == kFloat32 && !t.table;
}

template <typename Unit>
static void project_block(const ProjectTask& t, int64_t first, int64_t rows) {
    constexpr int64_t kSpan = kProjectSpan, kNumbers = Unit::kNumbers;
    // A few columns past the last whole vector are cheaper as sums of lanes along d than as one more vector.
    const int64_t units = (t.d + kNumbers - 1) / kNumbers;
    const int64_t stride = padded(t.k), u_stride = padded(whole_columns(t.k)), last_stride = padded(units);
    const int64_t few = t.k % kWidth <= kLast ? t.k % kWidth : 0;
    const int64_t vectors = (t.k - few + kWidth - 1) / kWidth;
    alignas(64) float left[kRows * kSpan], sums[kBlockFloats], lanes[kMaxBlock * kLast * kWidth];
    memset(sums, 0, size_t(padded(rows, kRows) * stride) * sizeof(float));
    memset(lanes, 0, sizeof lanes);
    const int64_t size = t.h_dtype == kFloat32 ? 4 : 2;
    const bool as_they_lie = in_units<Unit>(t);
    for (int64_t unit = 0; unit < units; unit += kSpan) {
        const int64_t width = units - unit < kSpan ? units - unit : kSpan;
        const int64_t column = unit * kNumbers;
        const int64_t numbers = t.d - column < kSpan * kNumbers ? t.d - column : kSpan * kNumbers;
        for (int64_t group = 0; group < rows; group += kRows) {
            const float* from = left;
            int64_t from_stride = kSpan;
            if (as_they_lie && group + kRows <= rows && width % kWidth == 0) {
                from = reinterpret_cast<const float*>(static_cast<const char*>(t.h) +
                                                      ((first + group) * t.d + column) * size);
                from_stride = units;
            } else {
                for (int64_t r = 0; r < kRows; r++) {
                    int64_t row = group + r < rows ? group + r : group;
                    lay_row<Unit>(left + r * kSpan, t, (first + row) * t.d + column, numbers);
                }
            }
            // The next group, or the first one's next columns.
            const int64_t next = group + kRows < rows ? (first + group + kRows) * t.d + column
                                                      : first * t.d + column + kSpan * kNumbers;
            const int64_t lines = kSpan * kNumbers * size / 64;
            const void* twin = t.table ? t.table : t.h;
            Soon soon = {static_cast<const char*>(t.h) + next * size,
                         static_cast<const char*>(twin) + next * size, lines, (t.d - kSpan * kNumbers) * size,
                         lines};
            product<Unit, kByRows>(sums + group * stride, stride, from, from_stride,
                                   t.basis + unit * u_stride, u_stride, width, vectors, soon);
            float* to = lanes + group * kLast * kWidth;
            const float* columns = t.last + (kLast - few) * last_stride + unit;
            if (few == 3)
                dots<Unit, 3>(to, from, from_stride, columns, last_stride, padded(width, kWidth));
            else if (few == 2)
                dots<Unit, 2>(to, from, from_stride, columns, last_stride, padded(width, kWidth));
            else if (few == 1)
                dots<Unit, 1>(to, from, from_stride, columns, last_stride, padded(width, kWidth));
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

template <typename Unit>
AGORA_FN void project_blocks(const ProjectTask& t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
        project_block<Unit>(t, i * t.block, t.rows - i * t.block < t.block ? t.rows - i * t.block : t.block);
}

static void project(const ProjectTask& t, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
    if (t.pairs) return project_blocks<Pairs>(t, begin, end);
#endif
    project_blocks<Singles>(t, begin, end);
}

static void wire(const WireTask& t, int64_t begin, int64_t end) {
    alignas(64) float c[kMaxK];
    for (int64_t row = begin; row < end; row++) {
        widen(c, t.c, t.c_dtype, row * t.k, t.k);
        put_row(t.out, t.wire, row, t.rows, c, t.k);
    }
}

}  // namespace agora::AGORA_TARGET
