// The last pass of project, and wire_pack: rows of fp32 sums, or of c, to numbers or to the int8 form.
//
// One warp a row. The output may lie at any address, so it is written byte by byte where it must be.
#include "../functors/wire.h"
#include "boundary.h"
#include "device.cuh"

namespace agora::cuda {

int project_sums(const Project& task, void* stream);

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// The spans of d, added in order.
struct SpanSums {
    const float* scratch;
    Partial partial;
    __device__ __forceinline__ float at(int64_t row, int64_t j) const {
        float sum = 0;
        for (int64_t span = 0; span < partial.spans; span++)
            sum += scratch[(span * partial.rows + row) * partial.columns + j];
        return sum;
    }
};

template <typename T>
struct Numbers {
    const T* c;
    int64_t k;
    __device__ __forceinline__ float at(int64_t row, int64_t j) const { return load(c[row * k + j]); }
};

template <typename T>
__device__ __forceinline__ void put(unsigned char* out, int64_t at, T number, bool aligned) {
    unsigned char* to = out + at * int64_t(sizeof(T));
    if (aligned) {
        *reinterpret_cast<T*>(to) = number;
        return;
    }
    unsigned char bytes[sizeof(T)];
    memcpy(bytes, &number, sizeof number);
#pragma unroll
    for (int i = 0; i < int(sizeof(T)); i++) to[i] = bytes[i];
}

template <typename T>
__device__ __forceinline__ void put_rounded(unsigned char* out, int64_t at, float value, bool aligned) {
    T number;
    store(&number, value);
    put(out, at, number, aligned);
}

template <typename Source>
__global__ void __launch_bounds__(kThreads)
    write_kernel(Source source, unsigned char* out, int dtype, int64_t rows, int64_t k, bool aligned) {
    int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    int lane = int(threadIdx.x) % 32;
    if (row >= rows) return;  // a whole warp
    if (dtype != kInt8) {
        for (int64_t j = lane; j < k; j += 32) {
            float value = source.at(row, j);
            if (dtype == kFloat32)
                put_rounded<float>(out, row * k + j, value, aligned);
            else if (dtype == kBfloat16)
                put_rounded<Bf16>(out, row * k + j, value, aligned);
            else
                put_rounded<Fp16>(out, row * k + j, value, aligned);
        }
        return;
    }
    uint32_t largest = 0;
    for (int64_t j = lane; j < k; j += 32) {
        uint32_t size = magnitude_bits(source.at(row, j));
        largest = size > largest ? size : largest;
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        uint32_t other = __shfl_xor_sync(0xffffffffu, largest, distance);
        largest = other > largest ? other : largest;
    }
    float scale = wire_scale(largest), divisor = wire_divisor(scale);
    if (lane == 0) put(out, row, scale, aligned);
    for (int64_t j = lane; j < k; j += 32)
        out[4 * rows + row * k + j] = static_cast<unsigned char>(wire_code(source.at(row, j), divisor));
}

template <typename Source>
int write(Source source, void* out, int dtype, int64_t rows, int64_t k, void* stream) {
    bool aligned = reinterpret_cast<uintptr_t>(out) % 4 == 0;
    return launch(write_kernel<Source>, dim3(blocks_for(rows, kWarps)), kThreads, 0, stream, source,
                  static_cast<unsigned char*>(out), dtype, rows, k, aligned);
}

}  // namespace

int project(const Project& t, void* stream) {
    int error = project_sums(t, stream);
    if (error != 0) return error;
    return write(SpanSums{t.scratch, partial_of(t.rows, t.d, t.k)}, t.out, t.out_dtype, t.rows, t.k, stream);
}

int wire_pack(const void* c, int c_dtype, void* out, int wire, int64_t rows, int64_t k, void* stream) {
    if (c_dtype == kFloat32)
        return write(Numbers<float>{static_cast<const float*>(c), k}, out, wire, rows, k, stream);
    if (c_dtype == kBfloat16)
        return write(Numbers<Bf16>{static_cast<const Bf16*>(c), k}, out, wire, rows, k, stream);
    return write(Numbers<Fp16>{static_cast<const Fp16*>(c), k}, out, wire, rows, k, stream);
}

}  // namespace agora::cuda
