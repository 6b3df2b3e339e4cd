// What the libraries of CPU and CUDA kernels have in common: their ops' arguments, from torch's types to the kernels'.
// Python allocates every output and has checked every argument; the tensors are dense in the format it names.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "relu_lrn_max_pool2d.h"

// Arguments that several ops have, in their schemas and functions.
#define FASTCNN_LRN "int size, float alpha, float beta, float k, int groups"
#define FASTCNN_LRN_ARGUMENTS int64_t size, double alpha, double beta, double k, int64_t groups
#define FASTCNN_POOL "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
#define FASTCNN_POOL_ARGUMENTS Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode

// Define an op of a library, and implement it for a device.
#define FASTCNN_OP(library, device, name, arguments, function)          \
  STABLE_TORCH_LIBRARY_FRAGMENT(library, m) { m.def(#name arguments); } \
  STABLE_TORCH_LIBRARY_IMPL(library, device, m) { m.impl(#name, TORCH_BOX(&function)); }

namespace fastcnn {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Half: return DType::float16;
    case torch::headeronly::ScalarType::BFloat16: return DType::bfloat16;
    case torch::headeronly::ScalarType::Float: return DType::float32;
    case torch::headeronly::ScalarType::Double: return DType::float64;
    default: STD_TORCH_CHECK(false, "not implemented for this dtype");
  }
}

inline DType wide(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

template <typename T = void>
T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(const_cast<void*>(t->const_data_ptr())) : nullptr;
}

// The ops can be called without fastcnn's own functions: what does not fit would be read or written out of bounds.
inline void expect(const char* name, const Tensor& t, DType dtype, int64_t elements) {
  STD_TORCH_CHECK(t.numel() == elements && dtype_of(t) == dtype, name, " must have ", elements,
                  " elements of the dtype that goes with the input, but has ", t.numel());
}

inline void expect_bytes(const char* name, const Tensor& t, int64_t elements, int64_t size) {
  STD_TORCH_CHECK(t.numel() == elements && static_cast<int64_t>(t.element_size()) == size, name, " must have ",
                  elements, " elements of ", size, " bytes, but has ", t.numel(), " of ", t.element_size());
}

// The task of an operator on this map, or on one of its shape; it has no part but, if there is a kernel, the pool.
inline TailTask map_task(const Tensor& map, bool channels_last, const Ints& kernel, const Ints& stride,
                         const Ints& padding, const Ints& dilation, bool ceil_mode) {
  const auto axis = [&](int i) {
    return PoolAxis::of(map.size(2 + i), kernel[i], stride[i], padding[i], dilation[i], ceil_mode);
  };
  TailTask task{};
  task.dtype = dtype_of(map);
  task.shape = {map.size(0), map.size(1), map.size(2), map.size(3), channels_last};
  if (!kernel.empty()) task.pool = {axis(0), axis(1)};
  return task;
}

// What a library does with a task that is complete but for memory of the kernels' own; `out` is the tensor of task.out.
using RunTask = void (*)(TailTask& task, const Tensor& out);

inline void run_forward(RunTask run, TailTask& task, const Tensor& x, const std::optional<Tensor>& bias,
                        const Tensor& out, const std::optional<Tensor>& argmax) {
  const int64_t out_elements = task.out_shape().elements();
  if (bias) expect("bias", *bias, wide(task.dtype), task.shape.C);
  expect("out", out, task.dtype, out_elements);
  if (argmax) expect_bytes("argmax", *argmax, out_elements, task.pool.wide_argmax() ? 4 : 1);
  task.x = x.const_data_ptr(), task.bias = data_or_null(bias);
  task.out = out.mutable_data_ptr(), task.argmax = data_or_null(argmax);
  run(task, out);
}

inline void run_backward(RunTask run, TailTask& task, const Tensor& dy, const std::optional<Tensor>& x,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& argmax, const Tensor& dx,
                         const std::optional<Tensor>& dbias) {
  const int64_t out_elements = task.out_shape().elements();
  expect("grad", dy, task.dtype, out_elements);
  expect("out", dx, task.dtype, task.shape.elements());
  STD_TORCH_CHECK(argmax || !task.pool, "argmax must be given for a pool");
  if (argmax) expect_bytes("argmax", *argmax, out_elements, task.pool.wide_argmax() ? 4 : 1);
  if (bias) expect("bias", *bias, wide(task.dtype), task.shape.C);
  if (dbias) expect("the bias gradient", *dbias, wide(task.dtype), task.shape.C);
  task.dy = dy.const_data_ptr(), task.x = data_or_null(x), task.bias = data_or_null(bias);
  task.argmax = data_or_null(argmax), task.out = dx.mutable_data_ptr(), task.dbias = data_or_null(dbias);
  run(task, dx);
}

}  // namespace fastcnn
