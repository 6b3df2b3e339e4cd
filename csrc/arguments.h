// What the libraries of CPU and CUDA kernels have in common: their ops' arguments, from torch's types to the kernels'.
// Python allocates every output and has checked every argument; the tensors are dense in the format it names.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "lrn.h"
#include "max_pool2d.h"
#include "tensor.h"

#define FASTCNN_LRN "int size, float alpha, float beta, float k, int groups"
#define FASTCNN_POOL "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"

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

// The ops can be called without fastcnn's own functions: what does not fit would be read or written out of bounds.
inline void expect(const char* name, const Tensor& t, DType dtype, int64_t elements) {
  STD_TORCH_CHECK(t.numel() == elements && dtype_of(t) == dtype, name, " must have ", elements,
                  " elements of the dtype that goes with the input, but has ", t.numel());
}

inline void expect_bytes(const char* name, const Tensor& t, int64_t elements, int64_t size) {
  STD_TORCH_CHECK(t.numel() == elements && static_cast<int64_t>(t.element_size()) == size, name, " must have ",
                  elements, " elements of ", size, " bytes, but has ", t.numel(), " of ", t.element_size());
}

inline MaxPool2d pool_of(const Tensor& map, const Ints& kernel, const Ints& stride, const Ints& padding,
                         const Ints& dilation, bool ceil_mode) {
  const auto axis = [&](int i) {
    return PoolAxis::of(map.size(2 + i), kernel[i], stride[i], padding[i], dilation[i], ceil_mode);
  };
  return kernel.empty() ? MaxPool2d{} : MaxPool2d{axis(0), axis(1)};
}

}  // namespace fastcnn
