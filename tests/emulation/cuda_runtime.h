// Enough of CUDA to compile csrc/cuda for the CPU: see emulator.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// All of a module's thread-local memory is shared memory of its kernels: emulator.h spoils it.
#define __shared__ static thread_local

#define __syncthreads() emulated::block_barrier(__FILE__, __LINE__)
#define __syncthreads_or(predicate) emulated::block_or(predicate, __FILE__, __LINE__)
#define __syncwarp(...) emulated::warp_barrier(__FILE__, __LINE__)
#define __shfl_sync(mask, value, lane) emulated::shuffle(mask, value, lane)
#define __shfl_xor_sync(mask, value, lanes) emulated::shuffle(mask, value, emulated::lane() ^ (lanes))
#define __shfl_down_sync(mask, value, lanes) emulated::shuffle(mask, value, emulated::lane() + (lanes))

using emulated::blockDim;
using emulated::blockIdx;
using emulated::dim3;
using emulated::gridDim;
using emulated::threadIdx;

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return uint2{x, y}; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

inline const char* cudaGetErrorString(cudaError_t) { return emulated::grid().error.c_str(); }
