// Local response normalization: s = k + alpha/size * sum(x^2), y = x * s^-beta, and its gradient; both also take the
// tail's bias and ReLU. Memory: forward reads x and writes y once; backward reads x and dy and writes dx.
#include "dispatch.cuh"
#include "fast/launch.cuh"
#include "fast/lrn.cuh"
#include "general/elementwise.cuh"
#include "operators.h"

namespace fastcnn::cuda {
namespace fast {
namespace {

void launch_lrn(const char* name, const TailTask& task, Stream stream) {
  with_dtype_and_format(task, [&](auto t, auto channels_last, auto length) {
    with_beta(task, [&](auto beta) {
      with_rectified(task, [&](auto rectified) {
        Arguments a = arguments(task);
        const Launch shape = share_out_pixels(a, task);
        launch<&lrn<decltype(t), channels_last, length, beta, rectified>>(name, shape.grid, shape.block, 0, stream, a);
      });
    });
  });
}

void launch_lrn_backward(const char* name, const TailTask& task, Stream stream) {
  with_dtype_and_format(task, [&](auto t, auto channels_last, auto length) {
    with_beta(task, [&](auto beta) {
      with_rectified(task, [&](auto rectified) {
        Arguments a = arguments(task);
        const Launch shape = share_out_pixels(a, task);
        launch<&lrn_backward<decltype(t), channels_last, length, beta, rectified>>(name, shape.grid, shape.block,
                                                                                   bytes_of_sums(a, length), stream, a);
      });
    });
  });
}

}  // namespace
}  // namespace fast

void lrn(const TailTask& task, Stream stream) {
  if (empty(task)) return;
  if (fast::takes(task)) return fast::launch_lrn("lrn", task, stream);
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    general::launch_forward<decltype(t), channels_last, true>("lrn", task, stream);
  });
}

int64_t lrn_terms(const TailTask& task) { return task.lrn && !fast::takes(task) ? task.shape.elements() : 0; }

void lrn_backward(const TailTask& task, Stream stream) {
  if (empty(task)) return;
  if (fast::takes(task)) return fast::launch_lrn_backward("lrn_backward", task, stream);
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    general::launch_backward<decltype(t), channels_last, true, false>("lrn_backward", task, stream);
  });
}

}  // namespace fastcnn::cuda
