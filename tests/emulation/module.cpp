// The Python module agora_kernels_emulated: CUDA bindings over the emulator. Addresses are host memory.
#include "../../csrc/bind/bind.h"

PYBIND11_MODULE(agora_kernels_emulated, m) {
    agora::bind_cuda_averaging(m);
    agora::bind_cuda_boundary(m);
}
