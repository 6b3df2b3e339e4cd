#include "run.h"

namespace fastcnn::cuda {

static void conv2d_relu_op(Tensor x, Tensor rows, std::optional<Tensor> bias, Tensor out, bool channels_last,
                           Ints kernel, Ints stride, Ints padding, Ints dilation, int64_t groups) {
  const auto axis = [&](int i) {
    const ConvAxis a{kernel[i], stride[i], padding[i], dilation[i], x.size(2 + i), out.size(2 + i)};
    const int64_t span = a.size + 2 * a.padding - a.dilation * (a.kernel - 1) - 1;
    STD_TORCH_CHECK(span / a.stride + 1 == a.out, "out is of the wrong size");
    return a;
  };
  const int64_t outputs = rows.size(0), row = rows.size(1), channels = x.size(1) / groups;
  ConvTask task{};
  task.dtype = dtype_of(x);
  task.shape = {x.size(0), x.size(1), x.size(2), x.size(3), channels_last};
  task.h = axis(0), task.w = axis(1), task.groups = groups, task.outputs = outputs, task.row = row;
  expect("rows", rows, task.dtype, outputs * row);
  STD_TORCH_CHECK(row % 8 == 0 && row >= kernel[0] * kernel[1] * channels,
                  "rows must hold the windows, and zeros to a multiple of 8");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0, "rows must be aligned to 16 bytes");
  if (bias) expect("bias", *bias, task.dtype, outputs);
  expect("out", out, task.dtype, x.size(0) * outputs * out.size(2) * out.size(3));
  task.x = x.const_data_ptr(), task.weight = rows.const_data_ptr(), task.bias = data_or_null(bias);
  task.out = out.mutable_data_ptr();
  conv2d_relu(task, OnDevice(x).stream());
}

// rows: for each output its weights in the order kh, kw, c, and zeros to a multiple of 8.
FASTCNN_OP(fastcnn_cuda, CUDA, conv2d_relu,
           "(Tensor input, Tensor rows, Tensor? bias, Tensor(a!) out, bool channels_last, int[] kernel_size, "
           "int[] stride, int[] padding, int[] dilation, int groups) -> ()",
           conv2d_relu_op)

}  // namespace fastcnn::cuda
