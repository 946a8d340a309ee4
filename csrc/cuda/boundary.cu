// expand and project: thin products, tiled through shared memory, with F made in expand's last pass.
//
// One block computes kTile x kTile outputs with 16 x 16 threads, each 4 x 4 of them. A thread's four columns
// are one group of the generator, so that expand calls Philox once for four outputs.
#include "../functors/normal.h"
#include "boundary.h"

namespace agora::cuda {
namespace {

constexpr int kSide = 16;  // threads a side
constexpr int kEach = 4;   // outputs a thread and side
constexpr int kTile = kSide * kEach;
constexpr int kDepth = 16;  // of the shared tiles

// out[m][n] = sum over p of left[m][p] * right(p, n), fp32. right(p, n) is basis[n][p] when kTransposed
// (expand: U is d x k and n runs over d), else basis[p][n] (project).
template <typename Left, typename Basis, typename Out, bool kTransposed>
__global__ void __launch_bounds__(kSide* kSide)
    product_kernel(const Left* left, const Basis* basis, const int64_t* ids, Out* out, int64_t m, int64_t n,
                   int64_t p, uint64_t seed, float factor) {
    __shared__ float a[kDepth][kTile + 1];
    __shared__ float b[kDepth][kTile + 1];
    int64_t row0 = int64_t(blockIdx.x) * kTile, column0 = int64_t(blockIdx.y) * kTile;
    int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
    float sums[kEach][kEach] = {};
    for (int64_t depth = 0; depth < p; depth += kDepth) {
        for (int i = threadIdx.x; i < kTile * kDepth; i += kSide * kSide) {
            int q = i % kDepth, r = i / kDepth;
            bool inside = row0 + r < m && depth + q < p;
            a[q][r] = inside ? load(left[(row0 + r) * p + depth + q]) : 0.0f;
        }
        for (int i = threadIdx.x; i < kTile * kDepth; i += kSide * kSide) {
            int q = kTransposed ? i % kDepth : i / kTile, c = kTransposed ? i / kDepth : i % kTile;
            bool inside = column0 + c < n && depth + q < p;
            int64_t at = kTransposed ? (column0 + c) * p + depth + q : (depth + q) * n + column0 + c;
            b[q][c] = inside ? load(basis[at]) : 0.0f;
        }
        __syncthreads();
        // Summed in runs of kDepth, then over the runs: a chain over all of d would lose precision.
        float run[kEach][kEach] = {};
#pragma unroll
        for (int q = 0; q < kDepth; q++)
            for (int i = 0; i < kEach; i++)
                for (int j = 0; j < kEach; j++)
                    run[i][j] = fmaf(a[q][ty * kEach + i], b[q][tx * kEach + j], run[i][j]);
        for (int i = 0; i < kEach; i++)
            for (int j = 0; j < kEach; j++) sums[i][j] += run[i][j];
        __syncthreads();
    }
    int64_t column = column0 + tx * kEach;
    for (int i = 0; i < kEach; i++) {
        int64_t row = row0 + ty * kEach + i;
        if (row >= m || column >= n) continue;
        Normal4 table = {};
        if (kTransposed)
            table = normal4(seed, kTokenTableStream, uint32_t(ids[row]), uint32_t(column / 4), factor);
        for (int j = 0; j < kEach && column + j < n; j++)
            store(&out[row * n + column + j], kTransposed ? add_rounded(sums[i][j], table.v[j]) : sums[i][j]);
    }
}

static_assert(kEach == 4, "a thread's columns are one group of the generator");

template <typename Left, typename Basis, typename Out, bool kTransposed>
int launch(const void* left, const void* basis, const int64_t* ids, void* out, int64_t m, int64_t n,
           int64_t p, uint64_t seed, float factor, void* stream) {
    dim3 grid(unsigned((m + kTile - 1) / kTile), unsigned((n + kTile - 1) / kTile));
    product_kernel<Left, Basis, Out, kTransposed><<<grid, kSide * kSide, 0, cudaStream_t(stream)>>>(
        static_cast<const Left*>(left), static_cast<const Basis*>(basis), ids, static_cast<Out*>(out), m, n,
        p, seed, factor);
    return int(cudaGetLastError());
}

// One instance for each combination of dtypes.
template <bool kTransposed>
int choose(const void* left, int left_dtype, const void* basis, int basis_dtype, const int64_t* ids,
           void* out, int out_dtype, int64_t m, int64_t n, int64_t p, uint64_t seed, float factor,
           void* stream) {
    using Launch = int (*)(const void*, const void*, const int64_t*, void*, int64_t, int64_t, int64_t,
                           uint64_t, float, void*);
    static const Launch table[2][2][2] = {
        {{launch<float, float, float, kTransposed>, launch<float, float, Bf16, kTransposed>},
         {launch<float, Bf16, float, kTransposed>, launch<float, Bf16, Bf16, kTransposed>}},
        {{launch<Bf16, float, float, kTransposed>, launch<Bf16, float, Bf16, kTransposed>},
         {launch<Bf16, Bf16, float, kTransposed>, launch<Bf16, Bf16, Bf16, kTransposed>}}};
    return table[left_dtype][basis_dtype][out_dtype](left, basis, ids, out, m, n, p, seed, factor, stream);
}

}  // namespace

int expand(const void* c, int c_dtype, const void* basis, int basis_dtype, const int64_t* ids, void* h,
           int h_dtype, int64_t rows, int64_t d, int64_t k, uint64_t seed, float factor, void* stream) {
    return choose<true>(c, c_dtype, basis, basis_dtype, ids, h, h_dtype, rows, d, k, seed, factor, stream);
}

int project(const void* dh, int dh_dtype, const void* basis, int basis_dtype, void* out, int out_dtype,
            int64_t rows, int64_t d, int64_t k, void* stream) {
    return choose<false>(dh, dh_dtype, basis, basis_dtype, nullptr, out, out_dtype, rows, k, d, 0, 0, stream);
}

}  // namespace agora::cuda
