// The Python module fastcnn._C: what the build is and can do. Importing it also registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "capability.h"
#include "cpu/memory.h"

using namespace pybind11::literals;

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ half of fastcnn: importing it registers torch.ops.fastcnn_cpu.";
  m.def("build_info", [] {
    return pybind11::dict("compiler"_a = FASTCNN_COMPILER, "torch"_a = FASTCNN_TORCH_VERSION,
                          "capabilities"_a = FASTCNN_CAPABILITIES);
  }, "Compiler, the torch this was built beside, and the CPU capabilities that were compiled.");
  m.def("cpu_capabilities", &fastcnn::capabilities, "Names of the compiled capabilities this machine has, best last.");
  m.def("cpu_capability", &fastcnn::capability_name, "Name of the capability in use.");
  m.def("release_memory", &fastcnn::release_memory, "Give the cached memory of large outputs back to the system.");
  m.def("set_cpu_capability", &fastcnn::set_capability, pybind11::arg("name"),
        "Use the kernels compiled for this capability. Raises ValueError if they are not here or cannot run.");
}
