// Parameters of local response normalization: s = k + alpha/size * sum(x^2), y = x * s^-beta.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastcnn {

struct LRN {
  int64_t size = 0;  // 0: no normalization
  double alpha = 0, beta = 0, k = 0;
  int64_t groups = 1;

  explicit operator bool() const { return size > 0; }
  // The window of channel c is c - before ... c + after; what lies beyond the channels counts as zero.
  int64_t before(int64_t channels) const { return std::min(size / 2, channels); }
  int64_t after(int64_t channels) const { return std::min((size - 1) / 2, channels); }
};

}  // namespace fastcnn
