// What the kernels for the usual layers get: LRN over five channels with beta 3/4 or 1/2, pools of 3 x 3 or 2 x 2
// windows at stride 2 without padding, and images of fewer than 2^30 elements. All others take the general kernels.
#pragma once

#include <cmath>
#include <optional>

#include "../../relu_lrn_max_pool2d.h"
#include "../divisor.cuh"
#include "../pack.cuh"

namespace fastcnn::cuda::fast {

enum class Beta { none, half, three_quarters };  // of LRN, if there is one

template <typename T>
inline constexpr int kVector = 16 / sizeof(T);  // channels

struct Arguments {
  const void *x, *bias, *dy;
  void *out, *argmax, *partials;
  int64_t image, out_image;  // elements of an image, before and after
  int N, C, H, W, OH, OW;
  // relu(v) is max(v, lowest), and passes no gradient where v <= blocked.
  float lowest, blocked;
  // s / scale is start + sum(x^2), so that s^-beta is the power of that times factor; scale = alpha / size.
  float start, half_start, factor, twice_beta;
  // A run is the channels of a thread. In channels_last a block has lanes for several of them.
  int runs, runs_per_group, runs_per_block, pixels_per_block;
  int units;                                         // of all images: pixels, or what a thread has in their place
  int channels;                                      // that a thread goes through, in the tail's backward in NCHW
  Divisor by_pixels, by_columns, by_rows, by_group;  // of an image, of a row, of a column, of a group's runs
};

// Beta, if LRN's other parameters are such that no power leaves float's normal range.
inline std::optional<Beta> usual_beta(const LRN& lrn) {
  if (!lrn) return Beta::none;
  const double scale = lrn.alpha / static_cast<double>(lrn.size), start = lrn.k / scale;
  const bool normal = scale >= 1e-9 && scale <= 1e9 && start >= 1e-12 && start <= 1e12;
  if (lrn.size != 5 || !normal) return {};
  if (lrn.beta == 0.75) return Beta::three_quarters;
  if (lrn.beta == 0.5) return Beta::half;
  return {};
}

// The kernel size, 2 or 3; 0 if the pool is not a usual one.
inline int usual_window(const MaxPool2d& pool) {
  const auto usual = [&](const PoolAxis& axis) {
    return axis.kernel == pool.h.kernel && axis.padding == 0 && axis.dilation == 1 &&
           (axis.stride == 2 || axis.out == 1);
  };
  return (pool.h.kernel == 2 || pool.h.kernel == 3) && usual(pool.h) && usual(pool.w) ? static_cast<int>(pool.h.kernel)
                                                                                      : 0;
}

}  // namespace fastcnn::cuda::fast
