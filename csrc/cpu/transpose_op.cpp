#include "../arguments.h"
#include "parallel.h"
#include "transpose.h"

namespace fastcnn {

struct transpose;

// Input and out have the same sizes, each in one of the memory formats.
static void change_format_op(Tensor x, Tensor out, bool to_channels_last) {
  expect("input", x, DType::float32, x.numel());
  expect("out", out, DType::float32, x.numel());
  const int64_t channels = x.size(1), pixels = x.size(2) * x.size(3);
  TransposeTask task{x.size(0), channels, pixels, static_cast<const float*>(x.const_data_ptr()),
                     static_cast<float*>(out.mutable_data_ptr())};
  if (!to_channels_last) std::swap(task.rows, task.columns);
  parallel<transpose>(task, x.numel(), Output(out));
}

FASTCNN_OP(fastcnn_cpu, CPU, change_format, "(Tensor input, Tensor(a!) out, bool to_channels_last) -> ()",
           change_format_op)

}  // namespace fastcnn
