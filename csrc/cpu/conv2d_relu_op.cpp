#include "../arguments.h"
#include "../conv2d_relu.h"
#include "parallel.h"

namespace fastcnn {

struct relu_mask;
struct relu_mask_backward;

static void relu_mask_op(Tensor y, Tensor mask) {
  expect_bytes("mask", mask, (y.numel() + 7) / 8, 1);
  uint8_t* const bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
  parallel<relu_mask>(MaskTask{dtype_of(y), y.numel(), y.const_data_ptr(), bits, nullptr}, y.numel(), Output(mask));
}

static void relu_mask_backward_op(Tensor dy, Tensor mask, Tensor dx) {
  expect_bytes("mask", mask, (dy.numel() + 7) / 8, 1);
  expect("out", dx, dtype_of(dy), dy.numel());
  const MaskTask task{dtype_of(dy), dy.numel(), dy.const_data_ptr(), data_or_null<uint8_t>(mask),
                      dx.mutable_data_ptr()};
  parallel<relu_mask_backward>(task, task.count, Output(dx));
}

FASTCNN_OP(fastcnn_cpu, CPU, relu_mask, "(Tensor output, Tensor(a!) mask) -> ()", relu_mask_op)
FASTCNN_OP(fastcnn_cpu, CPU, relu_mask_backward, "(Tensor grad, Tensor mask, Tensor(a!) out) -> ()",
           relu_mask_backward_op)

}  // namespace fastcnn
