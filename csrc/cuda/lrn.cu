// Local response normalization: s = k + alpha/size * sum(x^2), y = x * s^-beta, and its gradient.
// Memory: forward reads x and writes y once; backward reads x and dy and writes dx.
#include "lrn.h"

#include "elementwise.cuh"

namespace fastcnn::cuda {

void lrn(const TailTask& task, Stream stream) {
  if (empty(task)) return;
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    using T = decltype(t);
    with_norm<T>(task, [&](auto norm) { launch_forward<T, channels_last, norm>("lrn", task, stream); });
  });
}

int64_t lrn_terms(const TailTask& task) {
  if (empty(task) || !task.lrn) return 0;
  int64_t elements = 0;
  with_dtype_and_format(task, [&](auto t, auto) {
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
    with_norm<T>(task, [&](auto norm) {
      launch_backward<T, channels_last, norm, false>("lrn_backward", task, stream);
    });
  });
}

}  // namespace fastcnn::cuda
