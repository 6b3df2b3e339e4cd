// What a kernel is told about a tensor. Shared by CPU and CUDA; knows nothing of torch.
#pragma once

#include <cstdint>

namespace fastcnn {

enum class DType { float16, bfloat16, float32, float64 };

// N images of C channels and H x W pixels, dense in one of the two memory formats. Where an operator does not care
// about rows, H is 1 and W counts all pixels.
struct Shape {
  int64_t N, C, H, W;
  bool channels_last;

  int64_t pixels() const { return H * W; }
  int64_t elements() const { return N * C * H * W; }
  // Between images; inside one, a pixel's channel lies at pixel * pixel_stride() + channel * channel_stride().
  int64_t image_stride() const { return C * H * W; }
  int64_t pixel_stride() const { return channels_last ? C : 1; }
  int64_t channel_stride() const { return channels_last ? 1 : H * W; }
  // The same memory, for what does not mix channels: in NCHW each is an image of its own.
  Shape as_planes() const { return channels_last ? *this : Shape{N * C, 1, H, W, false}; }
};

}  // namespace fastcnn
