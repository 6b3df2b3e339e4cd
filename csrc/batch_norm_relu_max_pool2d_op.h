// The private ops batch_norm_statistics, batch_norm_relu_max_pool2d and batch_norm_relu_max_pool2d_backward of both
// libraries.
#pragma once

#include "arguments.h"
#include "batch_norm_relu_max_pool2d.h"

namespace fastcnn {

using RunBatchNorm = void (*)(BatchNormTask& task, const Tensor& out);

inline BatchNormTask batch_norm_task(const Tensor& x, const Tensor& mean, const Tensor& var, const TailTask& tail) {
  BatchNormTask task{};
  static_cast<TailTask&>(task) = tail;
  expect("the mean", mean, wide(task.dtype), task.shape.C);
  expect("the variance", var, wide(task.dtype), task.shape.C);
  task.x = x.const_data_ptr();
  task.mean = const_cast<void*>(mean.const_data_ptr()), task.var = const_cast<void*>(var.const_data_ptr());
  return task;
}

#define FASTCNN_BATCH_NORM_STATISTICS_OP \
  "(Tensor input, Tensor(a!) mean, Tensor(b!) var, bool channels_last, bool relu_first) -> ()"
template <RunBatchNorm run>
void batch_norm_statistics_op(Tensor x, Tensor mean, Tensor var, bool channels_last, bool relu_first) {
  BatchNormTask task = batch_norm_task(x, mean, var, map_task(x, channels_last, {}, {}, {}, {}, false));
  task.relu_first = relu_first;
  run(task, mean);
}

#define FASTCNN_BATCH_NORM "bool training, float eps, bool relu, bool relu_first, " FASTCNN_POOL

#define FASTCNN_BATCH_NORM_RELU_MAX_POOL2D_OP                                                                       \
  "(Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor(a!) out, Tensor(b!)? argmax, bool " \
  "channels_last, " FASTCNN_BATCH_NORM ") -> ()"
template <RunBatchNorm run>
void batch_norm_relu_max_pool2d_op(Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                                   std::optional<Tensor> bias, Tensor out, std::optional<Tensor> argmax,
                                   bool channels_last, bool training, double eps, bool relu, bool relu_first,
                                   FASTCNN_POOL_ARGUMENTS) {
  BatchNormTask task =
      batch_norm_task(x, mean, var, map_task(x, channels_last, kernel, stride, padding, dilation, ceil_mode));
  const int64_t out_elements = task.out_shape().elements();
  if (weight) expect("the weight", *weight, wide(task.dtype), task.shape.C);
  if (bias) expect("the bias", *bias, wide(task.dtype), task.shape.C);
  expect("out", out, task.dtype, out_elements);
  if (argmax) expect_bytes("argmax", *argmax, out_elements, task.pool.wide_argmax() ? 4 : 1);
  task.training = training, task.eps = eps, task.relu = relu && !relu_first, task.relu_first = relu && relu_first;
  task.weight = data_or_null(weight), task.bias = data_or_null(bias);
  task.out = out.mutable_data_ptr(), task.argmax = data_or_null(argmax);
  run(task, out);
}

#define FASTCNN_BATCH_NORM_RELU_MAX_POOL2D_BACKWARD_OP                                                             \
  "(Tensor grad, Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? argmax, Tensor(a!) " \
  "out, Tensor(b!)? dweight, Tensor(c!)? dbias, bool channels_last, " FASTCNN_BATCH_NORM ") -> ()"
template <RunBatchNorm run>
void batch_norm_relu_max_pool2d_backward_op(Tensor dy, Tensor x, Tensor mean, Tensor var, std::optional<Tensor> weight,
                                            std::optional<Tensor> bias, std::optional<Tensor> argmax, Tensor dx,
                                            std::optional<Tensor> dweight, std::optional<Tensor> dbias,
                                            bool channels_last, bool training, double eps, bool relu, bool relu_first,
                                            FASTCNN_POOL_ARGUMENTS) {
  BatchNormTask task =
      batch_norm_task(x, mean, var, map_task(x, channels_last, kernel, stride, padding, dilation, ceil_mode));
  const int64_t out_elements = task.out_shape().elements();
  const std::optional<Tensor>* const per_channel[] = {&weight, &bias, &dweight, &dbias};
  for (const auto* t : per_channel) {
    if (*t) expect("what is per channel", **t, wide(task.dtype), task.shape.C);
  }
  expect("grad", dy, task.dtype, out_elements);
  expect("out", dx, task.dtype, task.shape.elements());
  STD_TORCH_CHECK(argmax || !task.pool, "argmax must be given for a pool");
  if (argmax) expect_bytes("argmax", *argmax, out_elements, task.pool.wide_argmax() ? 4 : 1);
  task.training = training, task.eps = eps, task.relu = relu && !relu_first, task.relu_first = relu && relu_first;
  task.weight = data_or_null(weight), task.bias = data_or_null(bias);
  task.dy = dy.const_data_ptr(), task.argmax = data_or_null(argmax), task.out = dx.mutable_data_ptr();
  task.dweight = data_or_null(dweight), task.dbias = data_or_null(dbias);
  run(task, dx);
}

}  // namespace fastcnn
