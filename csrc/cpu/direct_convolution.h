#pragma once

#include "../tensor.h"

namespace fastcnn {

// A convolution of a small map, float32, channels_last, and what follows it: y = relu(conv(x) + bias + addend).
// A unit is one panel of output channels of a piece of one row of output pixels.
struct DirectConvolutionTask {
  Shape shape;  // of x
  int64_t out_h, out_w, outputs, groups, kernel[2], stride[2], padding[2], dilation[2];
  bool relu;
  // weight: for each group and each panel, kernel rows x kernel columns x channels x the panel's outputs, with zeros
  // up to a multiple of 16 outputs. Bias and addend may be null.
  const float *x, *weight, *bias, *addend;
  float* out;
  int64_t out_stride, addend_stride;  // elements from pixel to pixel

  // A group's outputs, in panels of at most 64, all multiples of 16 but for the end of the last.
  int64_t group_outputs() const { return outputs / groups; }
  int64_t padded_outputs() const { return (group_outputs() + 15) / 16 * 16; }
  int64_t panels() const { return (padded_outputs() + 63) / 64; }
  int64_t panel_begin(int64_t panel) const { return padded_outputs() / 16 * panel / panels() * 16; }
};

}  // namespace fastcnn
