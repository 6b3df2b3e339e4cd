// What kernels of conv2d_relu get: on CUDA a whole convolution with bias and ReLU; on CPU, where oneDNN convolves, the
// mask of the ReLU.
#pragma once

#include "tensor.h"

namespace fastcnn {

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

// Elements in the order of memory, one bit each: whether ReLU passes the gradient. A unit is some of them.
struct MaskTask {
  DType dtype;
  int64_t count;
  const void* x;  // y in forward, dy in backward
  uint8_t* mask;
  void* out;  // backward only
};

}  // namespace fastcnn
