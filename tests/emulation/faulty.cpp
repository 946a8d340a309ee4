// Kernels with mistakes, and one without: what the emulator has to tell apart.
#include "cuda_runtime.h"

namespace {

enum Fault { kNone, kNoBarrier, kApart, kForever, kUnwritten };

void kernel(float* out, int fault) {
    __shared__ float numbers[64];
    unsigned me = threadIdx.x;
    if (fault != kUnwritten || me != 5) numbers[me] = float(me);
    if (fault == kApart && me % 2 == 0)
        __syncthreads();
    else if (fault == kForever && me == 3)
        __syncwarp();
    else if (fault != kNoBarrier)
        __syncthreads();
    out[me] = numbers[63 - me];
}

}  // namespace

extern "C" int run(float* out, int fault) {
    return emulated::launch(kernel, dim3(1), 64, 0, nullptr, out, fault);
}
