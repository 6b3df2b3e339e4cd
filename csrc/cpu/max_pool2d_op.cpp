#include "../max_pool2d_op.h"

#include "parallel.h"

namespace fastcnn {

struct max_pool2d;
struct max_pool2d_backward;

namespace {

template <typename Name>
void run(TailTask& task, const Tensor& out) {
  parallel<Name>(task, task.shape.elements(), Output(out, task.shape.N));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastcnn_cpu, m) { define_max_pool2d(m); }
STABLE_TORCH_LIBRARY_IMPL(fastcnn_cpu, CPU, m) { implement_max_pool2d<run<max_pool2d>, run<max_pool2d_backward>>(m); }

}  // namespace
}  // namespace fastcnn
