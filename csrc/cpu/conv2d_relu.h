#pragma once

#include "../tensor.h"

namespace fastcnn {

// Elements in the order of memory, one bit each: whether ReLU passes the gradient. A unit is some of them.
struct MaskTask {
  DType dtype;
  int64_t count;
  const void* x;  // y in forward, dy in backward
  uint8_t* mask;
  void* out;  // backward only
};

}  // namespace fastcnn
