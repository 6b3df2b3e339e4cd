// Batch norm, ReLU and max pooling, max_pool2d(relu((x - mean) * scale + bias)), and its gradient.
// Memory: in training forward reads x twice, for the statistics first, and writes the pooled map and its argmax;
// backward reads x, dy and argmax twice, for the sums first, and writes dx. In evaluation there are no statistics, and
// without weight and bias no sums.
#include "dispatch.cuh"
#include "general/batch_norm_relu_max_pool2d.cuh"
#include "operators.h"

namespace fastcnn::cuda {

void batch_norm_statistics(const BatchNormTask& task, Stream stream) {
  if (!task.shape.C) return;
  with_dtype_and_format(
      task, [&](auto t, auto channels_last) { general::launch_statistics<decltype(t), channels_last>(task, stream); });
}

void batch_norm_relu_max_pool2d(const BatchNormTask& task, Stream stream) {
  constexpr auto name = "batch_norm_relu_max_pool2d";
  if (empty(task)) return;
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    if (task.pool) general::launch_norm<decltype(t), channels_last, true>(name, task, stream);
    else general::launch_norm<decltype(t), channels_last, false>(name, task, stream);
  });
}

void batch_norm_relu_max_pool2d_backward(const BatchNormTask& task, Stream stream) {
  constexpr auto name = "batch_norm_relu_max_pool2d_backward";
  if (!task.shape.C) return;
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    if (task.pool) general::launch_norm_backward<decltype(t), channels_last, true>(name, task, stream);
    else general::launch_norm_backward<decltype(t), channels_last, false>(name, task, stream);
  });
}

// Of the larger kind.
int64_t batch_norm_sums(const BatchNormTask& task) {
  int64_t rows = 0;
  if (empty(task)) return rows;
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    general::Arguments a = general::arguments(task, general::kRun<decltype(t)>);
    rows = general::share_out(a, channels_last, a.pixels, 0, general::kSumWaves).grid.x;
  });
  return rows * task.shape.C * static_cast<int64_t>(sizeof(general::Moments) / sizeof(double));
}

}  // namespace fastcnn::cuda
