#include "../max_pool2d_op.h"

#include "run.h"

namespace fastcnn::cuda {

FASTCNN_OP(fastcnn_cuda, CUDA, max_pool2d, FASTCNN_MAX_POOL2D_OP, max_pool2d_op<run<max_pool2d>>)
FASTCNN_OP(fastcnn_cuda, CUDA, max_pool2d_backward, FASTCNN_MAX_POOL2D_BACKWARD_OP,
           max_pool2d_backward_op<run<max_pool2d_backward>>)

}  // namespace fastcnn::cuda
