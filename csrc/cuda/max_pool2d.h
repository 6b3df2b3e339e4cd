// The CUDA operators max_pool2d and max_pool2d_backward. See lrn.h.
#pragma once

#include "../relu_lrn_max_pool2d.h"
#include "device.h"

namespace fastcnn::cuda {

void max_pool2d(const TailTask&, Stream);
void max_pool2d_backward(const TailTask&, Stream);

}  // namespace fastcnn::cuda
