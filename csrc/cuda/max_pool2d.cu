// Max pooling and its gradient, which gathers; both also take the tail's bias and ReLU. Memory: forward reads x once
// and writes the pooled map and, if asked, its argmax; backward reads dy and argmax (and x, where there is a ReLU) and
// writes dx.
#include "max_pool2d.h"

#include "fast/pool.cuh"
#include "pool.cuh"

namespace fastcnn::cuda {

void max_pool2d(const TailTask& task, Stream stream) {
  if (empty(task)) return;
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    using T = decltype(t);
    constexpr auto name = "max_pool2d";
    if constexpr (!std::is_same_v<T, double>) {
      if (fast::takes<T>(task)) {
        return fast::rectified(task) ? fast::launch_pool<T, true>(name, task, stream) : fast::launch_pool<T, false>(name, task, stream);
      }
    }
    launch_pool<T, channels_last, Norm::none>(name, task, stream);
  });
}

void max_pool2d_backward(const TailTask& task, Stream stream) {
  if (empty(task)) return;
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    using T = decltype(t);
    constexpr auto name = "max_pool2d_backward";
    if constexpr (!std::is_same_v<T, double>) {
      if (fast::takes<T>(task)) {
        return fast::rectified(task) ? fast::launch_pool_backward<T, fast::Beta::none, true>(name, task, stream)
                         : fast::launch_pool_backward<T, fast::Beta::none, false>(name, task, stream);
      }
    }
    launch_backward<T, channels_last, Norm::none, true>(name, task, stream);
  });
}

}  // namespace fastcnn::cuda
