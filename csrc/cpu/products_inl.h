// Products with a tall, thin U, of which the boundary's kernels consist: k is 16 to 64 where d is in the
// thousands. Included once per instruction set by kernels_inl.h.
//
// kRows rows at a time share every loaded vector of U; each output element has its own chain of additions in
// a fixed order, so that a row's result depends on nothing but that row, however many rows or threads there
// are.

namespace agora::AGORA_TARGET {

constexpr int kVectors = 3;               // of the register tile's columns: kRows x 3 sums in flight
constexpr int kTile = kVectors * kWidth;  // divides kPanel
#if defined(__AVX512F__)
constexpr int kRows = 8;  // of 32 registers: 24 sums, 3 of U, a factor
#else
constexpr int kRows = 4;  // of 16 registers: 12 sums, 3 of U, a factor
#endif
static_assert(kPanel % kTile == 0 && kRowGroup % kRows == 0, "layouts hold whole tiles");

// What the four bytes of a unit are. Both factors lie in units, whose bits pass for floats.
struct Singles {
    static constexpr int kNumbers = 1;  // of a unit
    // A factor in every lane.
    static __attribute__((always_inline)) inline Floats everywhere(const char* unit) {
        return *reinterpret_cast<const float*>(unit) - Floats{};
    }
    static __attribute__((always_inline)) inline Floats add(Floats factor, Floats vector, Floats sum) {
        return multiply_add(factor, vector, sum);
    }
};

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
struct Pairs {
    static constexpr int kNumbers = 2;
    static __attribute__((always_inline)) inline Floats everywhere(const char* unit) {
        int32_t bits;
        memcpy(&bits, unit, sizeof bits);
        return Floats(Ints{} + bits);
    }
    static __attribute__((always_inline)) inline Floats add(Floats factor, Floats vector, Floats sum) {
        return multiply_add_pairs(factor, vector, sum);
    }
};
#else
constexpr bool kPairs = false;
#endif

// Sums run over kRun products and then over the runs: one long chain would lose two to four times the
// precision of a library's product.
template <typename Unit>
constexpr int64_t kRun = 128 / Unit::kNumbers;

// acc[r][v] += over begin <= i < end of left[r * across + i * along] * right[i], N vectors of it. Every
// so often comes a bit of `aside`, so that memory has something to do meanwhile.
template <typename Unit, int N, typename Aside>
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
            Floats factor = Unit::everywhere(at);
            for (int v = 0; v < N; v++) acc[r][v] = Unit::add(factor, vectors[v], acc[r][v]);
        }
        low += along * int64_t(sizeof(float));
        high += along * int64_t(sizeof(float));
        if (i % Aside::kEvery == 0) aside.step();
    }
    aside_ = aside;
}

struct Nothing {
    static constexpr int kEvery = 1;
    __attribute__((always_inline)) inline void step() {}
};

// How the left factor lies: row after row, or transposed, column after column.
enum Left { kByRows, kByColumns };

// sums[r][j] += over i < n of left(r, i) * right[i][j]; kRows rows of `left`, N vectors of columns.
// Not inlined: the loop needs the registers of a function of its own.
template <typename Unit, int N, Left kLeft, typename Aside>
static __attribute__((noinline)) void tile_product(float* sums, int64_t sums_stride, const float* left,
                                                   int64_t left_stride, const float* right,
                                                   int64_t right_stride, int64_t n, Aside& aside) {
    const int64_t across = kLeft == kByRows ? left_stride : 1, along = kLeft == kByRows ? 1 : left_stride;
    for (int64_t run = 0; run < n; run += kRun<Unit>) {
        Floats acc[kRows][N] = {};
        accumulate<Unit, N>(acc, left, across, along, right, right_stride, run,
                            run + kRun<Unit> < n ? run + kRun<Unit> : n, aside);
        for (int r = 0; r < kRows; r++) {
            for (int v = 0; v < N; v++) {
                float* to = sums + r * sums_stride + v * kWidth;
                store_floats(to, load_floats(to) + acc[r][v]);
            }
        }
    }
}

// The same for any number of vectors.
template <typename Unit, Left kLeft, typename Aside>
AGORA_FN void product(float* sums, int64_t sums_stride, const float* left, int64_t left_stride,
                      const float* right, int64_t right_stride, int64_t n, int64_t vectors, Aside& aside) {
    Nothing nothing;
    int64_t v = 0;
    if (vectors >= kVectors) {
        tile_product<Unit, kVectors, kLeft>(sums, sums_stride, left, left_stride, right, right_stride, n,
                                            aside);
        v = kVectors;
    }
    for (; v + kVectors <= vectors; v += kVectors)
        tile_product<Unit, kVectors, kLeft>(sums + v * kWidth, sums_stride, left, left_stride,
                                            right + v * kWidth, right_stride, n, nothing);
    if (vectors - v == 2)
        tile_product<Unit, 2, kLeft>(sums + v * kWidth, sums_stride, left, left_stride, right + v * kWidth,
                                     right_stride, n, nothing);
    else if (vectors - v == 1)
        tile_product<Unit, 1, kLeft>(sums + v * kWidth, sums_stride, left, left_stride, right + v * kWidth,
                                     right_stride, n, nothing);
}

}  // namespace agora::AGORA_TARGET
