#include "../relu_lrn_max_pool2d_op.h"

#include "run.h"

namespace fastcnn::cuda {

FASTCNN_OP(fastcnn_cuda, CUDA, relu_lrn_max_pool2d, FASTCNN_RELU_LRN_MAX_POOL2D_OP,
           relu_lrn_max_pool2d_op<run<relu_lrn_max_pool2d>>)
FASTCNN_OP(fastcnn_cuda, CUDA, relu_lrn_max_pool2d_backward, FASTCNN_RELU_LRN_MAX_POOL2D_BACKWARD_OP,
           relu_lrn_max_pool2d_backward_op<run<relu_lrn_max_pool2d_backward>>)

}  // namespace fastcnn::cuda
