// The CUDA operators with a CUDA runtime that has no device: it notes what would be launched. The kernels' files are
// compiled by nvcc as they are, and linked with this in the place of libcudart.
#include <cuda_runtime_api.h>

#include <chrono>
#include <map>
#include <string>

#include "cuda_task.h"

namespace {

namespace py = pybind11;
using fastcnn::TailTask;

struct Launch {
  const void* function;
  dim3 grid, block;
  void* arguments;
  size_t shared;
};

std::map<const void*, std::string>& names() {  // of the kernels, by what the host calls them
  static std::map<const void*, std::string> names;
  return names;
}
int multiprocessors;
py::list* launches;                          // where they are noted, if at all
const std::map<std::string, size_t>* sizes;  // of the arguments, by name

auto three(dim3 d) { return py::make_tuple(d.x, d.y, d.z); }

using Operator = void (*)(const TailTask&, fastcnn::cuda::Stream);

Operator find(const std::string& op) {
#define FASTCNN_NAMED(op) {#op, fastcnn::cuda::op}, {#op "_backward", fastcnn::cuda::op##_backward},
  static const std::map<std::string, Operator> operators = {FASTCNN_TAIL_OPERATORS(FASTCNN_NAMED)};
  return operators.at(op);
}

TailTask with_memory(TailTask t, const std::vector<uintptr_t>& buffers) {
  const auto at = [&](size_t i) { return reinterpret_cast<void*>(buffers.at(i)); };
  t.x = at(0), t.bias = at(1), t.dy = at(2), t.out = at(3), t.argmax = at(4);
  t.partials = at(5), t.dbias = at(6), t.terms = at(7);
  return t;
}

py::list record(const std::string& op, const TailTask& described, const std::vector<uintptr_t>& buffers,
                const std::map<std::string, size_t>& argument_sizes, int on_multiprocessors) {
  py::list found;
  launches = &found, sizes = &argument_sizes, multiprocessors = on_multiprocessors;
  find(op)(with_memory(described, buffers), nullptr);
  return found;
}

// Of a call of an operator whose launches are not noted.
double nanoseconds(const std::string& op, const TailTask& described, const std::vector<uintptr_t>& buffers,
                   int on_multiprocessors, int calls) {
  const TailTask t = with_memory(described, buffers);
  const Operator call = find(op);
  launches = nullptr, multiprocessors = on_multiprocessors;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) call(t, nullptr);
  const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
  return spent.count() / calls;
}

}  // namespace

// -- what the kernels' files call of CUDA's runtime
// ---------------------------------------------------------------------

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[host] = device;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? multiprocessors : 2048;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "?"; }
const char* cudaGetErrorString(cudaError_t) { return "?"; }
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  if (!launches) return cudaSuccess;
  const std::string& name = names().at(function);
  const py::bytes bytes(static_cast<const char*>(arguments[0]), sizes->at(name));
  launches->append(py::make_tuple(name, three(grid), three(block), bytes, shared));
  return cudaSuccess;
}

}  // extern "C"

PYBIND11_MODULE(cuda_launches, m) {
  py::class_<TailTask>(m, "Task").def(py::init(&fastcnn::cuda::make_task));
  m.def("bias_partials", [](TailTask t, int on) {
    multiprocessors = on;
    t.dbias = &t;  // it has one
    return fastcnn::cuda::bias_partials(t);
  });
  m.def("lrn_terms", &fastcnn::cuda::lrn_terms);
  m.def("record", &record);
  m.def("nanoseconds", &nanoseconds);
}
