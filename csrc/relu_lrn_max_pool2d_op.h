// The private ops relu_lrn_max_pool2d and relu_lrn_max_pool2d_backward of both libraries, which give them a RunTask each.
#pragma once

#include "arguments.h"

namespace fastcnn {

template <RunTask run>
void relu_lrn_max_pool2d_op(Tensor x, std::optional<Tensor> bias, Tensor out, std::optional<Tensor> argmax,
                            bool channels_last, bool relu, int64_t size, double alpha, double beta, double k,
                            int64_t groups, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode) {
  TailTask task = map_task(x, channels_last, kernel, stride, padding, dilation, ceil_mode);
  task.relu = relu, task.lrn = {size, alpha, beta, k, groups};
  run_forward(run, task, x, bias, out, argmax);
}

template <RunTask run>
void relu_lrn_max_pool2d_backward_op(Tensor dy, Tensor x, std::optional<Tensor> bias, std::optional<Tensor> argmax,
                                     Tensor dx, std::optional<Tensor> dbias, bool channels_last, bool relu,
                                     int64_t size, double alpha, double beta, double k, int64_t groups, Ints kernel,
                                     Ints stride, Ints padding, Ints dilation, bool ceil_mode) {
  TailTask task = map_task(x, channels_last, kernel, stride, padding, dilation, ceil_mode);
  task.relu = relu, task.lrn = {size, alpha, beta, k, groups};
  run_backward(run, task, dy, x, bias, argmax, dx, dbias);
}

void define_relu_lrn_max_pool2d(auto& m) {
  m.def("relu_lrn_max_pool2d(Tensor input, Tensor? bias, Tensor(a!) out, Tensor(b!)? argmax, bool channels_last, "
        "bool relu, " FASTCNN_LRN ", " FASTCNN_POOL ") -> ()");
  m.def("relu_lrn_max_pool2d_backward(Tensor grad, Tensor input, Tensor? bias, Tensor? argmax, Tensor(a!) out, "
        "Tensor(b!)? dbias, bool channels_last, bool relu, " FASTCNN_LRN ", " FASTCNN_POOL ") -> ()");
}

template <RunTask forward, RunTask backward>
void implement_relu_lrn_max_pool2d(auto& m) {
  m.impl("relu_lrn_max_pool2d", TORCH_BOX(&relu_lrn_max_pool2d_op<forward>));
  m.impl("relu_lrn_max_pool2d_backward", TORCH_BOX(&relu_lrn_max_pool2d_backward_op<backward>));
}

}  // namespace fastcnn
