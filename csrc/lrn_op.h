// The private ops lrn and lrn_backward of both libraries.
#pragma once

#include "arguments.h"

namespace fastcnn {

inline TailTask lrn_task(const Tensor& x, bool channels_last, const LRN& lrn) {
  TailTask task{};
  task.dtype = dtype_of(x);
  task.shape = {x.size(0), x.size(1), 1, 1, channels_last};
  for (int64_t i = 2; i < x.dim(); ++i) task.shape.W *= x.size(i);
  task.lrn = lrn;
  return task;
}

#define FASTCNN_LRN_OP "(Tensor input, Tensor(a!) out, bool channels_last, " FASTCNN_LRN ") -> ()"
template <RunTask run>
void lrn_op(Tensor x, Tensor out, bool channels_last, FASTCNN_LRN_ARGUMENTS) {
  TailTask task = lrn_task(x, channels_last, {size, alpha, beta, k, groups});
  run_forward(run, task, x, {}, out, {});
}

#define FASTCNN_LRN_BACKWARD_OP "(Tensor grad, Tensor input, Tensor(a!) out, bool channels_last, " FASTCNN_LRN ") -> ()"
template <RunTask run>
void lrn_backward_op(Tensor dy, Tensor x, Tensor dx, bool channels_last, FASTCNN_LRN_ARGUMENTS) {
  TailTask task = lrn_task(x, channels_last, {size, alpha, beta, k, groups});
  run_backward(run, task, dy, x, {}, {}, dx, {});
}

}  // namespace fastcnn
