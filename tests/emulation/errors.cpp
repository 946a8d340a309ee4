// What a failed launch says.
#include "../../csrc/cuda/launch.h"
#include "emulator.h"

namespace agora::cuda {

const char* error_text(int) { return emulated::grid().error.c_str(); }

}  // namespace agora::cuda
