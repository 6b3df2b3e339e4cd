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

// The same in training, float32, without ReLU and factor: its output and gradients. There are a multiple of 16 inputs.
// A unit is a few outputs, or of the gradients a panel of columns.
struct LinearTrainingTask {
  int64_t vectors, in, outputs;
  const float *x, *weight, *bias, *dy;  // what a product does not need is null, and so may bias be
  float* out;
};

}  // namespace fastcnn
