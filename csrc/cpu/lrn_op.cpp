#include "../lrn_op.h"

#include "parallel.h"

namespace fastcnn {

struct lrn;
struct lrn_backward;

template <typename Name>
static void run(TailTask& task, const Tensor& out) {
  Shape& s = task.shape;
  if (s.channels_last) s = {1, s.C, 1, s.N * s.W, true};  // all pixels of all images follow each other
  parallel<Name>(task, s.elements(), Output(out, s.channels_last ? 0 : s.N));
}

FASTCNN_OP(fastcnn_cpu, CPU, lrn, FASTCNN_LRN_OP, lrn_op<run<lrn>>)
FASTCNN_OP(fastcnn_cpu, CPU, lrn_backward, FASTCNN_LRN_BACKWARD_OP, lrn_backward_op<run<lrn_backward>>)

}  // namespace fastcnn
