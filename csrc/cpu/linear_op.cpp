#include "linear.h"

#include "../arguments.h"
#include "parallel.h"

namespace fastcnn {

struct linear;

static void linear_op(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor out, bool relu, double factor) {
  const LinearTask task{dtype_of(x), x.size(0), x.size(1), weight.size(0), relu, factor, x.const_data_ptr(),
                        weight.const_data_ptr(), data_or_null(bias), out.mutable_data_ptr()};
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
