// From what a task says at run time to the types and constants that kernels are compiled for.
#pragma once

#include <type_traits>

#include "../relu_lrn_max_pool2d.h"
#include "simt.cuh"

namespace fastcnn::cuda {

// f(T{}, channels_last as a constant)
template <typename F>
void with_dtype_and_format(DType dtype, bool channels_last, F f) {
  const auto with_format = [&](auto t) {
    if (channels_last) f(t, std::true_type());
    else f(t, std::false_type());
  };
  switch (dtype) {
    case DType::float16: return with_format(Half());
    case DType::bfloat16: return with_format(BFloat16());
    case DType::float32: return with_format(float());
    case DType::float64: return with_format(double());
  }
}

template <typename F>
void with_dtype_and_format(const TailTask& task, F f) {
  with_dtype_and_format(task.dtype, task.shape.channels_last, f);
}

inline bool empty(const TailTask& task) { return task.shape.elements() == 0; }

}  // namespace fastcnn::cuda
