// Max pooling and its gradient; both also take the tail's bias and ReLU. Memory: forward reads x once and writes the
// pooled map and, if asked, its argmax; backward reads dy and argmax (and x, where there is a ReLU) and writes dx.
#include "dispatch.cuh"
#include "fast/launch.cuh"
#include "fast/max_pool2d.cuh"
#include "general/pool.cuh"
#include "operators.h"

namespace fastcnn::cuda {
namespace fast {
namespace {

template <typename T, int K, bool rectified>
void launch_pool_planes(const char* name, Arguments& a, Stream stream) {
  const auto with_outputs = [&](auto outputs) {
    const int strips = (a.OH + outputs - 1) / outputs;
    a.by_rows = Divisor(strips);
    a.units = a.C * strips * a.OW;
    const dim3 grid = folded_grid((a.units + kThreads - 1) / kThreads, a.N);
    if (2 * (a.OH - 1) + K <= a.H && 2 * (a.OW - 1) + K <= a.W) {
      launch<&pool_planes<T, K, outputs, rectified, false>>(name, grid, dim3(kThreads), 0, stream, a);
    } else {
      launch<&pool_planes<T, K, outputs, rectified, true>>(name, grid, dim3(kThreads), 0, stream, a);
    }
  };
  // The lanes of small maps are further apart the more outputs a thread has.
  if (a.OH % 3 == 0 && a.OW >= 16) with_outputs(std::integral_constant<int, 3>());
  else with_outputs(std::integral_constant<int, 2>());
}

void launch_pool(const char* name, const TailTask& task, Stream stream) {
  with_dtype_and_format(task, [&](auto t, auto channels_last, auto) {
    using T = decltype(t);
    with_window(task, [&](auto K) {
      with_rectified(task, [&](auto rectified) {
        Arguments a = arguments(task);
        a.by_columns = Divisor(a.OW), a.by_rows = Divisor(a.OH);
        if constexpr (channels_last) {
          const Launch shape = share_out_units(a, true, int64_t{a.N} * a.OH * a.OW);
          launch<&pool_vectors<T, K, rectified>>(name, shape.grid, shape.block, 0, stream, a);
        } else {
          launch_pool_planes<T, K, rectified>(name, a, stream);
        }
      });
    });
  });
}

void launch_pool_backward(const char* name, const TailTask& task, Stream stream) {
  with_dtype_and_format(task, [&](auto t, auto channels_last, auto length) {
    with_window(task, [&](auto K) {
      with_rectified(task, [&](auto rectified) {
        Arguments a = arguments(task);
        const Launch shape = share_out_blocks(a, task);
        launch<&pool_backward<decltype(t), channels_last, length, K, Beta::none, rectified>>(
            name, shape.grid, shape.block, bytes_of_sums(a, length), stream, a);
      });
    });
  });
}

}  // namespace
}  // namespace fast

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
