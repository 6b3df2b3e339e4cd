// The CUDA operators with a CUDA runtime that has no device: it notes what would be launched. The kernels' files are
// compiled by nvcc as they are, and linked with this in the place of libcudart.
#include <cuda_runtime_api.h>

#include <chrono>
#include <map>
#include <string>

#include "cuda_task.h"

namespace {

namespace py = pybind11;
using fastcnn::AugmentTask, fastcnn::BatchNormTask, fastcnn::TailTask;

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

template <typename Task>
using Operator = void (*)(const Task&, fastcnn::cuda::Stream);

void find(const std::string& op, Operator<TailTask>& found) {
#define FASTCNN_NAMED(op) {#op, fastcnn::cuda::op}, {#op "_backward", fastcnn::cuda::op##_backward},
  static const std::map<std::string, Operator<TailTask>> operators = {FASTCNN_TAIL_OPERATORS(FASTCNN_NAMED)};
  found = operators.at(op);
}
void find(const std::string&, Operator<AugmentTask>& found) { found = fastcnn::cuda::augment; }
void find(const std::string& op, Operator<BatchNormTask>& found) {
  static const std::map<std::string, Operator<BatchNormTask>> operators = {
      {"batch_norm_statistics", fastcnn::cuda::batch_norm_statistics},
      {"batch_norm_relu_max_pool2d", fastcnn::cuda::batch_norm_relu_max_pool2d},
      {"batch_norm_relu_max_pool2d_backward", fastcnn::cuda::batch_norm_relu_max_pool2d_backward},
  };
  found = operators.at(op);
}

using Buffers = std::vector<uintptr_t>;

void* at(const Buffers& buffers, size_t i) { return reinterpret_cast<void*>(buffers.at(i)); }

TailTask with_memory(TailTask t, const Buffers& b) {
  t.x = at(b, 0), t.bias = at(b, 1), t.dy = at(b, 2), t.out = at(b, 3), t.argmax = at(b, 4);
  t.partials = at(b, 5), t.dbias = at(b, 6), t.terms = at(b, 7);
  return t;
}
AugmentTask with_memory(AugmentTask t, const Buffers& b) {
  t.x = static_cast<uint8_t*>(at(b, 0)), t.offsets = static_cast<int64_t*>(at(b, 1));
  t.mirror = static_cast<bool*>(at(b, 2)), t.mean = at(b, 3), t.sizes = static_cast<int64_t*>(at(b, 4));
  t.out = at(b, 5);
  return t;
}

BatchNormTask with_memory(BatchNormTask t, const Buffers& b) {
  t.x = at(b, 0), t.mean = at(b, 1), t.var = at(b, 2), t.weight = at(b, 3), t.bias = at(b, 4), t.dy = at(b, 5);
  t.out = at(b, 6), t.argmax = at(b, 7), t.dweight = at(b, 8), t.dbias = at(b, 9);
  t.sums = static_cast<double*>(at(b, 10)), t.terms = at(b, 11);
  return t;
}

template <typename Task>
py::list record(const std::string& op, const Task& described, const Buffers& buffers,
                const std::map<std::string, size_t>& argument_sizes, int on_multiprocessors) {
  py::list noted;
  Operator<Task> call;
  find(op, call);
  launches = &noted, sizes = &argument_sizes, multiprocessors = on_multiprocessors;
  call(with_memory(described, buffers), nullptr);
  return noted;
}

// Of a call of an operator whose launches are not noted.
template <typename Task>
double nanoseconds(const std::string& op, const Task& described, const Buffers& buffers, int on_multiprocessors,
                   int calls) {
  const Task t = with_memory(described, buffers);
  Operator<Task> call;
  find(op, call);
  launches = nullptr, multiprocessors = on_multiprocessors;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) call(t, nullptr);
  const std::chrono::duration<double, std::nano> spent = std::chrono::steady_clock::now() - start;
  return spent.count() / calls;
}

template <typename Task>
void define(py::module_& m) {
  m.def("record", &record<Task>);
  m.def("nanoseconds", &nanoseconds<Task>);
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
  py::class_<AugmentTask>(m, "AugmentTask").def(py::init(&fastcnn::cuda::make_augment_task));
  py::class_<BatchNormTask>(m, "BatchNormTask").def(py::init(&fastcnn::cuda::make_batch_norm_task));
  m.def("bias_partials", [](TailTask t, int on) {
    multiprocessors = on;
    t.dbias = &t;  // it has one
    return fastcnn::cuda::bias_partials(t);
  });
  m.def("lrn_terms", &fastcnn::cuda::lrn_terms);
  define<TailTask>(m);
  m.def("batch_norm_sums", [](const BatchNormTask& t, int on) {
    multiprocessors = on;
    return fastcnn::cuda::batch_norm_sums(t);
  });
  define<AugmentTask>(m);
  define<BatchNormTask>(m);
}
