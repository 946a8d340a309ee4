// How every kernel is started: one place that knows the launch syntax, so that tests can run the same
// kernels without a device (AGORA_EMULATED).
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace agora::cuda {

// Returns what cudaGetLastError says (0: launched).
template <typename... Parameters, typename... Arguments>
int start(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, Arguments... arguments) {
#if defined(AGORA_EMULATED)
    return emulated::launch(kernel, grid, int(block.x), 0, stream, arguments...);
#else
    // clang-format off: it takes a .cuh for plain C++
    kernel<<<grid, block, 0, cudaStream_t(stream)>>>(static_cast<Parameters>(arguments)...);
    // clang-format on
    return int(cudaGetLastError());
#endif
}

// Blocks of a grid for `work` pieces: at most `most`, for kernels that stride over the rest.
inline unsigned grid_of(int64_t work, int64_t each, int64_t most = int64_t(1) << 30) {
    int64_t blocks = (work + each - 1) / each;
    return unsigned(blocks < most ? blocks : most);
}

}  // namespace agora::cuda
