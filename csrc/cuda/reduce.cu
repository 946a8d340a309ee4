// The weighted mean of parts: a look at a part, the sum if the look was good, the division.
//
// The sum reads the verdict on the device, so that both are queued at once and nobody waits in between.
#include "../functors/reduce.h"
#include "averaging.h"
#include "device.cuh"

namespace agora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;  // elements of one verdict, as on the CPU
constexpr int64_t kMostGrid = 132 * 32;

// Element i of a part.
template <typename Part>
__device__ __forceinline__ float value_of(const void* part, int64_t i) {
    return load(static_cast<const Part*>(part)[i]);
}

struct Codes {};  // int8 blocks: a scale in fp32, then 256 codes; a part begins at a multiple of 4 bytes

template <>
__device__ __forceinline__ float value_of<Codes>(const void* part, int64_t i) {
    const uint8_t* block = static_cast<const uint8_t*>(part) + i / kBlock * kInt8Block;
    uint32_t bits = block[0] | uint32_t(block[1]) << 8 | uint32_t(block[2]) << 16 | uint32_t(block[3]) << 24;
    return mul_rounded(bits_float(bits), float(int8_t(block[4 + i % kBlock])));
}

template <typename Part>
__global__ void __launch_bounds__(kThreads)
    inspect_kernel(const void* part, int64_t n, float weight, Verdict* verdicts) {
    __shared__ double norms[kThreads];
    __shared__ double bads[kThreads];
    int64_t start = int64_t(blockIdx.x) * kChunk, stop = start + kChunk < n ? start + kChunk : n;
    double norm2 = 0, bad = 0;
#pragma unroll 4
    for (int64_t i = start + threadIdx.x; i < stop; i += kThreads) {
        float x = value_of<Part>(part, i);
        if (unusable(x, weight)) bad = 1;
        norm2 += double(x) * double(x);
    }
    norms[threadIdx.x] = norm2;
    bads[threadIdx.x] = bad;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < unsigned(half)) {
            norms[threadIdx.x] += norms[threadIdx.x + half];
            bads[threadIdx.x] += bads[threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) verdicts[blockIdx.x] = Verdict{norms[0], bads[0]};
}

template <typename Part>
__global__ void __launch_bounds__(kThreads) add_kernel(const float* sum, const void* part, float* out,
                                                       int64_t n, float weight, const Verdict* verdict) {
    if (verdict->bad != 0) return;
    int64_t stride = int64_t(gridDim.x) * kThreads;
#pragma unroll 4
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride)
        out[i] = accumulated(sum[i], value_of<Part>(part, i), weight);
}

__global__ void finish_kernel(const float* sum, float* out, int64_t n, float weight_sum) {
    int64_t stride = int64_t(gridDim.x) * kThreads;
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride)
        out[i] = finished(sum[i], weight_sum);
}

}  // namespace

int inspect(const void* part, int part_dtype, int64_t n, float weight, Verdict* verdicts, void* stream) {
    auto kernel = part_dtype == kFloat32    ? inspect_kernel<float>
                  : part_dtype == kBfloat16 ? inspect_kernel<Bf16>
                  : part_dtype == kFloat16  ? inspect_kernel<Fp16>
                                            : inspect_kernel<Codes>;
    return launch(kernel, blocks_for(n, kChunk), kThreads, 0, stream, part, n, weight, verdicts);
}

int add(const float* sum, const void* part, float* out, int64_t n, int part_dtype, float weight,
        const Verdict* verdict, void* stream) {
    auto kernel = part_dtype == kFloat32    ? add_kernel<float>
                  : part_dtype == kBfloat16 ? add_kernel<Bf16>
                  : part_dtype == kFloat16  ? add_kernel<Fp16>
                                            : add_kernel<Codes>;
    return launch(kernel, blocks_for(n, 4 * kThreads, kMostGrid), kThreads, 0, stream, sum, part, out, n,
                  weight, verdict);
}

int finish(const float* sum, float* out, int64_t n, float weight_sum, void* stream) {
    return launch(finish_kernel, blocks_for(n, 4 * kThreads, kMostGrid), kThreads, 0, stream, sum, out, n,
                  weight_sum);
}

}  // namespace agora::cuda
