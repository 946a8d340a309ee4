// expand (c -> h) and project (dh -> dc). Included once per instruction set by kernels_inl.h.
//
// Both are products with a tall, thin U: k is 16 to 64 where d is in the thousands. Four rows at a time
// share every loaded vector of U; each output element has its own chain of additions in a fixed order, so
// that a row's result depends on nothing but that row, however many rows or threads there are.
// Each ends in the pass that writes its output: F is made in a tile of L1 and never stored.

namespace agora::AGORA_TARGET {

constexpr int kVectors = 2;               // of the register tile's columns: 4 x 2 sums in flight
constexpr int kTile = kVectors * kWidth;  // divides kPad and kSpan
constexpr int64_t kSpan = 256;            // floats a row that stay in L1 between the two passes
constexpr int kRows = int(kRowGroup);

template <typename From>
static void load_row(float* to, const From* from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = load(from[i]);
}

// sums[r][j] += over i < n of left[r][i] * right[i][j]; kRows rows of `left`, kTile columns of `right`.
// Summed in runs of kRun products and then over the runs: one long chain would lose two to four times the
// precision of a library's product.
constexpr int64_t kRun = 64;

AGORA_FN void tile_product(float sums[kRows][kTile], const float* left, int64_t left_stride,
                           const float* right, int64_t right_stride, int64_t n) {
    for (int64_t run = 0; run < n; run += kRun) {
        int64_t end = run + kRun < n ? run + kRun : n;
        Floats acc[kRows][kVectors] = {};
        for (int64_t i = run; i < end; i++) {
            Floats row[kVectors];
            for (int v = 0; v < kVectors; v++) row[v] = load_floats(right + i * right_stride + v * kWidth);
            for (int r = 0; r < kRows; r++)
                for (int v = 0; v < kVectors; v++)
                    acc[r][v] = multiply_add(left[r * left_stride + i], row[v], acc[r][v]);
        }
        for (int r = 0; r < kRows; r++) {
            for (int v = 0; v < kVectors; v++) {
                float* to = sums[r] + v * kWidth;
                store_floats(to, load_floats(to) + acc[r][v]);
            }
        }
    }
}

constexpr int64_t kMaxK = 1024;  // checked by the caller: bounds the stack

template <typename C, typename H>
static void expand_groups(const ExpandTask& t, int64_t begin, int64_t end) {
    float c[kRows * kMaxK], table[kSpan], product[kRows][kSpan];
    for (int64_t group = begin; group < end; group++) {
        int64_t first = group * kRows;
        int count = int(t.rows - first < kRows ? t.rows - first : kRows);
        for (int r = 0; r < kRows; r++)
            load_row(c + r * t.k, static_cast<const C*>(t.c) + (first + (r < count ? r : 0)) * t.k, t.k);
        for (int64_t column = 0; column < t.d; column += kSpan) {
            int64_t width = t.d - column < kSpan ? t.d - column : kSpan;
            for (int64_t j = 0; j < width; j += kTile) {
                float sums[kRows][kTile] = {};
                tile_product(sums, c, t.k, t.basis + column + j, t.stride, t.k);
                for (int r = 0; r < kRows; r++) memcpy(&product[r][j], sums[r], sizeof sums[r]);
            }
            for (int r = 0; r < count; r++) {
                normal_row(table, t.seed, kTokenTableStream, uint32_t(t.ids[first + r]), uint32_t(column / 4),
                           width, t.factor);
                H* h = static_cast<H*>(t.h) + (first + r) * t.d + column;
                for (int64_t j = 0; j < width; j++) store(&h[j], add_rounded(product[r][j], table[j]));
            }
        }
    }
}

template <typename D, typename O>
static void project_groups(const ProjectTask& t, int64_t begin, int64_t end) {
    float left[kRows][kSpan];
    float sums[kMaxK / kTile][kRows][kTile];
    int64_t tiles = (t.k + kTile - 1) / kTile;
    for (int64_t group = begin; group < end; group++) {
        int64_t first = group * kRows;
        int count = int(t.rows - first < kRows ? t.rows - first : kRows);
        memset(sums, 0, size_t(tiles) * sizeof sums[0]);
        for (int64_t column = 0; column < t.d; column += kSpan) {
            int64_t width = t.d - column < kSpan ? t.d - column : kSpan;
            for (int r = 0; r < kRows; r++)
                load_row(left[r], static_cast<const D*>(t.dh) + (first + (r < count ? r : 0)) * t.d + column,
                         width);
            for (int64_t tile = 0; tile < tiles; tile++)
                tile_product(sums[tile], left[0], kSpan, t.basis + column * t.stride + tile * kTile, t.stride,
                             width);
        }
        for (int r = 0; r < count; r++)
            for (int64_t j = 0; j < t.k; j++)
                store(static_cast<O*>(t.out) + (first + r) * t.k + j, sums[j / kTile][r][j % kTile]);
    }
}

static void expand(const ExpandTask& t, int64_t begin, int64_t end) {
    if (t.c_dtype == kFloat32)
        (t.h_dtype == kFloat32 ? expand_groups<float, float> : expand_groups<float, Bf16>)(t, begin, end);
    else
        (t.h_dtype == kFloat32 ? expand_groups<Bf16, float> : expand_groups<Bf16, Bf16>)(t, begin, end);
}

static void project(const ProjectTask& t, int64_t begin, int64_t end) {
    if (t.dh_dtype == kFloat32)
        (t.out_dtype == kFloat32 ? project_groups<float, float> : project_groups<float, Bf16>)(t, begin, end);
    else
        (t.out_dtype == kFloat32 ? project_groups<Bf16, float> : project_groups<Bf16, Bf16>)(t, begin, end);
}

}  // namespace agora::AGORA_TARGET
