#include "../arguments.h"
#include "linear.h"
#include "parallel.h"

namespace fastcnn {

struct linear;
struct linear_forward;
struct linear_input_gradient;
struct linear_weight_gradient;

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

static LinearTrainingTask training_task(int64_t vectors, int64_t in, int64_t outputs, const Tensor& out) {
  STD_TORCH_CHECK(vectors > 0 && outputs > 0, "there must be vectors and outputs, but there are ", vectors, " and ",
                  outputs);
  STD_TORCH_CHECK(in > 0 && in % 16 == 0, "there must be a multiple of 16 inputs, but there are ", in);
  LinearTrainingTask task{};
  task.vectors = vectors, task.in = in, task.outputs = outputs;
  task.out = static_cast<float*>(out.mutable_data_ptr());
  return task;
}

static const float* floats(const char* name, const Tensor& t, int64_t elements) {
  expect(name, t, DType::float32, elements);
  return static_cast<const float*>(t.const_data_ptr());
}

static void linear_forward_op(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor out) {
  LinearTrainingTask task = training_task(x.size(0), x.size(1), weight.size(0), out);
  task.x = floats("input", x, task.vectors * task.in);
  task.weight = floats("weight", weight, task.outputs * task.in);
  if (bias) task.bias = floats("bias", *bias, task.outputs);
  floats("out", out, task.vectors * task.outputs);
  parallel<linear_forward>(task, task.outputs * task.in);
}

static void linear_input_gradient_op(Tensor dy, Tensor weight, Tensor out) {
  LinearTrainingTask task = training_task(dy.size(0), weight.size(1), weight.size(0), out);
  task.dy = floats("grad", dy, task.vectors * task.outputs);
  task.weight = floats("weight", weight, task.outputs * task.in);
  floats("out", out, task.vectors * task.in);
  parallel<linear_input_gradient>(task, task.outputs * task.in);
}

static void linear_weight_gradient_op(Tensor dy, Tensor x, Tensor out) {
  LinearTrainingTask task = training_task(x.size(0), x.size(1), dy.size(1), out);
  task.dy = floats("grad", dy, task.vectors * task.outputs), task.x = floats("input", x, task.vectors * task.in);
  floats("out", out, task.outputs * task.in);
  parallel<linear_weight_gradient>(task, task.outputs * task.in);
}

FASTCNN_OP(fastcnn_cpu, CPU, linear,
           "(Tensor input, Tensor weight, Tensor? bias, Tensor(a!) out, bool relu, float factor) -> ()", linear_op)

FASTCNN_OP(fastcnn_cpu, CPU, linear_forward, "(Tensor input, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()",
           linear_forward_op)
FASTCNN_OP(fastcnn_cpu, CPU, linear_input_gradient, "(Tensor grad, Tensor weight, Tensor(a!) out) -> ()",
           linear_input_gradient_op)
FASTCNN_OP(fastcnn_cpu, CPU, linear_weight_gradient, "(Tensor grad, Tensor input, Tensor(a!) out) -> ()",
           linear_weight_gradient_op)

}  // namespace fastcnn
