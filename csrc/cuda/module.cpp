// The Python module fastcnn._C_cuda: what the build and the device are. Importing it also registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"

using namespace pybind11::literals;

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "The CUDA half of fastcnn: importing it registers torch.ops.fastcnn_cuda.";
  m.def("build_info", [] {
    return pybind11::dict("compiler"_a = FASTCNN_COMPILER, "torch"_a = FASTCNN_TORCH_VERSION,
                          "architectures"_a = FASTCNN_ARCHITECTURES);
  }, "Compiler, the torch this was built beside, and the architectures that were compiled.");
  m.def("driver_version", &fastcnn::cuda::driver_version,
        "CUDA version of the driver, 1000 * major + 10 * minor; 0: none.");
  m.def("runtime_version", &fastcnn::cuda::runtime_version,
        "CUDA version of the build, 1000 * major + 10 * minor.");
  m.def("kernel_attributes", [] {
    pybind11::list kernels;
    for (const auto& a : fastcnn::cuda::kernel_attributes()) {
      kernels.append(pybind11::dict(
          "name"_a = a.name, "registers"_a = a.registers, "static_shared_bytes"_a = a.static_shared_bytes,
          "local_bytes"_a = a.local_bytes, "threads"_a = a.threads,
          "blocks_per_multiprocessor"_a = a.blocks_per_multiprocessor, "occupancy"_a = a.occupancy));
    }
    return kernels;
  }, "Registers, shared and local memory, and occupancy of every kernel on the current device. Needs a GPU.");
}
