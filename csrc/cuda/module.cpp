// The Python module fastcnn._C_cuda: what the build and the device are. Importing it also registers the ops.
#include "../python.h"
#include "device.h"

namespace fastcnn::cuda {
namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s}", "compiler", FASTCNN_COMPILER, "torch", FASTCNN_TORCH_VERSION, "architectures",
                       FASTCNN_ARCHITECTURES);
}

PyObject* driver_version(PyObject*, PyObject*) {
  return as_python([] { return PyLong_FromLong(cuda::driver_version()); });
}

PyObject* runtime_version(PyObject*, PyObject*) {
  return as_python([] { return PyLong_FromLong(cuda::runtime_version()); });
}

PyObject* kernel_attributes(PyObject*, PyObject*) {
  return as_python([] {
    return as_list(cuda::kernel_attributes(), [](const KernelAttributes& a) {
      return Py_BuildValue("{s:s,s:i,s:i,s:i,s:i,s:i,s:d}", "name", a.name.c_str(), "registers", a.registers,
                           "static_shared_bytes", a.static_shared_bytes, "local_bytes", a.local_bytes, "threads",
                           a.threads, "blocks_per_multiprocessor", a.blocks_per_multiprocessor, "occupancy",
                           a.occupancy);
    });
  });
}

PyMethodDef kFunctions[] = {
    {"build_info", build_info, METH_NOARGS,
     "Compiler, the torch this was built beside, and the architectures that were compiled."},
    {"driver_version", driver_version, METH_NOARGS, "CUDA version of the driver, 1000 * major + 10 * minor; 0: none."},
    {"runtime_version", runtime_version, METH_NOARGS, "CUDA version of the build, 1000 * major + 10 * minor."},
    {"kernel_attributes", kernel_attributes, METH_NOARGS,
     "Registers, shared and local memory, and occupancy of every kernel on the current device. Needs a GPU."},
    {},
};

PyModuleDef kModule = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "fastcnn._C_cuda",
    .m_doc = "The CUDA half of fastcnn: importing it registers torch.ops.fastcnn_cuda.",
    .m_size = 0,
    .m_methods = kFunctions,
};

}  // namespace
}  // namespace fastcnn::cuda

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&fastcnn::cuda::kModule); }
