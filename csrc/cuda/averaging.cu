// Slice pack and merge (one block of threads a block of weights), weighted reduce.
#include "../functors/reduce.h"
#include "../functors/slices.h"
#include "averaging.h"

namespace agora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;  // elements of one verdict, as on the CPU
static_assert(kThreads == kBlock, "a thread moves one float of a block");

__global__ void pack_kernel(const float* flat, float* packed, Permutation permutation, int64_t first,
                            int64_t count) {
    __shared__ uint64_t block;
    for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
        if (threadIdx.x == 0) block = permute(permutation, uint64_t(first + i));
        __syncthreads();
        packed[i * kBlock + threadIdx.x] = flat[block * kBlock + threadIdx.x];
        __syncthreads();
    }
}

__global__ void merge_kernel(float* flat, const float* snapshot, const float* average,
                             Permutation permutation, int64_t first, int64_t start, int64_t stop, int mode) {
    __shared__ uint64_t block;
    int64_t last = (stop + kBlock - 1) / kBlock;
    for (int64_t i = start / kBlock + blockIdx.x; i < last; i += gridDim.x) {
        if (threadIdx.x == 0) block = permute(permutation, uint64_t(first + i));
        __syncthreads();
        int64_t at = i * kBlock + threadIdx.x;
        if (at >= start && at < stop) {
            float* weight = flat + block * kBlock + threadIdx.x;
            *weight = merged(*weight, mode == kDelta ? snapshot[at] : 0.0f, average[at], mode);
        }
        __syncthreads();
    }
}

template <typename Part>
__global__ void inspect_kernel(const Part* part, int64_t n, float weight, Verdict* verdicts) {
    __shared__ double norms[kThreads];
    __shared__ int bad;
    if (threadIdx.x == 0) bad = 0;
    __syncthreads();
    int64_t start = int64_t(blockIdx.x) * kChunk, stop = start + kChunk < n ? start + kChunk : n;
    double norm2 = 0;
    for (int64_t i = start + threadIdx.x; i < stop; i += kThreads) {
        float x = load(part[i]);
        if (unusable(x, weight)) bad = 1;
        norm2 += double(x) * double(x);
    }
    norms[threadIdx.x] = norm2;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) norms[threadIdx.x] += norms[threadIdx.x + half];
    }
    __syncthreads();
    if (threadIdx.x == 0) verdicts[blockIdx.x] = Verdict{norms[0], double(bad)};
}

template <typename Part>
__global__ void add_kernel(float* sum, const Part* part, int64_t n, float weight) {
    int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < n) sum[i] = accumulated(sum[i], load(part[i]), weight);
}

__global__ void finish_kernel(const float* sum, float* out, int64_t n, float weight_sum) {
    int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < n) out[i] = finished(sum[i], weight_sum);
}

unsigned grid_of(int64_t n, int64_t each) { return unsigned((n + each - 1) / each); }

unsigned at_most_65535(int64_t n) { return unsigned(n < 65535 ? n : 65535); }

}  // namespace

int pack(const float* flat, float* packed, int64_t blocks, int64_t first, int64_t count, uint64_t key,
         void* stream) {
    pack_kernel<<<at_most_65535(count), kThreads, 0, cudaStream_t(stream)>>>(
        flat, packed, make_permutation(uint64_t(blocks), key), first, count);
    return int(cudaGetLastError());
}

int merge(float* flat, const float* snapshot, const float* average, int64_t blocks, int64_t first,
          uint64_t key, int64_t start, int64_t stop, int mode, void* stream) {
    int64_t touched = (stop + kBlock - 1) / kBlock - start / kBlock;
    merge_kernel<<<at_most_65535(touched), kThreads, 0, cudaStream_t(stream)>>>(
        flat, snapshot, average, make_permutation(uint64_t(blocks), key), first, start, stop, mode);
    return int(cudaGetLastError());
}

int inspect(const void* part, int part_dtype, int64_t n, float weight, Verdict* verdicts, void* stream) {
    unsigned grid = grid_of(n, kChunk);
    if (part_dtype == kFloat32)
        inspect_kernel<<<grid, kThreads, 0, cudaStream_t(stream)>>>(static_cast<const float*>(part), n,
                                                                    weight, verdicts);
    else
        inspect_kernel<<<grid, kThreads, 0, cudaStream_t(stream)>>>(static_cast<const Bf16*>(part), n, weight,
                                                                    verdicts);
    return int(cudaGetLastError());
}

int add(float* sum, const void* part, int part_dtype, int64_t n, float weight, void* stream) {
    unsigned grid = grid_of(n, kThreads);
    if (part_dtype == kFloat32)
        add_kernel<<<grid, kThreads, 0, cudaStream_t(stream)>>>(sum, static_cast<const float*>(part), n,
                                                                weight);
    else
        add_kernel<<<grid, kThreads, 0, cudaStream_t(stream)>>>(sum, static_cast<const Bf16*>(part), n,
                                                                weight);
    return int(cudaGetLastError());
}

int finish(const float* sum, float* out, int64_t n, float weight_sum, void* stream) {
    finish_kernel<<<grid_of(n, kThreads), kThreads, 0, cudaStream_t(stream)>>>(sum, out, n, weight_sum);
    return int(cudaGetLastError());
}

}  // namespace agora::cuda
