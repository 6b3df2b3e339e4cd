// What kernels of batch_norm_relu_max_pool2d get: y = max_pool2d(relu((x - mean) * scale + bias)) with
// scale = weight / sqrt(var + eps). Knows nothing of torch.
#pragma once

#include "relu_lrn_max_pool2d.h"

namespace fastcnn {

// A tail without LRN, whose relu is the one after the batch norm. All of dz is the gradient of what that ReLU gets.
struct BatchNormTask : TailTask {
  bool relu_first, training;
  double eps;
  void *mean, *var;  // in the compute type, as the weight, which may be null, and its gradient
  const void* weight;
  void* dweight;
  // Of the CPU's kernels, per channel, in the compute type and readable for a vector beyond its end, as mean and bias
  // are then: dx = scale * dz, in training + offset + slope * (x - mean). On CUDA 2 * C numbers are `terms`.
  const void *scale, *offset, *slope;
  int64_t planes = 1;  // on CPU: channels of an image where each of them is an image of its own
  // Rows of a number for each channel, to be added up: in the statistics the means of parts of x, and then the sums of
  // squared differences from them; in backward the sums of dz, and then of dz * (x - mean). On CUDA memory for such.
  double* sums;
  int64_t sum_rows;

  // Without a pool a unit is a piece of x: a plane in NCHW, some pixels in channels_last.
  int64_t piece_pixels() const {
    const int64_t pixels = (1 << 16) / std::max<int64_t>(1, shape.C);
    return shape.channels_last ? std::max<int64_t>(1, std::min(pixels, shape.N * shape.pixels())) : shape.pixels();
  }
  int64_t pieces() const {
    if (!shape.channels_last) return shape.N * shape.C;
    return (shape.N * shape.pixels() + piece_pixels() - 1) / piece_pixels();
  }
  // What there are partial sums of, and how many pixels each has.
  int64_t parts() const { return shape.channels_last ? pieces() : shape.N; }
  int64_t part_pixels(int64_t part) const {
    const int64_t all = shape.N * shape.pixels();
    return std::min(piece_pixels(), all - part * piece_pixels());
  }
};

}  // namespace fastcnn
