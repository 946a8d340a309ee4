// What the bindings of CUDA launchers share: addresses of device memory, and errors of a launch.
//
// The names and arguments are the CPU's, prefixed by `cuda_`: addresses only, and a stream instead of a
// number of threads.
#pragma once

#include <stdexcept>
#include <string>

#include "../cuda/launch.h"
#include "bind.h"

namespace agora {

using P = uintptr_t;

template <typename T>
T* device(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline void launched(int error) {
    if (error != 0)
        throw std::runtime_error(std::string("CUDA kernel not launched: ") + cuda::error_text(error));
}

}  // namespace agora
