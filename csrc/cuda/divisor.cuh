#pragma once

#include "simt.cuh"

namespace fastcnn::cuda {

// Division of numbers below 2^31 by one that is known on the host: a product, a sum and a shift.
struct Divisor {
  unsigned by = 1, factor = 1, shift = 0;

  Divisor() = default;
  explicit Divisor(unsigned by) : by(by), shift(std::bit_width(by - 1)) {
    factor = static_cast<unsigned>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }
  FASTCNN_DEVICE int divide(int n) const { return (__umulhi(n, factor) + static_cast<unsigned>(n)) >> shift; }
};

}  // namespace fastcnn::cuda
