#pragma once

namespace fastcnn::cuda {

using Stream = void*;  // a cudaStream_t

}  // namespace fastcnn::cuda
