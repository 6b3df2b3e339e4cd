#include "../lrn_op.h"

#include "run.h"

namespace fastcnn::cuda {

STABLE_TORCH_LIBRARY_FRAGMENT(fastcnn_cuda, m) { define_lrn(m); }
STABLE_TORCH_LIBRARY_IMPL(fastcnn_cuda, CUDA, m) { implement_lrn<run<lrn>, run<lrn_backward>>(m); }

}  // namespace fastcnn::cuda
