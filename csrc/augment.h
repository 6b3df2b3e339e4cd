// Augmentation of pictures of three bytes per pixel: y = (crop(resize(pixels)) - mean) * scale.
#pragma once

#include "tensor.h"

namespace fastcnn {

inline constexpr int64_t kMostResized = 1 << 14;  // pixels of an axis that is resized, before and after

// An axis of a picture that is resized. A new pixel is made of the old ones under a triangle that is as wide as two of
// them, or as two new ones where these are larger; pixel i has the weight reach - |(2i + 1) * size - centre|, if that
// is positive, divided by the sum of the weights. In units of which an old pixel is 2 * size and a new one 2 * length
// wide, all of these are integers, below 2^31 up to kMostResized.
template <typename Int>
struct ResizedAxis {
  Int length, size;  // before and after

  constexpr Int reach() const { return 2 * (length > size ? length : size); }
  // The most pixels that make a new one.
  constexpr Int taps() const { return (reach() + size - 1) / size; }
  // Those that make new pixel o begin here, and end where the weight is 0 or the axis ends.
  constexpr Int first(Int o) const {
    const Int start = centre(o) - reach() - size;
    return start < 0 ? 0 : start / (2 * size) + 1;
  }
  constexpr Int weight(Int o, Int i) const {
    const Int distance = (2 * i + 1) * size - centre(o), weight = reach() - (distance < 0 ? -distance : distance);
    return weight > 0 ? weight : 0;
  }

 private:
  constexpr Int centre(Int o) const { return (2 * o + 1) * length; }
};

struct AugmentTask {
  DType dtype;  // of the result
  int64_t N, H, W, crop_h, crop_w;
  bool channels_last;
  double scale[3];
  const uint8_t* x;        // N x H x W x 3
  const int64_t* offsets;  // N x 2: the crop's first row and column
  const bool* mirror;      // N
  const void* mean;        // N x 3, in the compute type
  const int64_t* sizes;    // N x 2: height and width after resizing; null where pictures keep theirs
  int64_t taps[2];         // on CPU: the most rows, and columns, that make one of any picture
  void* out;
};

}  // namespace fastcnn
