#include "../lrn_op.h"

#include "run.h"

namespace fastcnn::cuda {

FASTCNN_OP(fastcnn_cuda, CUDA, lrn, FASTCNN_LRN_OP, lrn_op<run<lrn>>)
FASTCNN_OP(fastcnn_cuda, CUDA, lrn_backward, FASTCNN_LRN_BACKWARD_OP, lrn_backward_op<run<lrn_backward>>)

}  // namespace fastcnn::cuda
