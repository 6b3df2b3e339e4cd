#include "../relu_lrn_max_pool2d_op.h"

#include "parallel.h"

namespace fastcnn {

struct relu_lrn_max_pool2d;
struct relu_lrn_max_pool2d_backward;

static void forward(TailTask& task, const Tensor& out) {
  if (!task.lrn && !task.bias) task.shape = task.shape.as_planes();
  parallel<relu_lrn_max_pool2d>(task, task.shape.elements(), Output(out, task.shape.N));
}

// The bias gradient: a partial sum for each unit, then those in order, whatever the number of threads.
template <typename A>
static void sum_partials(const TailTask& task, int64_t units) {
  for (int64_t c = 0; c < task.shape.C; ++c) {
    double sum = 0;
    for (int64_t u = 0; u < units; ++u) sum += static_cast<const A*>(task.partials)[u * task.shape.C + c];
    static_cast<A*>(task.dbias)[c] = static_cast<A>(sum);
  }
}

static void backward(TailTask& task, const Tensor& dx) {
  if (!task.lrn && !task.bias) task.shape = task.shape.as_planes();
  const int64_t elements = task.shape.elements();
  const int64_t units = elements ? kernel<relu_lrn_max_pool2d_backward, TailTask>().units(task) : 0;
  const bool is_double = task.dtype == DType::float64;
  const auto partials = allocate_scratch(task.dbias ? units * task.shape.C * (is_double ? 8 : 4) : 0);
  task.partials = task.dbias ? partials.get() : nullptr;
  parallel<relu_lrn_max_pool2d_backward>(task, elements, Output(dx, task.shape.N));
  if (task.dbias) (is_double ? sum_partials<double> : sum_partials<float>)(task, units);
}

FASTCNN_OP(fastcnn_cpu, CPU, relu_lrn_max_pool2d, FASTCNN_RELU_LRN_MAX_POOL2D_OP, relu_lrn_max_pool2d_op<forward>)
FASTCNN_OP(fastcnn_cpu, CPU, relu_lrn_max_pool2d_backward, FASTCNN_RELU_LRN_MAX_POOL2D_BACKWARD_OP,
           relu_lrn_max_pool2d_backward_op<backward>)

}  // namespace fastcnn
