#pragma once

#include <cstdint>

namespace fastcnn {

// The hash of each piece of memory; together they tell whether it changed. A unit is a piece.
struct FingerprintTask {
  const void* x;
  int64_t bytes;
  uint64_t* out;
};

}  // namespace fastcnn
