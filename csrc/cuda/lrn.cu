// Local response normalization: s = k + alpha/size * sum(x^2), y = x * s^-beta, and its gradient.
// Memory: forward reads x and writes y once; backward reads x and dy and writes dx.
#include "elementwise.cuh"

namespace fastcnn::cuda {

void lrn(const Task& task, Stream stream) {
  if (empty(task)) return;
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    using T = decltype(t);
    with_norm<T>(task, [&](auto norm) { launch_forward<T, channels_last, norm>("lrn", task, stream); });
  });
}

void lrn_backward(const Task& task, Stream stream) {
  if (empty(task)) return;
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    using T = decltype(t);
    with_norm<T>(task, [&](auto norm) {
      launch_backward<T, channels_last, norm, false>("lrn_backward", task, stream);
    });
  });
}

}  // namespace fastcnn::cuda
