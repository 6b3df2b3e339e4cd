// The CUDA operator conv2d_relu. See lrn.h.
#pragma once

#include "../tensor.h"
#include "device.h"

namespace fastcnn::cuda {

struct ConvAxis {
  int64_t kernel, stride, padding, dilation;
  int64_t size, out;  // of the map, before and after
};

struct ConvTask {
  DType dtype;  // float32 is multiplied as TF32; there is no float64
  Shape shape;  // of x
  ConvAxis h, w;
  int64_t groups, outputs;        // outputs: channels of the output
  int64_t row;                    // elements of a row of weights, a multiple of 8
  const void *x, *weight, *bias;  // weight: one row per output, in the order kh, kw, c, then zeros; bias: may be null
  void* out;
};

void conv2d_relu(const ConvTask&, Stream);

}  // namespace fastcnn::cuda
