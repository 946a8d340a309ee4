// Rules of every CUDA launcher: all pointers are device memory, the launch is asynchronous on `stream`, and
// the result is what cudaGetLastError says after it (0: launched).
#pragma once

namespace agora::cuda {

const char* error_text(int error);

}  // namespace agora::cuda
