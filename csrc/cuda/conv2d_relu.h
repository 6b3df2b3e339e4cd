// The CUDA operator conv2d_relu. See lrn.h.
#pragma once

#include "../conv2d_relu.h"
#include "device.h"

namespace fastcnn::cuda {

void conv2d_relu(const ConvTask&, Stream);

}  // namespace fastcnn::cuda
