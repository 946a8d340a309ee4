// The generator: one thread makes one group of four values.
#include "../functors/normal.h"
#include "boundary.h"
#include "launch.h"

namespace agora::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void fill_kernel(float* out, int64_t n, uint64_t seed, uint64_t stream, float factor) {
    int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (group * 4 >= n) return;
    Normal4 x = normal4(seed, stream, uint32_t(group >> 32), uint32_t(group), factor);
    for (int i = 0; i < 4 && group * 4 + i < n; i++) out[group * 4 + i] = x.v[i];
}

// Grid: x over groups of a row, y strides over rows.
__global__ void rows_kernel(float* out, const int64_t* ids, int64_t count, int64_t d, uint64_t seed,
                            float factor) {
    int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (group * 4 >= d) return;
    for (int64_t row = blockIdx.y; row < count; row += gridDim.y) {
        Normal4 x = normal4(seed, kTokenTableStream, uint32_t(ids[row]), uint32_t(group), factor);
        for (int i = 0; i < 4 && group * 4 + i < d; i++) out[row * d + group * 4 + i] = x.v[i];
    }
}

}  // namespace

int fill(float* out, int64_t n, uint64_t seed, uint64_t stream_number, float factor, void* stream) {
    int64_t groups = (n + 3) / 4;
    fill_kernel<<<unsigned((groups + kThreads - 1) / kThreads), kThreads, 0, cudaStream_t(stream)>>>(
        out, n, seed, stream_number, factor);
    return int(cudaGetLastError());
}

int rows(float* out, const int64_t* ids, int64_t count, int64_t d, uint64_t seed, float factor,
         void* stream) {
    int64_t groups = (d + 3) / 4;
    dim3 grid(unsigned((groups + kThreads - 1) / kThreads), unsigned(count < 65535 ? count : 65535));
    rows_kernel<<<grid, kThreads, 0, cudaStream_t(stream)>>>(out, ids, count, d, seed, factor);
    return int(cudaGetLastError());
}

const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace agora::cuda
