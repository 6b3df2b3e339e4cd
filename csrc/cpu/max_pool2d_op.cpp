#include "../max_pool2d_op.h"

#include "parallel.h"

namespace fastcnn {

struct max_pool2d;
struct max_pool2d_backward;

template <typename Name>
static void run(TailTask& task, const Tensor& out) {
  task.shape = task.shape.as_planes();
  parallel<Name>(task, task.shape.elements(), Output(out, task.shape.N));
}

FASTCNN_OP(fastcnn_cpu, CPU, max_pool2d, FASTCNN_MAX_POOL2D_OP, max_pool2d_op<run<max_pool2d>>)
FASTCNN_OP(fastcnn_cpu, CPU, max_pool2d_backward, FASTCNN_MAX_POOL2D_BACKWARD_OP,
           max_pool2d_backward_op<run<max_pool2d_backward>>)

}  // namespace fastcnn
