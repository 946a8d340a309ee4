// Which instruction set the CPU kernels run with: the best this machine has, chosen at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace agora {

const CpuKernels& cpu();
std::vector<std::string> instruction_sets();        // usable here, slowest first
void use_instruction_set(const std::string& name);  // throws std::invalid_argument
}  // namespace agora
