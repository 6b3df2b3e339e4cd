#include "../max_pool2d_op.h"

#include "max_pool2d.h"
#include "run.h"

namespace fastcnn::cuda {

STABLE_TORCH_LIBRARY_FRAGMENT(fastcnn_cuda, m) { define_max_pool2d(m); }
STABLE_TORCH_LIBRARY_IMPL(fastcnn_cuda, CUDA, m) {
  implement_max_pool2d<run<max_pool2d>, run<max_pool2d_backward>>(m);
}

}  // namespace fastcnn::cuda
