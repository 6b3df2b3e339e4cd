// The private ops max_pool2d and max_pool2d_backward of both libraries.
#pragma once

#include "arguments.h"

namespace fastcnn {

#define FASTCNN_MAX_POOL2D_OP \
  "(Tensor input, Tensor(a!) out, Tensor(b!)? argmax, bool channels_last, " FASTCNN_POOL ") -> ()"
template <RunTask run>
void max_pool2d_op(Tensor x, Tensor out, std::optional<Tensor> argmax, bool channels_last, FASTCNN_POOL_ARGUMENTS) {
  TailTask task = map_task(x, channels_last, kernel, stride, padding, dilation, ceil_mode);
  run_forward(run, task, x, {}, out, argmax);
}

#define FASTCNN_MAX_POOL2D_BACKWARD_OP \
  "(Tensor grad, Tensor argmax, Tensor(a!) out, bool channels_last, " FASTCNN_POOL ") -> ()"
template <RunTask run>
void max_pool2d_backward_op(Tensor dy, Tensor argmax, Tensor dx, bool channels_last, FASTCNN_POOL_ARGUMENTS) {
  TailTask task = map_task(dx, channels_last, kernel, stride, padding, dilation, ceil_mode);
  run_backward(run, task, dy, {}, {}, argmax, dx, {});
}

}  // namespace fastcnn
