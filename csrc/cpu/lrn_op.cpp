#include "../lrn_op.h"

#include "parallel.h"

namespace fastcnn {

struct lrn;
struct lrn_backward;

namespace {

template <typename Name>
void run(TailTask& task, const Tensor& out) {
  Shape& s = task.shape;
  if (s.channels_last) s = {1, s.C, 1, s.N * s.W, true};  // all pixels of all images follow each other
  parallel<Name>(task, s.elements(), Output(out, s.channels_last ? 0 : s.N));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastcnn_cpu, m) { define_lrn(m); }
STABLE_TORCH_LIBRARY_IMPL(fastcnn_cpu, CPU, m) { implement_lrn<run<lrn>, run<lrn_backward>>(m); }

}  // namespace
}  // namespace fastcnn
