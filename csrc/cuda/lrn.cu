// Local response normalization: s = k + alpha/size * sum(x^2), y = x * s^-beta, and its gradient.
// Memory: forward reads x and writes y once; backward reads x and dy and writes dx.
#include "lrn.h"

#include "elementwise.cuh"
#include "fast/launch.cuh"
#include "fast/lrn.cuh"

namespace fastcnn::cuda {

namespace {

template <typename T, bool rectified>
void launch_fast(const TailTask& task, bool backward, Stream stream) {
  fast::with_format<T>(task, [&](auto channels_last, auto length) {
    fast::Arguments a = fast::arguments<T>(task);
    const Launch shape = fast::share_out_pixels(a, task);
    fast::with_beta(task, [&](auto beta) {
      if (backward) {
        launch<&fast::lrn_backward<T, channels_last, length, beta, rectified>>("lrn_backward", shape.grid, shape.block,
                                                                              fast::shared_of_sums(a, length), stream, a);
      } else {
        launch<&fast::lrn<T, channels_last, length, beta, rectified>>("lrn", shape.grid, shape.block, 0, stream, a);
      }
    });
  });
}

template <typename T>
bool launch_fast(const TailTask& task, bool backward, Stream stream) {
  if constexpr (!std::is_same_v<T, double>) {
    if (fast::takes<T>(task)) {
      if (fast::rectified(task)) launch_fast<T, true>(task, backward, stream);
      else launch_fast<T, false>(task, backward, stream);
      return true;
    }
  }
  return false;
}

}  // namespace

void lrn(const TailTask& task, Stream stream) {
  if (empty(task)) return;
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    using T = decltype(t);
    if (launch_fast<T>(task, false, stream)) return;
    with_norm<T>(task, [&](auto norm) { launch_forward<T, channels_last, norm>("lrn", task, stream); });
  });
}

int64_t lrn_terms(const TailTask& task) {
  if (empty(task) || !task.lrn) return 0;
  int64_t elements = 0;
  with_dtype_and_format(task, [&](auto t, auto) {
    if constexpr (!std::is_same_v<decltype(t), double>) {
      if (fast::takes<decltype(t)>(task)) return;
    }
    with_norm<decltype(t)>(task, [&](auto norm) {
      if (norm == Norm::any) elements = task.shape.elements();
    });
  });
  return elements;
}

void lrn_backward(const TailTask& task, Stream stream) {
  if (empty(task)) return;
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    using T = decltype(t);
    if (launch_fast<T>(task, true, stream)) return;
    with_norm<T>(task, [&](auto norm) {
      launch_backward<T, channels_last, norm, false>("lrn_backward", task, stream);
    });
  });
}

}  // namespace fastcnn::cuda
