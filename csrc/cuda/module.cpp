// The Python module fastcnn._C_cuda: what the build and the device are. Importing it also registers the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "device.h"

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "The CUDA half of fastcnn: importing it registers torch.ops.fastcnn_cuda.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = FASTCNN_COMPILER;
    info["torch"] = FASTCNN_TORCH_VERSION;
    info["architectures"] = FASTCNN_ARCHITECTURES;
    return info;
  }, "Compiler, the torch this was built beside, and the architectures that were compiled.");
  m.def("driver_version", &fastcnn::cuda::driver_version,
        "CUDA version of the driver, 1000 * major + 10 * minor; 0: none.");
  m.def("runtime_version", &fastcnn::cuda::runtime_version,
        "CUDA version of the build, 1000 * major + 10 * minor.");
  m.def("kernel_attributes", [] {
    pybind11::list kernels;
    for (const auto& a : fastcnn::cuda::kernel_attributes()) {
      pybind11::dict kernel;
      kernel["name"] = a.name;
      kernel["registers"] = a.registers;
      kernel["static_shared_bytes"] = a.static_shared_bytes;
      kernel["local_bytes"] = a.local_bytes;
      kernel["threads"] = a.threads;
      kernel["blocks_per_multiprocessor"] = a.blocks_per_multiprocessor;
      kernel["occupancy"] = a.occupancy;
      kernels.append(kernel);
    }
    return kernels;
  }, "Registers, shared and local memory, and occupancy of every kernel on the current device. Needs a GPU.");
}
