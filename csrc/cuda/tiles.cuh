// Tiles of expand and project on tensor cores: a slab of a [rows, d] matrix and 64 rows of U, in shared
// memory, kStages steps of them under way by asynchronous copies.
//
// U comes prepared (basis.cu): as 1 to 3 terms in the 16-bit type of the matrix whose sum is U, each padded
// with zeros to whole tiles of 64 x 64. Products of terms are exact in fp32, so the result has the precision
// of U, not that of the 16-bit type. Where the left side is split into terms as well, the products that are
// smaller than the last term kept are left out.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

#include "../functors/common.h"
#include "device.cuh"

namespace agora::cuda {

namespace wmma = nvcuda::wmma;

constexpr int kSide = 64;      // columns of a slab, and the largest k
constexpr int kLine = 72;      // numbers from line to line: 16 bytes more, so that lines meet other banks
constexpr int kVector = 8;     // 16-bit numbers in 16 bytes
constexpr int kFragment = 16;  // m, n and k of a tensor core's product
constexpr int kPieces = kSide / kFragment;
constexpr int kBasisBytes = kSide * kLine * 2;

template <typename T>
struct Native;
template <>
struct Native<Bf16> {
    using type = __nv_bfloat16;
};
template <>
struct Native<Fp16> {
    using type = __half;
};

template <typename T>
using Left = wmma::fragment<wmma::matrix_a, 16, 16, 16, typename Native<T>::type, wmma::row_major>;
template <typename T, typename Layout>
using Right = wmma::fragment<wmma::matrix_b, 16, 16, 16, typename Native<T>::type, Layout>;
using Sums = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

template <typename T>
__device__ __forceinline__ const typename Native<T>::type* native(const T* numbers) {
    return reinterpret_cast<const typename Native<T>::type*>(numbers);
}

// Lines [row0, row0 + kRows) and columns [column0, column0 + 64) of a [rows, d] matrix; d % 8 == 0.
template <int kRows, int kThreads, typename T>
__device__ __forceinline__ void copy_slab(T* to, const T* from, int64_t row0, int64_t rows, int64_t column0,
                                          int64_t d) {
    for (int i = int(threadIdx.x); i < kRows * (kSide / kVector); i += kThreads) {
        int r = i / (kSide / kVector), v = i % (kSide / kVector) * kVector;
        bool inside = row0 + r < rows && column0 + v < d;
        copy_async(to + r * kLine + v, inside ? from + (row0 + r) * d + column0 + v : from, inside);
    }
}

// Rows [row0, row0 + 64) of each term of the prepared U, whose terms lie `term` numbers apart.
template <int kTerms, int kThreads, typename T>
__device__ __forceinline__ void copy_basis(T* to, const T* prepared, int64_t row0, int64_t term) {
    for (int i = int(threadIdx.x); i < kTerms * kSide * (kSide / kVector); i += kThreads) {
        int line = i / (kSide / kVector), v = i % (kSide / kVector) * kVector;
        const T* from = prepared + (line / kSide) * term + (row0 + line % kSide) * kSide + v;
        copy_async(to + line * kLine + v, from, true);
    }
}

// value = high + low as far as the type goes.
template <typename T>
__device__ __forceinline__ void split(float value, T* high, T* low) {
    store(high, value);
    store(low, value - load(*high));
}

template <typename T>
struct __align__(16) Vector {
    T at[kVector];
};

}  // namespace agora::cuda
