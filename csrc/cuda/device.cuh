// What kernels ask of the machine beyond C++: launches, dynamic shared memory, asynchronous copies.
//
// All of it is here, so that the sources compile for the CPU too (AGORA_EMULATED), where their indices and
// barriers can be checked on a machine without a GPU. Instructions of sm_80 and newer.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include <tuple>

namespace agora::cuda {

#if defined(AGORA_EMULATED)

using emulated::dynamic_shared;
using emulated::launch;

static inline void copy_async(void* to, const void* from, bool inside) {
    if (inside)
        memcpy(to, from, 16);
    else
        memset(to, 0, 16);
}
static inline void commit_copies() {}
template <int kLeft>
static inline void wait_copies() {}

#else

__device__ __forceinline__ unsigned char* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return bytes;
}

// `shared`: bytes of dynamic shared memory; above 48 KB a kernel must be allowed to have them.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, void* stream,
           Arguments... arguments) {
    const void* address = reinterpret_cast<const void*>(kernel);
    if (shared > 48 * 1024) {
        cudaError_t error =
            cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
        if (error != cudaSuccess) return int(error);
    }
    std::tuple<Parameters...> values(arguments...);
    cudaError_t error = std::apply(
        [&](Parameters&... each) {
            void* places[] = {const_cast<void*>(static_cast<const void*>(&each))...};
            return cudaLaunchKernel(address, grid, dim3(unsigned(threads)), places, size_t(shared),
                                    cudaStream_t(stream));
        },
        values);
    cudaError_t last = cudaGetLastError();  // also clears it
    return int(error != cudaSuccess ? error : last);
}

// 16 bytes from global to shared memory, or 16 zeros.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
    unsigned address = unsigned(__cvta_generic_to_shared(to));
    int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(bytes)
                 : "memory");
}

// The copies since the last call are one group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Until at most kLeft of this thread's groups are under way; other threads see them after a barrier.
template <int kLeft>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

#endif

// Blocks of a grid for n pieces: at most `most`, for kernels that stride over the rest.
inline unsigned blocks_for(int64_t n, int64_t each, int64_t most = int64_t(1) << 30) {
    int64_t blocks = (n + each - 1) / each;
    return unsigned(blocks < most ? blocks : most);
}

}  // namespace agora::cuda
