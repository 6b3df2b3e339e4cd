#include "../arguments.h"
#include "linear.h"
#include "parallel.h"

namespace fastcnn {

struct linear;

static void linear_op(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor out, bool relu, double factor) {
  LinearTask task{};
  task.dtype = dtype_of(x), task.vectors = x.size(0), task.in = x.size(1), task.outputs = weight.size(0);
  task.relu = relu, task.factor = factor, task.x = x.const_data_ptr(), task.weight = weight.const_data_ptr();
  task.bias = data_or_null(bias), task.out = out.mutable_data_ptr();
  STD_TORCH_CHECK(task.vectors >= 1 && task.vectors <= LinearTask::kVectors, "input must have 1 to ",
                  LinearTask::kVectors, " rows, but has ", task.vectors);
  expect("weight", weight, task.dtype, task.outputs * task.in);
  expect("out", out, task.dtype, task.vectors * task.outputs);
  if (bias) expect("bias", *bias, task.dtype, task.outputs);
  parallel<linear>(task, task.outputs * std::max<int64_t>(1, task.in));
}

FASTCNN_OP(fastcnn_cpu, CPU, linear,
           "(Tensor input, Tensor weight, Tensor? bias, Tensor(a!) out, bool relu, float factor) -> ()", linear_op)

}  // namespace fastcnn
