// expand and project without tensor cores: fp32 h, mixed types that terms do not fit, k above 64, odd d,
// memory that is not aligned.
//
// One block computes kTile x kTile outputs with 16 x 16 threads, each 4 x 4 of them. A thread's four columns
// are one group of the generator, so that expand calls Philox once for four outputs.
#include "../functors/normal.h"
#include "boundary.h"
#include "device.cuh"

namespace agora::cuda {
namespace {

constexpr int kSide = 16;  // threads a side
constexpr int kEach = 4;   // outputs a thread and side
constexpr int kTile = kSide * kEach;
constexpr int kDepth = 16;  // of the shared tiles
constexpr int kThreads = kSide * kSide;
static_assert(kEach == 4, "a thread's columns are one group of the generator");

__device__ __forceinline__ float load_any(const void* numbers, int dtype, int64_t at) {
    if (dtype == kFloat32) return static_cast<const float*>(numbers)[at];
    if (dtype == kBfloat16) return load(static_cast<const Bf16*>(numbers)[at]);
    return load(static_cast<const Fp16*>(numbers)[at]);
}

__device__ __forceinline__ void store_any(void* numbers, int dtype, int64_t at, float value) {
    if (dtype == kFloat32)
        static_cast<float*>(numbers)[at] = value;
    else if (dtype == kBfloat16)
        store(static_cast<Bf16*>(numbers) + at, value);
    else
        store(static_cast<Fp16*>(numbers) + at, value);
}

// sums[i][j] = sum over p in [begin, end) of left(row, p) * right(p, column), a thread's part of the tile.
// Summed in runs of kDepth, then over the runs: a chain over all of d would lose precision.
template <bool kRightByColumn, typename LeftAt, typename RightAt>
__device__ __forceinline__ void product(float (&sums)[kEach][kEach], int64_t begin, int64_t end, LeftAt left,
                                        RightAt right) {
    __shared__ float a[kDepth][kTile + 1];
    __shared__ float b[kDepth][kTile + 1];
    int tx = int(threadIdx.x) % kSide, ty = int(threadIdx.x) / kSide;
    for (int64_t depth = begin; depth < end; depth += kDepth) {
        for (int i = int(threadIdx.x); i < kTile * kDepth; i += kThreads) {
            int q = i % kDepth, r = i / kDepth;
            a[q][r] = depth + q < end ? left(r, depth + q) : 0.0f;
        }
        for (int i = int(threadIdx.x); i < kTile * kDepth; i += kThreads) {
            int q = kRightByColumn ? i % kDepth : i / kTile, c = kRightByColumn ? i / kDepth : i % kTile;
            b[q][c] = depth + q < end ? right(depth + q, c) : 0.0f;
        }
        __syncthreads();
        float run[kEach][kEach] = {};
#pragma unroll
        for (int q = 0; q < kDepth; q++)
#pragma unroll
            for (int i = 0; i < kEach; i++)
#pragma unroll
                for (int j = 0; j < kEach; j++)
                    run[i][j] = fmaf(a[q][ty * kEach + i], b[q][tx * kEach + j], run[i][j]);
#pragma unroll
        for (int i = 0; i < kEach; i++)
#pragma unroll
            for (int j = 0; j < kEach; j++) sums[i][j] += run[i][j];
        __syncthreads();
    }
}

__global__ void __launch_bounds__(kThreads) expand_plain_kernel(Expand t) {
    int64_t row0 = int64_t(blockIdx.x) * kTile, column0 = int64_t(blockIdx.y) * kTile;
    float sums[kEach][kEach] = {};
    product<true>(
        sums, 0, t.k,
        [&](int r, int64_t p) {
            return row0 + r < t.rows ? load_any(t.c, t.c_dtype, (row0 + r) * t.k + p) : 0.0f;
        },
        [&](int64_t p, int c) {
            return column0 + c < t.d ? load_any(t.basis, t.basis_dtype, (column0 + c) * t.k + p) : 0.0f;
        });
    int64_t column = column0 + int(threadIdx.x) % kSide * kEach;
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        int64_t row = row0 + int(threadIdx.x) / kSide * kEach + i;
        if (row >= t.rows || column >= t.d) continue;
        Normal4 plus = {};
        if (t.table == nullptr)
            plus = normal4(t.seed, kTokenTableStream, uint32_t(t.ids[row]), uint32_t(column / 4), t.factor);
#pragma unroll
        for (int j = 0; j < kEach; j++) {
            if (column + j >= t.d) continue;
            int64_t at = row * t.d + column + j;
            float add = t.table != nullptr ? load_any(t.table, t.h_dtype, at) : plus.v[j];
            store_any(t.h, t.h_dtype, at, add_rounded(sums[i][j], add));
        }
    }
}

__global__ void __launch_bounds__(kThreads) project_plain_kernel(Project t, Partial partial) {
    int64_t row0 = int64_t(blockIdx.x) * kTile, column0 = int64_t(blockIdx.y) * kTile;
    int64_t length = partial.chunks_each * kTile, begin = int64_t(blockIdx.z) * length;
    int64_t end = begin + length < t.d ? begin + length : t.d;
    float sums[kEach][kEach] = {};
    product<false>(
        sums, begin, end,
        [&](int r, int64_t p) {
            if (row0 + r >= t.rows) return 0.0f;
            int64_t at = (row0 + r) * t.d + p;
            float value = load_any(t.h, t.h_dtype, at);
            return t.table != nullptr ? value - load_any(t.table, t.h_dtype, at) : value;
        },
        [&](int64_t p, int c) {
            return column0 + c < t.k ? load_any(t.basis, t.basis_dtype, p * t.k + column0 + c) : 0.0f;
        });
#pragma unroll
    for (int i = 0; i < kEach; i++) {
        int64_t row = row0 + int(threadIdx.x) / kSide * kEach + i;
        int64_t column = column0 + int(threadIdx.x) % kSide * kEach;
#pragma unroll
        for (int j = 0; j < kEach; j++)
            t.scratch[(int64_t(blockIdx.z) * partial.rows + row) * partial.columns + column + j] = sums[i][j];
    }
}

}  // namespace

int expand_plain(const Expand& t, void* stream) {
    dim3 grid(blocks_for(t.rows, kTile), blocks_for(t.d, kTile));
    return launch(expand_plain_kernel, grid, kThreads, 0, stream, t);
}

int project_plain(const Project& t, void* stream) {
    Partial partial = partial_of(t.rows, t.d, t.k);  // its rows and columns are whole tiles of this kernel
    dim3 grid(blocks_for(t.rows, kTile), unsigned(partial.columns / kTile), unsigned(partial.spans));
    return launch(project_plain_kernel, grid, kThreads, 0, stream, t, partial);
}

}  // namespace agora::cuda
