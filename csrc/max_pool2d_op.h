// The private ops max_pool2d and max_pool2d_backward of both libraries, which give them a RunTask each.
#pragma once

#include "arguments.h"

namespace fastcnn {

template <RunTask run>
void max_pool2d_op(Tensor x, Tensor out, std::optional<Tensor> argmax, bool channels_last, Ints kernel, Ints stride,
                   Ints padding, Ints dilation, bool ceil_mode) {
  TailTask task = map_task(x, channels_last, kernel, stride, padding, dilation, ceil_mode);
  run_forward(run, task, x, {}, out, argmax);
}

template <RunTask run>
void max_pool2d_backward_op(Tensor dy, Tensor argmax, Tensor dx, bool channels_last, Ints kernel, Ints stride,
                            Ints padding, Ints dilation, bool ceil_mode) {
  TailTask task = map_task(dx, channels_last, kernel, stride, padding, dilation, ceil_mode);
  run_backward(run, task, dy, {}, {}, argmax, dx, {});
}

void define_max_pool2d(auto& m) {
  m.def("max_pool2d(Tensor input, Tensor(a!) out, Tensor(b!)? argmax, bool channels_last, " FASTCNN_POOL ") -> ()");
  m.def("max_pool2d_backward(Tensor grad, Tensor argmax, Tensor(a!) out, bool channels_last, " FASTCNN_POOL ") -> ()");
}

template <RunTask forward, RunTask backward>
void implement_max_pool2d(auto& m) {
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d_op<forward>));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward_op<backward>));
}

}  // namespace fastcnn
