// Parameters of a convolution with bias and ReLU.
#pragma once

#include <cstdint>

namespace fastcnn {

struct ConvAxis {
  int64_t kernel, stride, padding, dilation;
  int64_t size, out;  // of the map, before and after
};

struct Conv2d {
  ConvAxis h, w;
  int64_t groups, outputs;  // channels of the output
};

}  // namespace fastcnn
