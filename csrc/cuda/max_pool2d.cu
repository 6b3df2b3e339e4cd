// Max pooling and its gradient; both also take the tail's bias and ReLU. Memory: forward reads x once and writes the
// pooled map and, if asked, its argmax; backward reads dy and argmax (and x, where there is a ReLU) and writes dx.
#include "max_pool2d.h"

#include "dispatch.cuh"
#include "fast/max_pool2d.cuh"
#include "general/pool.cuh"

namespace fastcnn::cuda {

void max_pool2d(const TailTask& task, Stream stream) {
  if (empty(task)) return;
  if (fast::takes(task)) return fast::launch_pool("max_pool2d", task, stream);
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    general::launch_pool<decltype(t), channels_last, false>("max_pool2d", task, stream);
  });
}

void max_pool2d_backward(const TailTask& task, Stream stream) {
  if (empty(task)) return;
  if (fast::takes(task)) return fast::launch_pool_backward("max_pool2d_backward", task, stream);
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    general::launch_backward<decltype(t), channels_last, false, true>("max_pool2d_backward", task, stream);
  });
}

}  // namespace fastcnn::cuda
