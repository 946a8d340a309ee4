// The Python module `agora_kernels`: addresses, sizes, threads; no framework.
//
// stage/kernels is the front: it knows shapes, dtypes, devices and autograd. The bindings (csrc/bind) check
// what would crash the process (null, misaligned, too short, out of range), drop the GIL and call the
// launchers.
#include "bind/bind.h"

PYBIND11_MODULE(agora_kernels, m) {
    using namespace agora;
    m.doc() = "Kernels of the data path. Memory arguments are addresses (int) or contiguous buffers.";
    bind_boundary(m);
    bind_averaging(m);
    m.def("instruction_sets", &instruction_sets, "Usable on this machine, slowest first.");
    m.def("instruction_set", [] { return std::string(cpu().name); });
    m.def("use_instruction_set", &use_instruction_set, py::arg("name"));
#if defined(AGORA_CUDA)
    m.attr("has_cuda") = true;
    m.attr("cuda_archs") = py::make_tuple(AGORA_CUDA_ARCHS);  // 80, 90, ...
    bind_cuda_boundary(m);
    bind_cuda_averaging(m);
#else
    m.attr("has_cuda") = false;
#endif
}
