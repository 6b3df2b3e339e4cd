#pragma once

#include <atomic>

#include "../tensor.h"

namespace fastcnn {

// For 2x2 outputs.
inline int64_t winograd_products(int64_t window) { return window == 3 ? 16 : 49; }

// Of a convolution with windows of 3x3 or 5x5 in steps of 1, float32, channels_last; channels and outputs of a group
// are multiples of 16.
struct WinogradMaps {
  Shape shape;  // of x
  int64_t window, out_h, out_w, outputs, groups, padding[2];
  const float* x;
  std::atomic<uint32_t>* largest;  // gets the bits of the largest magnitude of the results; NaN is larger than inf
};

// The convolution. A unit is a few tiles of 2x2 outputs. Its largest magnitude is that before ReLU.
struct WinogradTask : WinogradMaps {
  bool relu, pool;                      // pool: the maximum of each whole tile
  const float *weight, *bias, *addend;  // weight: transformed; addend: as out, dense; bias, addend: may be null
  const uint8_t* x_mask;                // null, or a bit for each element of x: whether it counts
  float* out;
  int64_t out_stride;  // elements from pixel to pixel
  uint8_t* out_mask;   // null, or a bit for each element before pooling: whether ReLU passes the gradient
};

// Its weights, transformed: for each piece of the window, each group and each panel of its outputs, as many matrices of
// channels x outputs as the piece takes products. A unit is a channel of a panel, for one piece.
struct WinogradWeightTask {
  int64_t window, channels, outputs, groups;  // channels and outputs of one group
  const float* weight;
  float* out;
  int64_t stride[5];  // of the weight's groups, outputs, channels, rows and columns
};

// The gradients of its weight and bias, each as a number of terms to be summed up: those of so many equal parts of the
// tiles. A unit is a panel of outputs and one of channels, for one piece of the window, in one part.
struct WinogradGradientTask : WinogradMaps {
  int64_t parts;
  const float* dy;
  const uint8_t* dy_mask;  // null, or a bit for each element of dy: whether it counts
  float* dw;
  int64_t stride[5];  // of dw's parts, outputs, channels, rows and columns
  float* db;          // parts x outputs, or null
};

}  // namespace fastcnn
