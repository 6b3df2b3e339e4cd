#pragma once

#include "../tensor.h"

namespace fastcnn {

// A fully connected layer of 1 to kVectors vectors, perhaps rectified, times a factor. A unit is a few outputs.
struct LinearTask {
  static constexpr int kVectors = 4;
  DType dtype;
  int64_t vectors, in, outputs;
  bool relu;
  double factor;
  const void *x, *weight, *bias;  // weight: one row per output; bias: may be null
  void* out;
};

}  // namespace fastcnn
