// The CUDA operators lrn and lrn_backward: raw pointers and a stream. Each returns once its launches were checked, or
// throws std::runtime_error with the kernel's name and CUDA's error.
#pragma once

#include "../relu_lrn_max_pool2d.h"
#include "device.h"

namespace fastcnn::cuda {

void lrn(const TailTask&, Stream);
void lrn_backward(const TailTask&, Stream);
int64_t lrn_terms(const TailTask&);  // elements of TailTask::terms

}  // namespace fastcnn::cuda
