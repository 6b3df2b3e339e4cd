// The CUDA operators relu_lrn_max_pool2d and relu_lrn_max_pool2d_backward. See lrn.h.
#pragma once

#include "../relu_lrn_max_pool2d.h"
#include "device.h"

namespace fastcnn::cuda {

void relu_lrn_max_pool2d(const TailTask&, Stream);
void relu_lrn_max_pool2d_backward(const TailTask&, Stream);
int64_t bias_partials(const TailTask&);  // rows of TailTask::partials

}  // namespace fastcnn::cuda
