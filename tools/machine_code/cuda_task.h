// How Python describes a task of the CUDA operators, but for its memory.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "../../csrc/cuda/operators.h"

namespace fastcnn::cuda {

using Ints = std::vector<int64_t>;

inline TailTask make_task(int dtype, const Ints& shape, bool channels_last, bool relu,
                          std::tuple<int64_t, double, double, double, int64_t> lrn, const Ints& kernel,
                          const Ints& stride, const Ints& padding, const Ints& dilation, bool ceil_mode) {
  TailTask t{};
  t.dtype = static_cast<DType>(dtype);
  t.shape = {shape[0], shape[1], shape[2], shape[3], channels_last};
  t.relu = relu;
  std::apply([&](auto... part) { t.lrn = {part...}; }, lrn);
  const auto axis = [&](int i) {
    return PoolAxis::of(shape[2 + i], kernel[i], stride[i], padding[i], dilation[i], ceil_mode);
  };
  if (!kernel.empty()) t.pool = {axis(0), axis(1)};
  return t;
}

// `training` ... `ceil_mode`: as the registered ops take them.
inline BatchNormTask make_batch_norm_task(int dtype, const Ints& shape, bool channels_last, bool training, double eps,
                                          bool relu, bool relu_first, const Ints& kernel, const Ints& stride,
                                          const Ints& padding, const Ints& dilation, bool ceil_mode) {
  BatchNormTask t{};
  static_cast<TailTask&>(t) = make_task(dtype, shape, channels_last, relu && !relu_first, {0, 0, 0, 0, 1}, kernel,
                                        stride, padding, dilation, ceil_mode);
  t.training = training, t.eps = eps, t.relu_first = relu && relu_first;
  return t;
}

// `shape`: (N, H, W, 3) of the pictures.
inline AugmentTask make_augment_task(int dtype, const Ints& shape, const Ints& crop, bool channels_last,
                                     const std::array<double, 3>& scale) {
  AugmentTask t{static_cast<DType>(dtype), shape[0], shape[1], shape[2], crop[0], crop[1], channels_last};
  std::copy(scale.begin(), scale.end(), t.scale);
  return t;
}

}  // namespace fastcnn::cuda
