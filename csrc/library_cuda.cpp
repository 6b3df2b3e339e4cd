// The private ops fastcnn_cuda::*, on the LibTorch stable ABI; of those that fastcnn_cpu::* has, the signatures are the
// same.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "arguments.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace fastcnn {
namespace {

using cuda::Task;

// Makes the tensor's device the current one, of torch and of our own CUDA runtime, and finds torch's current stream
// there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    cuda::use_device(t.get_device_index());
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

Task lrn_task(const Tensor& x, bool channels_last, const LRN& lrn) {
  const auto sizes = x.sizes();
  int64_t pixels = 1;
  for (size_t i = 2; i < sizes.size(); ++i) pixels *= sizes[i];
  Task task{};
  task.dtype = dtype_of(x);
  task.shape = {sizes[0], sizes[1], 1, pixels, channels_last};
  task.lrn = lrn;
  return task;
}

// Of a map that is pooled, or not.
Task map_task(const Tensor& map, bool channels_last, const MaxPool2d& pool) {
  Task task{};
  task.dtype = dtype_of(map);
  task.shape = {map.size(0), map.size(1), map.size(2), map.size(3), channels_last};
  task.pool = pool;
  return task;
}

int64_t out_elements(const Task& task) {
  return task.pool ? task.shape.N * task.shape.C * task.pool.h.out * task.pool.w.out
                   : task.shape.N * task.shape.image_stride();
}

using Op = void (*)(const Task&, cuda::Stream);

void run(Op op, Task& task, const Tensor& x, const std::optional<Tensor>& bias, const Tensor& out,
         const std::optional<Tensor>& argmax) {
  if (bias) expect("bias", *bias, wide(task.dtype), task.shape.C);
  expect("out", out, task.dtype, out_elements(task));
  if (argmax) expect_bytes("argmax", *argmax, out_elements(task), task.pool.wide_argmax() ? 4 : 1);
  task.x = x.const_data_ptr();
  task.bias = bias ? bias->const_data_ptr() : nullptr;
  task.out = out.mutable_data_ptr();
  task.argmax = argmax ? argmax->mutable_data_ptr() : nullptr;
  op(task, OnDevice(x).stream());
}

void run_backward(Op op, Task& task, const Tensor& dy, const Tensor* x, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& argmax, const Tensor& dx, const std::optional<Tensor>& dbias) {
  if (bias) expect("bias", *bias, wide(task.dtype), task.shape.C);
  expect("grad", dy, task.dtype, out_elements(task));
  expect("out", dx, task.dtype, task.shape.N * task.shape.image_stride());
  STD_TORCH_CHECK(argmax || !task.pool, "argmax must be given for a pool");
  if (argmax) expect_bytes("argmax", *argmax, out_elements(task), task.pool.wide_argmax() ? 4 : 1);
  if (dbias) expect("the bias gradient", *dbias, wide(task.dtype), task.shape.C);
  const OnDevice on(dy);
  task.dy = dy.const_data_ptr();
  task.x = x ? x->const_data_ptr() : nullptr;
  task.bias = bias ? bias->const_data_ptr() : nullptr;
  task.argmax = argmax ? const_cast<void*>(argmax->const_data_ptr()) : nullptr;
  task.out = dx.mutable_data_ptr();
  std::optional<Tensor> partials;
  if (dbias) {
    task.dbias = dbias->mutable_data_ptr();
    partials = torch::stable::new_empty(*dbias, {cuda::bias_partials(task) * task.shape.C});
    task.partials = partials->mutable_data_ptr();
  }
  std::optional<Tensor> terms;
  if (const int64_t elements = cuda::lrn_terms(task)) {
    const bool is_double = task.dtype == DType::float64;
    const auto wide_dtype = is_double ? torch::headeronly::ScalarType::Double : torch::headeronly::ScalarType::Float;
    terms = torch::stable::new_empty(dy, {elements}, wide_dtype);
    task.terms = terms->mutable_data_ptr();
  }
  op(task, on.stream());
}

void lrn(Tensor x, Tensor out, bool channels_last, int64_t size, double alpha, double beta, double k, int64_t groups) {
  Task task = lrn_task(x, channels_last, {size, alpha, beta, k, groups});
  run(cuda::lrn, task, x, {}, out, {});
}

void lrn_backward(Tensor dy, Tensor x, Tensor dx, bool channels_last, int64_t size, double alpha, double beta, double k,
                  int64_t groups) {
  Task task = lrn_task(x, channels_last, {size, alpha, beta, k, groups});
  run_backward(cuda::lrn_backward, task, dy, &x, {}, {}, dx, {});
}

void max_pool2d(Tensor x, Tensor out, std::optional<Tensor> argmax, bool channels_last, Ints kernel, Ints stride,
                Ints padding, Ints dilation, bool ceil_mode) {
  Task task = map_task(x, channels_last, pool_of(x, kernel, stride, padding, dilation, ceil_mode));
  run(cuda::max_pool2d, task, x, {}, out, argmax);
}

void max_pool2d_backward(Tensor dy, Tensor argmax, Tensor dx, bool channels_last, Ints kernel, Ints stride,
                         Ints padding, Ints dilation, bool ceil_mode) {
  Task task = map_task(dx, channels_last, pool_of(dx, kernel, stride, padding, dilation, ceil_mode));
  run_backward(cuda::max_pool2d_backward, task, dy, nullptr, {}, argmax, dx, {});
}

void relu_lrn_max_pool2d(Tensor x, std::optional<Tensor> bias, Tensor out, std::optional<Tensor> argmax,
                         bool channels_last, bool relu, int64_t size, double alpha, double beta, double k,
                         int64_t groups, Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode) {
  Task task = map_task(x, channels_last, pool_of(x, kernel, stride, padding, dilation, ceil_mode));
  task.relu = relu;
  task.lrn = {size, alpha, beta, k, groups};
  run(cuda::relu_lrn_max_pool2d, task, x, bias, out, argmax);
}

void relu_lrn_max_pool2d_backward(Tensor dy, Tensor x, std::optional<Tensor> bias, std::optional<Tensor> argmax,
                                  Tensor dx, std::optional<Tensor> dbias, bool channels_last, bool relu, int64_t size,
                                  double alpha, double beta, double k, int64_t groups, Ints kernel, Ints stride,
                                  Ints padding, Ints dilation, bool ceil_mode) {
  Task task = map_task(x, channels_last, pool_of(x, kernel, stride, padding, dilation, ceil_mode));
  task.relu = relu;
  task.lrn = {size, alpha, beta, k, groups};
  run_backward(cuda::relu_lrn_max_pool2d_backward, task, dy, &x, bias, argmax, dx, dbias);
}

void conv2d_relu(Tensor x, Tensor rows, std::optional<Tensor> bias, Tensor out, bool channels_last, Ints kernel,
                 Ints stride, Ints padding, Ints dilation, int64_t groups) {
  const auto axis = [&](int i) {
    return ConvAxis{kernel[i], stride[i], padding[i], dilation[i], x.size(2 + i), out.size(2 + i)};
  };
  const int64_t outputs = rows.size(0), row = rows.size(1), channels = x.size(1) / groups;
  cuda::ConvTask task{};
  task.dtype = dtype_of(x);
  task.shape = {x.size(0), x.size(1), x.size(2), x.size(3), channels_last};
  task.conv = {axis(0), axis(1), groups, outputs};
  task.row = row;
  expect("rows", rows, task.dtype, outputs * row);
  STD_TORCH_CHECK(row % 8 == 0 && row >= kernel[0] * kernel[1] * channels,
                  "rows must hold the windows, and zeros to a multiple of 8");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0, "rows must be aligned to 16 bytes");
  if (bias) expect("bias", *bias, task.dtype, outputs);
  for (int i = 0; i < 2; ++i) {
    const ConvAxis a = axis(i);
    const int64_t span = a.size + 2 * a.padding - a.dilation * (a.kernel - 1) - 1;
    STD_TORCH_CHECK(span / a.stride + 1 == a.out, "out is of the wrong size");
  }
  expect("out", out, task.dtype, x.size(0) * outputs * out.size(2) * out.size(3));
  task.x = x.const_data_ptr();
  task.weight = rows.const_data_ptr();
  task.bias = bias ? bias->const_data_ptr() : nullptr;
  task.out = out.mutable_data_ptr();
  cuda::conv2d_relu(task, OnDevice(x).stream());
}

