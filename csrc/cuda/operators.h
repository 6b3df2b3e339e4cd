// The CUDA operators: raw pointers and a stream. Each returns once its launches were checked, or throws
// std::runtime_error with the kernel's name and CUDA's error.
#pragma once

#include "../augment.h"
#include "../batch_norm_relu_max_pool2d.h"
#include "../conv2d_relu.h"
#include "../relu_lrn_max_pool2d.h"
#include "device.h"

// Those that are the tail of a stage or a part of it; each has a backward of the name <op>_backward.
#define FASTCNN_TAIL_OPERATORS(OPERATOR) OPERATOR(lrn) OPERATOR(max_pool2d) OPERATOR(relu_lrn_max_pool2d)

namespace fastcnn::cuda {

#define FASTCNN_DECLARE(op)         \
  void op(const TailTask&, Stream); \
  void op##_backward(const TailTask&, Stream);
FASTCNN_TAIL_OPERATORS(FASTCNN_DECLARE)
#undef FASTCNN_DECLARE

void augment(const AugmentTask&, Stream);
void batch_norm_statistics(const BatchNormTask&, Stream);
void batch_norm_relu_max_pool2d(const BatchNormTask&, Stream);
void batch_norm_relu_max_pool2d_backward(const BatchNormTask&, Stream);
void conv2d_relu(const ConvTask&, Stream);

int64_t lrn_terms(const TailTask&);             // elements of TailTask::terms
int64_t bias_partials(const TailTask&);         // rows of TailTask::partials
int64_t batch_norm_sums(const BatchNormTask&);  // elements of BatchNormTask::sums, for statistics and backward

}  // namespace fastcnn::cuda
