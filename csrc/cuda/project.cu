// project: (h - table) U on tensor cores, and the pass that writes its result in any form.
//
// h is read once. A block owns 128 rows (64 where U has more than one term) and one span of d, whose 64
// columns a step pass through shared memory with the rows of U they meet: splitting d keeps every
// multiprocessor busy while U, which comes from L2, is read only once for so many rows. The sums of a span
// go to the scratch; a second, small kernel adds the spans in order and rounds, or makes the int8 form. The
// spans depend on d alone, so a row's bits do not depend on how many rows there are.
#include "boundary.h"
#include "tiles.cuh"

namespace agora::cuda {
namespace {

constexpr int64_t kSpanChunks = 20;  // of 64 columns
constexpr int64_t kMaxSpans = 8;
constexpr int64_t kRowTile = 128;  // the scratch's rows are padded to

template <bool kMinus, int kTerms>
struct Shape {
    static constexpr int kWarps = kTerms == 1 ? 8 : 4;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kRows = kFragment * kWarps;
    static constexpr int kSlabs = kMinus ? 2 : 1;
    static constexpr int kStages = kTerms == 1 && !kMinus ? 3 : 2;
    static constexpr int kSlabNumbers = kRows * kLine;
    static constexpr int kStageNumbers = kSlabs * kSlabNumbers + kTerms * kSide * kLine;
    static constexpr int kShared = kStages * kStageNumbers * 2;
    static constexpr int kKept = kSlabs > kTerms ? kSlabs : kTerms;
    static_assert(kShared <= 99 * 1024, "what a block may have on every architecture");
};

template <typename T, bool kMinus, int kTerms>
__global__ void __launch_bounds__(Shape<kMinus, kTerms>::kThreads)
    project_kernel(const T* h, const T* table, const T* prepared, float* scratch, int64_t rows, int64_t d,
                   int64_t term, Partial partial) {
    using S = Shape<kMinus, kTerms>;
    T* shared = reinterpret_cast<T*>(dynamic_shared());
    const int64_t row0 = int64_t(blockIdx.x) * S::kRows;
    const int64_t all = (d + kSide - 1) / kSide, first = int64_t(blockIdx.y) * partial.chunks_each;
    const int chunks = int(all - first < partial.chunks_each ? all - first : partial.chunks_each);
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;

    auto fetch = [&](int chunk) {
        if (chunk < chunks) {
            T* to = shared + chunk % S::kStages * S::kStageNumbers;
            int64_t column = (first + chunk) * kSide;
            copy_slab<S::kRows, S::kThreads>(to, h, row0, rows, column, d);
            if (kMinus) copy_slab<S::kRows, S::kThreads>(to + S::kSlabNumbers, table, row0, rows, column, d);
            copy_basis<kTerms, S::kThreads>(to + S::kSlabs * S::kSlabNumbers, prepared, column, term);
        }
        commit_copies();  // an empty group too: the count of groups is that of chunks
    };

    Sums sums[kPieces];
    for (int n = 0; n < kPieces; n++) wmma::fill_fragment(sums[n], 0.0f);
    for (int chunk = 0; chunk < S::kStages - 1; chunk++) fetch(chunk);
    for (int chunk = 0; chunk < chunks; chunk++) {
        wait_copies<S::kStages - 2>();
        __syncthreads();  // this chunk is there for all, and nobody reads the one before any more
        fetch(chunk + S::kStages - 1);
        T* slab = shared + chunk % S::kStages * S::kStageNumbers + warp * kFragment * kLine;
        const T* basis = shared + chunk % S::kStages * S::kStageNumbers + S::kSlabs * S::kSlabNumbers;
        if (kMinus) {  // the two slabs become the two terms of their difference
            for (int i = lane; i < kFragment * (kSide / kVector); i += 32) {
                int at = i / (kSide / kVector) * kLine + i % (kSide / kVector) * kVector;
                Vector<T>* high = reinterpret_cast<Vector<T>*>(slab + at);
                Vector<T>* low = reinterpret_cast<Vector<T>*>(slab + S::kSlabNumbers + at);
                Vector<T> x = *high, y = *low;
#pragma unroll
                for (int j = 0; j < kVector; j++) split(load(x.at[j]) - load(y.at[j]), &x.at[j], &y.at[j]);
                *high = x;
                *low = y;
            }
            __syncwarp();
        }
#pragma unroll
        for (int p = 0; p < kPieces; p++) {
            Left<T> left[S::kSlabs];
#pragma unroll
            for (int s = 0; s < S::kSlabs; s++)
                wmma::load_matrix_sync(left[s], native(slab + s * S::kSlabNumbers + p * kFragment), kLine);
#pragma unroll
            for (int n = 0; n < kPieces; n++) {
#pragma unroll
                for (int t = 0; t < kTerms; t++) {
                    Right<T, wmma::row_major> right;
                    wmma::load_matrix_sync(
                        right, native(basis + (t * kSide + p * kFragment) * kLine + n * kFragment), kLine);
#pragma unroll
                    for (int s = 0; s < S::kSlabs; s++)
                        if (s + t < S::kKept) wmma::mma_sync(sums[n], left[s], right, sums[n]);
                }
            }
        }
    }
    float* to = scratch + (int64_t(blockIdx.y) * partial.rows + row0 + warp * kFragment) * partial.columns;
    for (int n = 0; n < kPieces; n++)
        wmma::store_matrix_sync(to + n * kFragment, sums[n], unsigned(partial.columns), wmma::mem_row_major);
}

template <typename T, bool kMinus, int kTerms>
int run(const Project& t, const Partial& partial, void* stream) {
    using S = Shape<kMinus, kTerms>;
    static_assert(kRowTile % S::kRows == 0, "blocks write whole tiles of the scratch");
    int64_t term = (t.d + kSide - 1) / kSide * kSide * kSide;
    dim3 grid(blocks_for(t.rows, S::kRows), unsigned(partial.spans));
    return launch(project_kernel<T, kMinus, kTerms>, grid, S::kThreads, S::kShared, stream,
                  static_cast<const T*>(t.h), static_cast<const T*>(t.table),
                  static_cast<const T*>(t.prepared), t.scratch, t.rows, t.d, term, partial);
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace

Partial partial_of(int64_t rows, int64_t d, int64_t k) {
    int64_t chunks = (d + kSide - 1) / kSide, spans = (chunks + kSpanChunks - 1) / kSpanChunks;
    if (spans > kMaxSpans) spans = kMaxSpans;
    int64_t each = (chunks + spans - 1) / spans;
    return Partial{(chunks + each - 1) / each, each, (rows + kRowTile - 1) / kRowTile * kRowTile,
                   (k + kSide - 1) / kSide * kSide};
}

int64_t scratch_numbers(int64_t rows, int64_t d, int64_t k) {
    Partial partial = partial_of(rows, d, k);
    return partial.spans * partial.rows * partial.columns;
}

int project_sums(const Project& t, void* stream) {
    if (t.prepared == nullptr || !aligned(t.h) || !aligned(t.table)) return project_plain(t, stream);
    Partial partial = partial_of(t.rows, t.d, t.k);
    bool minus = t.table != nullptr, same = t.h_dtype == t.basis_dtype;
    if (t.h_dtype == kFloat16)
        return minus ? run<Fp16, true, 1>(t, partial, stream) : run<Fp16, false, 1>(t, partial, stream);
    if (same) return minus ? run<Bf16, true, 1>(t, partial, stream) : run<Bf16, false, 1>(t, partial, stream);
    return minus ? run<Bf16, true, 3>(t, partial, stream) : run<Bf16, false, 3>(t, partial, stream);
}

}  // namespace agora::cuda