STABLE_TORCH_LIBRARY(fastcnn_cuda, m) {
  m.def("lrn(Tensor input, Tensor(a!) out, bool channels_last, " FASTCNN_LRN ") -> ()");
  m.def("lrn_backward(Tensor grad, Tensor input, Tensor(a!) out, bool channels_last, " FASTCNN_LRN ") -> ()");
  m.def("max_pool2d(Tensor input, Tensor(a!) out, Tensor(b!)? argmax, bool channels_last, " FASTCNN_POOL ") -> ()");
  m.def("max_pool2d_backward(Tensor grad, Tensor argmax, Tensor(a!) out, bool channels_last, " FASTCNN_POOL ") -> ()");
  m.def("relu_lrn_max_pool2d(Tensor input, Tensor? bias, Tensor(a!) out, Tensor(b!)? argmax, bool channels_last, "
        "bool relu, " FASTCNN_LRN ", " FASTCNN_POOL ") -> ()");
  m.def("relu_lrn_max_pool2d_backward(Tensor grad, Tensor input, Tensor? bias, Tensor? argmax, Tensor(a!) out, "
        "Tensor(b!)? dbias, bool channels_last, bool relu, " FASTCNN_LRN ", " FASTCNN_POOL ") -> ()");
  // rows: of each output its weights in the order kh, kw, c, and zeros to a multiple of 8.
  m.def("conv2d_relu(Tensor input, Tensor rows, Tensor? bias, Tensor(a!) out, bool channels_last, int[] kernel_size, "
        "int[] stride, int[] padding, int[] dilation, int groups) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastcnn_cuda, CUDA, m) {
  m.impl("lrn", TORCH_BOX(&lrn));
  m.impl("lrn_backward", TORCH_BOX(&lrn_backward));
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
  m.impl("relu_lrn_max_pool2d", TORCH_BOX(&relu_lrn_max_pool2d));
  m.impl("relu_lrn_max_pool2d_backward", TORCH_BOX(&relu_lrn_max_pool2d_backward));
  m.impl("conv2d_relu", TORCH_BOX(&conv2d_relu));
}

}  // namespace
}  // namespace fastcnn
