#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace agora {
namespace {

std::vector<const CpuKernels*> usable() {
    std::vector<const CpuKernels*> found = {&baseline_kernels};
#if defined(__x86_64__)
    bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2) found.push_back(&avx2_kernels);
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512) found.push_back(&avx512_kernels);
    if (avx512 && __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512bf16"))
        found.push_back(&zen4_kernels);
#endif
    return found;
}

std::atomic<const CpuKernels*>& current() {
    static std::atomic<const CpuKernels*> kernels{usable().back()};
    return kernels;
}

}  // namespace

const CpuKernels& cpu() { return *current().load(std::memory_order_relaxed); }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const CpuKernels* kernels : usable()) names.push_back(kernels->name);
    return names;
}

void use_instruction_set(const std::string& name) {
    for (const CpuKernels* kernels : usable()) {
        if (kernels->name == name) {
            current() = kernels;
            return;
        }
    }
    throw std::invalid_argument("this machine cannot run the instruction set '" + name + "'");
}

}  // namespace agora
