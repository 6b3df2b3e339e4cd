#include "../arguments.h"
#include "direct_convolution.h"
#include "parallel.h"

namespace fastcnn {

struct direct_convolution;

static void direct_convolution_op(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> addend,
                                  Tensor out, int64_t first, int64_t outputs, Ints kernel, Ints stride, Ints padding,
                                  Ints dilation, int64_t groups, bool relu) {
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2 && groups > 0,
                  "sizes must be pairs, and groups positive");
  DirectConvolutionTask task{};
  task.shape = {x.size(0), x.size(1), x.size(2), x.size(3), true};
  task.out_h = out.size(2), task.out_w = out.size(3), task.outputs = outputs, task.groups = groups, task.relu = relu;
  for (int i = 0; i < 2; ++i) {
    task.kernel[i] = kernel[i], task.stride[i] = stride[i];
    task.padding[i] = padding[i], task.dilation[i] = dilation[i];
    STD_TORCH_CHECK(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0, "sizes must be positive");
    const int64_t room = x.size(2 + i) + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    const int64_t size = room < 0 ? 0 : room / stride[i] + 1;
    STD_TORCH_CHECK(out.size(2 + i) == size, "out must have the size of the convolution, ", size);
  }
  const int64_t pixels = x.size(0) * task.out_h * task.out_w, channels = out.size(1);
  STD_TORCH_CHECK(outputs >= 0 && x.size(1) % groups == 0 && outputs % groups == 0,
                  "channels must be a multiple of groups");
  STD_TORCH_CHECK(first >= 0 && first + outputs <= channels, "out has ", channels, " channels, too few");
  expect("input", x, DType::float32, x.numel());
  expect("weight", weight, DType::float32, kernel[0] * kernel[1] * x.size(1) * task.padded_outputs());
  expect("out", out, DType::float32, pixels * channels);
  if (bias) expect("bias", *bias, DType::float32, outputs);
  if (addend) expect("addend", *addend, DType::float32, pixels * outputs);
  task.x = static_cast<const float*>(x.const_data_ptr());
  task.weight = static_cast<const float*>(weight.const_data_ptr());
  task.bias = data_or_null<const float>(bias), task.addend = data_or_null<const float>(addend);
  task.out = static_cast<float*>(out.mutable_data_ptr()) + first;
  task.out_stride = channels, task.addend_stride = outputs;
  const bool is_pointwise = kernel[0] * kernel[1] * stride[0] * stride[1] == 1 && padding[0] == 0 && padding[1] == 0;
  if (is_pointwise) {  // pixels have no neighbours: a row of all of them
    task.shape.N = task.shape.H = task.out_h = 1;
    task.shape.W = task.out_w = pixels;
  }
  constexpr int64_t kProducts = 8;  // that take as long as another kernel's element
  const int64_t products = pixels * task.padded_outputs() * kernel[0] * kernel[1] * x.size(1);
  parallel<direct_convolution>(task, products / kProducts);
}

FASTCNN_OP(fastcnn_cpu, CPU, direct_convolution,
           "(Tensor input, Tensor weight, Tensor? bias, Tensor? addend, Tensor(a!) out, int first, int outputs, "
           "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, bool relu) -> ()",
           direct_convolution_op)

}  // namespace fastcnn
