// expand (c -> h). Included once per instruction set by kernels_inl.h.
//
// A unit of work is a block of rows that share panels of U, which stay in L2; pieces of its rows stay in L1
// until they are delivered to memory, rounded, while the next are made.

namespace agora::AGORA_TARGET {

// Floats of a row that stay in L1 between two passes. A tile of four rows reads U twice as often as one of
// eight, and wants less of it between them: on AVX2 15 ms beside 22 for eight panels (two are as fast).
constexpr int64_t kExpandSpan = (kRows == 8 ? 8 : 4) * kPanel;

// Brings a group's sums to memory, a vector a step, adding rows of the table on the way, while the products
// of the next group are made.
template <typename Unit, typename To>
struct Delivery {
    static constexpr int kEvery = 2 / Unit::kNumbers;
    const float* sums;
    const To* plus;  // null where the sums are complete
    To* to;
    int64_t width, stride;  // numbers: of a row here, from row to row of `plus` and `to`
    int64_t ahead;          // numbers from here to where `plus` will be read next
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

// sums = c U^T (+ table), N vectors of columns of kRows rows. `c`: n times kRows units.
template <typename Unit, int N, typename Aside>
AGORA_FN void expand_tile(float* sums, const float* c, int64_t n, const float* panel, const float* table,
                          Aside& aside) {
    constexpr int64_t kMost = kRun<Unit>;
    Floats acc[kRows][N] = {};
    accumulate<Unit, N>(acc, c, 1, kRows, panel, kPanel, 0, n < kMost ? n : kMost, aside);
    for (int64_t run = kMost; run < n; run += kMost) {
        Floats more[kRows][N] = {};
        accumulate<Unit, N>(more, c, 1, kRows, panel, kPanel, run, run + kMost < n ? run + kMost : n, aside);
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

// Row `from` of c as column `to` of its units, kRows to a line; the last pair may be half of one.
template <typename Unit>
AGORA_FN void lay_factors(float* to, const ExpandTask& t, int64_t from) {
    alignas(64) float one[kMaxK];
    const int64_t units = (t.k + Unit::kNumbers - 1) / Unit::kNumbers;
    if (Unit::kNumbers == 1) {
        widen(one, t.c, t.c_dtype, from * t.k, t.k);
    } else {
        one[units - 1] = 0;
        memcpy(one, static_cast<const Bf16*>(t.c) + from * t.k, size_t(t.k) * sizeof(Bf16));
    }
    for (int64_t j = 0; j < units; j++) memcpy(to + j * kRows, one + j, sizeof(float));
}

template <typename Unit, typename To>
static void expand_block(const ExpandTask& t, int64_t first, int64_t rows) {
    constexpr int64_t kSpan = kExpandSpan;
    const int64_t units = (t.k + Unit::kNumbers - 1) / Unit::kNumbers;
    alignas(64) float c[kBlockFloats], table[kRows * kSpan], both[2][kRows * kSpan];
    for (int64_t row = 0; row < padded(rows, kRows); row++)
        lay_factors<Unit>(c + row / kRows * kRows * units + row % kRows, t, first + (row < rows ? row : 0));
    Delivery<Unit, To> delivery = {};
    int turn = 0;
    for (int64_t column = 0; column < t.d; column += kSpan) {
        const int64_t width = t.d - column < kSpan ? t.d - column : kSpan;
        for (int64_t group = 0; group < rows; group += kRows) {
            const int64_t at = (first + group) * t.d + column;
            const int count = int(rows - group < kRows ? rows - group : kRows);
            const bool whole = count == kRows && width % kWidth == 0;
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
                const float* panel = t.basis + (column + j) / kPanel * kPanel * units + (column + j) % kPanel;
                const float* plus = later ? nullptr : table + j;
                if (width - j > 2 * kWidth)
                    expand_tile<Unit, 3>(sums + j, c + group * units, units, panel, plus, delivery);
                else if (width - j > kWidth)
                    expand_tile<Unit, 2>(sums + j, c + group * units, units, panel, plus, delivery);
                else
                    expand_tile<Unit, 1>(sums + j, c + group * units, units, panel, plus, delivery);
            }
            while (delivery.rows) delivery.step();
            if (whole) {
                const To* plus = later ? static_cast<const To*>(t.table) + at : nullptr;
                To* to = static_cast<To*>(t.h) + at;
                bool lines = reinterpret_cast<uintptr_t>(to) % 64 == 0 && t.d * sizeof(To) % 64 == 0;
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

template <typename Unit, typename To>
AGORA_FN void expand_blocks(const ExpandTask& t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
        expand_block<Unit, To>(t, i * t.block,
                               t.rows - i * t.block < t.block ? t.rows - i * t.block : t.block);
}

template <typename Unit>
static void expand_units(const ExpandTask& t, int64_t begin, int64_t end) {
    if (t.h_dtype == kFloat32)
        expand_blocks<Unit, float>(t, begin, end);
    else if (t.h_dtype == kBfloat16)
        expand_blocks<Unit, Bf16>(t, begin, end);
    else
        expand_blocks<Unit, Fp16>(t, begin, end);
}

static void expand(const ExpandTask& t, int64_t begin, int64_t end) {
#if defined(__AVX512BF16__)
    if (t.pairs) return expand_units<Pairs>(t, begin, end);
#endif
    expand_units<Singles>(t, begin, end);
}

}  // namespace agora::AGORA_TARGET
