#pragma once

#include <cstdint>

namespace fastcnn {

// Matrices of float32, dense, one after the other: those of images in NCHW are channels x pixels, in channels_last
// pixels x channels. A unit is a panel of one of them.
struct TransposeTask {
  int64_t matrices, rows, columns;
  const float* x;
  float* out;
};

}  // namespace fastcnn
