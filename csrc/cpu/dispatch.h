// From the dtype of a task to a type: f gets a value of it.
#pragma once

#include "../tensor.h"
#include "vec.h"

namespace fastcnn::FASTCNN_CAPABILITY {

template <typename F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::float16: return f(Half{});
    case DType::bfloat16: return f(BFloat16{});
    case DType::float32: return f(0.0f);
    case DType::float64: return f(0.0);
  }
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
