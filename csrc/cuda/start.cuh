// How every kernel is started: one place that knows the launch syntax, so that tests can run the same
// kernels without a device (AGORA_EMULATED).
#pragma once

#include <stdint.h>

#if !defined(AGORA_EMULATED)
#include <cuda_runtime.h>

namespace agora::cuda {

// Returns what cudaGetLastError says (0: launched).
template <typename... Parameters, typename... Arguments>
int start(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, Arguments... arguments) {
    kernel<<<grid, block, 0, cudaStream_t(stream)>>>(static_cast<Parameters>(arguments)...);
    return int(cudaGetLastError());
}

}  // namespace agora::cuda
#endif

namespace agora::cuda {

// Blocks of a grid for `work` pieces: at most `most`, for kernels that stride over the rest.
inline unsigned grid_of(int64_t work, int64_t each, int64_t most = int64_t(1) << 30) {
    int64_t blocks = (work + each - 1) / each;
    return unsigned(blocks < most ? blocks : most);
}

}  // namespace agora::cuda
