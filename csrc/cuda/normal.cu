// The generator: one thread makes the values of one 16-byte vector, or one group of four.
#include "../functors/normal.h"
#include "boundary.h"
#include "device.cuh"
#include "launch.h"

namespace agora::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct __align__(16) Values {
    static constexpr int kGroups = 16 / sizeof(T) / 4;
    T at[4 * kGroups];
};

template <typename T>
__device__ __forceinline__ void put(T* out, const Values<T>& values, int64_t left, bool whole) {
    constexpr int kCount = 4 * Values<T>::kGroups;
    if (whole && left >= kCount) {
        *reinterpret_cast<Values<T>*>(out) = values;
        return;
    }
#pragma unroll
    for (int i = 0; i < kCount; i++)
        if (i < left) out[i] = values.at[i];
}

template <typename T>
__device__ __forceinline__ Values<T> values_at(uint64_t seed, uint64_t stream, uint32_t row, uint32_t group,
                                               float factor) {
    Values<T> values;
#pragma unroll
    for (int g = 0; g < Values<T>::kGroups; g++) {
        Normal4 x = normal4(seed, stream, row, group + uint32_t(g), factor);
#pragma unroll
        for (int i = 0; i < 4; i++) store(&values.at[g * 4 + i], x.v[i]);
    }
    return values;
}

// `whole`: vectors may be written as such.
__global__ void __launch_bounds__(kThreads)
    fill_kernel(float* out, int64_t n, uint64_t seed, uint64_t stream, float factor, bool whole) {
    int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (group * 4 >= n) return;
    put(out + group * 4, values_at<float>(seed, stream, uint32_t(group >> 32), uint32_t(group), factor),
        n - group * 4, whole);
}

// Grid: x over vectors of a row, y strides over rows.
template <typename T>
__global__ void __launch_bounds__(kThreads) rows_kernel(T* out, const int64_t* ids, int64_t count, int64_t d,
                                                        uint64_t seed, float factor, bool whole) {
    int64_t group = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * Values<T>::kGroups;
    if (group * 4 >= d) return;
    for (int64_t row = blockIdx.y; row < count; row += gridDim.y)
        put(out + row * d + group * 4,
            values_at<T>(seed, kTokenTableStream, uint32_t(ids[row]), uint32_t(group), factor), d - group * 4,
            whole);
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

template <typename T>
int rows_of(void* out, const int64_t* ids, int64_t count, int64_t d, uint64_t seed, float factor,
            void* stream) {
    bool whole = aligned(out) && d * int64_t(sizeof(T)) % 16 == 0;
    dim3 grid(blocks_for(d, kThreads * 4 * Values<T>::kGroups), unsigned(count < 65535 ? count : 65535));
    return launch(rows_kernel<T>, grid, kThreads, 0, stream, static_cast<T*>(out), ids, count, d, seed,
                  factor, whole);
}

}  // namespace

int fill(float* out, int64_t n, uint64_t seed, uint64_t stream_number, float factor, void* stream) {
    return launch(fill_kernel, dim3(blocks_for(n, 4 * kThreads)), kThreads, 0, stream, out, n, seed,
                  stream_number, factor, aligned(out));
}

int rows(void* out, int out_dtype, const int64_t* ids, int64_t count, int64_t d, uint64_t seed, float factor,
         void* stream) {
    if (out_dtype == kFloat32) return rows_of<float>(out, ids, count, d, seed, factor, stream);
    if (out_dtype == kBfloat16) return rows_of<Bf16>(out, ids, count, d, seed, factor, stream);
    return rows_of<Fp16>(out, ids, count, d, seed, factor, stream);
}

const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace agora::cuda
