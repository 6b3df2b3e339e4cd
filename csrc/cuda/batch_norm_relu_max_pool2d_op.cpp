#include "../batch_norm_relu_max_pool2d_op.h"

#include "run.h"

namespace fastcnn::cuda {

using BatchNormOp = void (*)(const BatchNormTask&, Stream);

// With memory for what is added up; `out` is any tensor of the device.
template <BatchNormOp op>
static void run_with_sums(BatchNormTask& task, const Tensor& out) {
  using torch::headeronly::ScalarType;
  const OnDevice on(out);
  const auto wide = task.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
  const Tensor sums = torch::stable::new_empty(out, {batch_norm_sums(task)}, ScalarType::Double);
  const Tensor terms = torch::stable::new_empty(out, {2 * task.shape.C}, wide);
  task.sums = static_cast<double*>(sums.mutable_data_ptr()), task.terms = terms.mutable_data_ptr();
  op(task, on.stream());
}

static void forward(BatchNormTask& task, const Tensor& out) {
  batch_norm_relu_max_pool2d(task, OnDevice(out).stream());
}

FASTCNN_OP(fastcnn_cuda, CUDA, batch_norm_statistics, FASTCNN_BATCH_NORM_STATISTICS_OP,
           batch_norm_statistics_op<run_with_sums<batch_norm_statistics>>)
FASTCNN_OP(fastcnn_cuda, CUDA, batch_norm_relu_max_pool2d, FASTCNN_BATCH_NORM_RELU_MAX_POOL2D_OP,
           batch_norm_relu_max_pool2d_op<forward>)
FASTCNN_OP(fastcnn_cuda, CUDA, batch_norm_relu_max_pool2d_backward, FASTCNN_BATCH_NORM_RELU_MAX_POOL2D_BACKWARD_OP,
           batch_norm_relu_max_pool2d_backward_op<run_with_sums<batch_norm_relu_max_pool2d_backward>>)

}  // namespace fastcnn::cuda
