// expand: h = c U^T + table on tensor cores, the table given or made on the way.
//
// A block owns 128 rows (64 where U or c has more than one term) and a span of d. c stays in registers as
// fragments; 64 columns of the table and 64 rows of U a step come through shared memory. A warp's sums pass
// through its own corner of shared memory, so that the table is added and h written in 16-byte vectors.
#include "../functors/normal.h"
#include "boundary.h"
#include "tiles.cuh"

namespace agora::cuda {
namespace {

constexpr int kSpanChunks = 10;  // of 64 columns
constexpr int kHalf = 32;        // columns of one pass through the corner
constexpr int kCorner = 36;      // floats of a line of it

template <bool kTable, int kLeft, int kRight>
struct Shape {
    static constexpr int kTerms = kLeft > kRight ? kLeft : kRight;
    static constexpr int kWarps = kTerms == 1 ? 8 : 4;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kRows = kFragment * kWarps;
    static constexpr int kStages = kTerms == 1 ? 3 : 2;
    static constexpr int kSlabNumbers = kTable ? kRows * kLine : 0;
    static constexpr int kStageNumbers = kSlabNumbers + kRight * kSide * kLine;
    static constexpr int kCornerBytes = kFragment * kCorner * 4;
    static constexpr int kLeftBytes = kLeft * kRows * kLine * 2;  // c, before the corners are in use
    static constexpr int kShared = kStages * kStageNumbers * 2 + kLeftBytes;
    static_assert(kLeftBytes >= kWarps * kCornerBytes, "the corners fit where c was");
    static_assert(kShared <= 99 * 1024, "what a block may have on every architecture");
};

template <typename T, typename C, bool kTable, int kLeft, int kRight>
__global__ void __launch_bounds__(Shape<kTable, kLeft, kRight>::kThreads)
    expand_kernel(const C* c, const T* prepared, const int64_t* ids, const T* table, T* h, int64_t rows,
                  int64_t d, int64_t k, int64_t term, uint64_t seed, float factor) {
    using S = Shape<kTable, kLeft, kRight>;
    T* shared = reinterpret_cast<T*>(dynamic_shared());
    T* left = shared + S::kStages * S::kStageNumbers;
    const int64_t row0 = int64_t(blockIdx.x) * S::kRows;
    const int64_t all = (d + kSide - 1) / kSide, first = int64_t(blockIdx.y) * kSpanChunks;
    const int chunks = int(all - first < kSpanChunks ? all - first : kSpanChunks);
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;

    auto fetch = [&](int chunk) {
        if (chunk < chunks) {
            T* to = shared + chunk % S::kStages * S::kStageNumbers;
            int64_t column = (first + chunk) * kSide;
            if (kTable) copy_slab<S::kRows, S::kThreads>(to, table, row0, rows, column, d);
            copy_basis<kRight, S::kThreads>(to + S::kSlabNumbers, prepared, column, term);
        }
        commit_copies();  // an empty group too: the count of groups is that of chunks
    };

    for (int chunk = 0; chunk < S::kStages - 1; chunk++) fetch(chunk);
    for (int i = int(threadIdx.x); i < S::kRows * kSide; i += S::kThreads) {
        int64_t r = i / kSide, j = i % kSide;
        float rest = row0 + r < rows && j < k ? load(c[(row0 + r) * k + j]) : 0.0f;
#pragma unroll
        for (int t = 0; t < kLeft; t++) {
            T* number = left + (t * S::kRows + r) * kLine + j;
            store(number, rest);
            rest -= load(*number);
        }
    }
    __syncthreads();
    Left<T> a[kLeft][kPieces];
#pragma unroll
    for (int t = 0; t < kLeft; t++)
#pragma unroll
        for (int p = 0; p < kPieces; p++)
            wmma::load_matrix_sync(
                a[t][p], native(left + (t * S::kRows + warp * kFragment) * kLine + p * kFragment), kLine);
    __syncthreads();
    float* corner = reinterpret_cast<float*>(left) + warp * kFragment * kCorner;

    for (int chunk = 0; chunk < chunks; chunk++) {
        wait_copies<S::kStages - 2>();
        __syncthreads();  // this chunk is there for all, and nobody reads the one before any more
        fetch(chunk + S::kStages - 1);
        const T* slab = shared + chunk % S::kStages * S::kStageNumbers;
        const T* basis = slab + S::kSlabNumbers;
#pragma unroll
        for (int half = 0; half < kSide; half += kHalf) {
            Sums sums[kHalf / kFragment];
#pragma unroll
            for (int n = 0; n < kHalf / kFragment; n++) wmma::fill_fragment(sums[n], 0.0f);
#pragma unroll
            for (int p = 0; p < kPieces; p++) {
#pragma unroll
                for (int n = 0; n < kHalf / kFragment; n++) {
#pragma unroll
                    for (int t = 0; t < kRight; t++) {
                        Right<T, wmma::col_major> right;
                        wmma::load_matrix_sync(
                            right, native(basis + (t * kSide + half + n * kFragment) * kLine + p * kFragment),
                            kLine);
#pragma unroll
                        for (int s = 0; s < kLeft; s++)
                            if (s + t < S::kTerms) wmma::mma_sync(sums[n], a[s][p], right, sums[n]);
                    }
                }
            }
            __syncwarp();  // everyone has read what the corner held
#pragma unroll
            for (int n = 0; n < kHalf / kFragment; n++)
                wmma::store_matrix_sync(corner + n * kFragment, sums[n], kCorner, wmma::mem_row_major);
            __syncwarp();
            for (int i = lane; i < kFragment * (kHalf / kVector); i += 32) {
                int r = i / (kHalf / kVector), v = i % (kHalf / kVector) * kVector;
                int64_t row = row0 + warp * kFragment + r, column = (first + chunk) * kSide + half + v;
                if (row >= rows || column >= d) continue;
                float plus[kVector];
                if (kTable) {
                    Vector<T> x =
                        *reinterpret_cast<const Vector<T>*>(slab + (warp * kFragment + r) * kLine + half + v);
#pragma unroll
                    for (int j = 0; j < kVector; j++) plus[j] = load(x.at[j]);
                } else {
#pragma unroll
                    for (int g = 0; g < 2; g++) {
                        Normal4 x = normal4(seed, kTokenTableStream, uint32_t(ids[row]),
                                            uint32_t(column / 4) + uint32_t(g), factor);
#pragma unroll
                        for (int j = 0; j < 4; j++) plus[g * 4 + j] = x.v[j];
                    }
                }
                Vector<T> y;
#pragma unroll
                for (int j = 0; j < kVector; j++)
                    store(&y.at[j], add_rounded(corner[r * kCorner + v + j], plus[j]));
                *reinterpret_cast<Vector<T>*>(h + row * d + column) = y;
            }
        }
    }
}

template <typename T, typename C, bool kTable, int kLeft, int kRight>
int run(const Expand& t, void* stream) {
    using S = Shape<kTable, kLeft, kRight>;
    int64_t chunks = (t.d + kSide - 1) / kSide;
    dim3 grid(blocks_for(t.rows, S::kRows), blocks_for(chunks, kSpanChunks));
    return launch(expand_kernel<T, C, kTable, kLeft, kRight>, grid, S::kThreads, S::kShared, stream,
                  static_cast<const C*>(t.c), static_cast<const T*>(t.prepared), t.ids,
                  static_cast<const T*>(t.table), static_cast<T*>(t.h), t.rows, t.d, t.k,
                  chunks * kSide * kSide, t.seed, t.factor);
}

template <typename T, typename C, int kLeft, int kRight>
int run_either(const Expand& t, void* stream) {
    return t.table != nullptr ? run<T, C, true, kLeft, kRight>(t, stream)
                              : run<T, C, false, kLeft, kRight>(t, stream);
}

template <typename C, int kLeft>
int run_bf16(const Expand& t, void* stream) {
    return t.basis_dtype == kBfloat16 ? run_either<Bf16, C, kLeft, 1>(t, stream)
                                      : run_either<Bf16, C, kLeft, 2>(t, stream);
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace

// Two terms of c and two of U keep 16 bits of each, against the 8 of a bf16 h.
int expand(const Expand& t, void* stream) {
    bool same = t.c_dtype == t.h_dtype && t.basis_dtype == t.h_dtype;
    if (t.prepared == nullptr || !aligned(t.h) || !aligned(t.table) || (t.h_dtype == kFloat16 && !same))
        return expand_plain(t, stream);
    if (t.h_dtype == kFloat16) return run_either<Fp16, Fp16, 1, 1>(t, stream);
    if (t.c_dtype == kFloat32) return run_bf16<float, 2>(t, stream);
    if (t.c_dtype == kFloat16) return run_bf16<Fp16, 2>(t, stream);
    return run_bf16<Bf16, 1>(t, stream);
}

}  // namespace agora::cuda
