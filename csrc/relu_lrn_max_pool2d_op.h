// The private ops relu_lrn_max_pool2d and relu_lrn_max_pool2d_backward of both libraries.
#pragma once

#include "arguments.h"

namespace fastcnn {

#define FASTCNN_RELU_LRN_MAX_POOL2D_OP                                                                           \
  "(Tensor input, Tensor? bias, Tensor(a!) out, Tensor(b!)? argmax, bool channels_last, bool relu, " FASTCNN_LRN \
  ", " FASTCNN_POOL ") -> ()"
template <RunTask run>
void relu_lrn_max_pool2d_op(Tensor x, std::optional<Tensor> bias, Tensor out, std::optional<Tensor> argmax,
                            bool channels_last, bool relu, FASTCNN_LRN_ARGUMENTS, FASTCNN_POOL_ARGUMENTS) {
  TailTask task = map_task(x, channels_last, kernel, stride, padding, dilation, ceil_mode);
  task.relu = relu, task.lrn = {size, alpha, beta, k, groups};
  run_forward(run, task, x, bias, out, argmax);
}

#define FASTCNN_RELU_LRN_MAX_POOL2D_BACKWARD_OP                                                                       \
  "(Tensor grad, Tensor input, Tensor? bias, Tensor? argmax, Tensor(a!) out, Tensor(b!)? dbias, bool channels_last, " \
  "bool relu, " FASTCNN_LRN ", " FASTCNN_POOL ") -> ()"
template <RunTask run>
void relu_lrn_max_pool2d_backward_op(Tensor dy, Tensor x, std::optional<Tensor> bias, std::optional<Tensor> argmax,
                                     Tensor dx, std::optional<Tensor> dbias, bool channels_last, bool relu,
                                     FASTCNN_LRN_ARGUMENTS, FASTCNN_POOL_ARGUMENTS) {
  TailTask task = map_task(x, channels_last, kernel, stride, padding, dilation, ceil_mode);
  task.relu = relu, task.lrn = {size, alpha, beta, k, groups};
  run_backward(run, task, dy, x, bias, argmax, dx, dbias);
}

}  // namespace fastcnn
