// The Python module fastcnn._C: what the build is and can do. Importing it also registers the ops.
#include "capability.h"
#include "cpu/memory.h"
#include "python.h"

namespace fastcnn {
namespace {

PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s}", "compiler", FASTCNN_COMPILER, "torch", FASTCNN_TORCH_VERSION, "capabilities",
                       FASTCNN_CAPABILITIES);
}

PyObject* cpu_capabilities(PyObject*, PyObject*) {
  return as_python([] {
    return as_list(capabilities(), [](const std::string& name) { return PyUnicode_FromString(name.c_str()); });
  });
}

PyObject* cpu_capability(PyObject*, PyObject*) {
  return as_python([] { return PyUnicode_FromString(capability_name().c_str()); });
}

PyObject* set_cpu_capability(PyObject*, PyObject* args) {
  const char* name;
  if (!PyArg_ParseTuple(args, "s", &name)) return nullptr;
  return as_python([&] {
    set_capability(name);
    Py_RETURN_NONE;
  });
}

PyObject* release_memory(PyObject*, PyObject*) {
  fastcnn::release_memory();
  Py_RETURN_NONE;
}

PyMethodDef kFunctions[] = {
    {"build_info", build_info, METH_NOARGS,
     "Compiler, the torch this was built beside, and the CPU capabilities that were compiled."},
    {"cpu_capabilities", cpu_capabilities, METH_NOARGS,
     "Names of the compiled capabilities this machine has, best last."},
    {"cpu_capability", cpu_capability, METH_NOARGS, "Name of the capability in use."},
    {"release_memory", release_memory, METH_NOARGS, "Give the cached memory of large outputs back to the system."},
    {"set_cpu_capability", set_cpu_capability, METH_VARARGS,
     "Use the kernels compiled for this capability. Raises ValueError if they are not here or cannot run."},
    {},
};

PyModuleDef kModule = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "fastcnn._C",
    .m_doc = "The C++ half of fastcnn: importing it registers torch.ops.fastcnn_cpu.",
    .m_size = 0,
    .m_methods = kFunctions,
};

}  // namespace
}  // namespace fastcnn

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&fastcnn::kModule); }
