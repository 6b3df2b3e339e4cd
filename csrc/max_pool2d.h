// Parameters of max pooling, and which window sees which row (or column).
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastcnn {

// One dimension: window o sees the elements o * stride - padding + i * dilation, i = 0 ... kernel-1, that exist.
struct PoolAxis {
  int64_t kernel = 0, stride = 1, padding = 0, dilation = 1;
  int64_t size = 0, out = 0;  // of the map, before and after

  // By torch's rule; with ceil_mode no window starts in the padding at the end.
  static PoolAxis of(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, bool ceil_mode) {
    PoolAxis axis{kernel, stride, padding, dilation, size, 0};
    const int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
    axis.out = (span + (ceil_mode ? stride - 1 : 0)) / stride + 1;
    if (ceil_mode && (axis.out - 1) * stride >= size + padding) --axis.out;
    // Where there is one window its stride does not matter, and where it has one element neither does its dilation.
    if (axis.out == 1) axis.stride = 1;
    if (axis.kernel == 1) axis.dilation = 1;
    return axis;
  }
  int64_t element(int64_t o, int64_t i) const { return o * stride - padding + i * dilation; }
  // Only this many elements of a window can lie inside the map, whatever its size.
  int64_t reach() const { return std::min(kernel, (size + padding + dilation - 1) / dilation); }
  // The i of window o that lie inside the map are first(o) ... last(o) - 1.
  int64_t first(int64_t o) const {
    const int64_t start = element(o, 0);
    return start >= 0 ? 0 : (-start + dilation - 1) / dilation;
  }
  int64_t last(int64_t o) const {
    if (element(o, kernel - 1) < size) return kernel;
    const int64_t room = size - element(o, 0);  // positive: every window starts before the end
    return (room + dilation - 1) / dilation;
  }
};

struct MaxPool2d {
  PoolAxis h, w;

  explicit operator bool() const { return h.kernel > 0; }
  // Argmax, the offset kh * KW + kw in the unclipped window, is one byte where it fits.
  bool wide_argmax() const { return h.kernel * w.kernel > 256; }
};

}  // namespace fastcnn
