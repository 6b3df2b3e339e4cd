// The pool's maximum, and the gather of its gradient, for a thread's run of channels.
#pragma once

#include "channels.cuh"

namespace fastcnn::cuda::general {

// torch's rules: of equal values the first in row-major order wins, and a NaN always takes over, so that of several the
// last stays. A window of -inf gives its first element inside the map. A dilated window may step over the whole map:
// then the place, 0, is outside, so that no element gets its gradient.
template <typename A, int length>
struct Maximum {
  A value[length];
  int place[length];
  bool empty = true;

  FASTCNN_DEVICE Maximum() {
#pragma unroll
    for (int i = 0; i < length; ++i) value[i] = -std::numeric_limits<A>::infinity(), place[i] = 0;
  }
  FASTCNN_DEVICE void take(const A (&v)[length], int at) {
#pragma unroll
    for (int i = 0; i < length; ++i) {
      const bool wins = empty || v[i] > value[i] || v[i] != v[i];
      value[i] = wins ? v[i] : value[i];
      place[i] = wins ? at : place[i];
    }
    empty = false;
  }
  // To channel 0 of pixel `pixel` of image n of the pooled map.
  template <bool channels_last, typename T>
  FASTCNN_DEVICE void store(const Arguments& a, const Run& run, int64_t n, int64_t pixel) const {
    const int64_t at = n * a.C * a.out_pixels + pixel * (channels_last ? a.C : 1);
    store_run<channels_last, length>(a, static_cast<T*>(a.out) + at, a.out_pixels, run,
                                     [&](int i) { return narrow<T>(value[i]); });
    if (!a.argmax) return;
    if (a.wide_argmax) {
      store_run<channels_last, length>(a, static_cast<int32_t*>(a.argmax) + at, a.out_pixels, run,
                                       [&](int i) { return place[i]; });
    } else {
      store_run<channels_last, length>(a, static_cast<uint8_t*>(a.argmax) + at, a.out_pixels, run,
                                       [&](int i) { return static_cast<uint8_t>(place[i]); });
    }
  }
};

// f(o, i) for the windows o that hold element `at` as their i-th, in the order of i.
template <typename F>
FASTCNN_DEVICE void for_each_window(const Axis& axis, int at, F f) {
  int shifted = at + axis.padding;
  for (int i = 0; i < axis.reach && shifted >= 0; ++i, shifted -= axis.dilation) {
    const int o = axis.by_stride.divide(shifted);
    if (o * axis.stride == shifted && o < axis.out) f(o, i);
  }
}

// The gradients at one pixel of the map: of each channel, dy of the windows whose maximum it is, in the order of its
// places in them.
template <typename T, bool channels_last>
struct PoolGradient {
  using A = Compute<T>;
  static constexpr int kLength = kRun<T>;
  const Arguments& a;
  const Run& run;
  int64_t image;
  int row, column;

  FASTCNN_DEVICE PoolGradient(const Arguments& a, const Run& run, int64_t n, int64_t pixel)
      : a(a), run(run), image(n * a.C * a.out_pixels) {
    row = a.by_width.divide(static_cast<int>(pixel));
    column = static_cast<int>(pixel) - row * static_cast<int>(a.by_width.by);
  }

  FASTCNN_DEVICE void load(A (&g)[kLength]) const {
#pragma unroll
    for (int j = 0; j < kLength; ++j) g[j] = 0;
    if (a.wide_argmax) gather(static_cast<const int32_t*>(a.argmax), g);
    else gather(static_cast<const uint8_t*>(a.argmax), g);
  }

 private:
  // f(offset of channel 0 of an output, place of this pixel in its window)
  template <typename F>
  FASTCNN_DEVICE void for_each_source(F f) const {
    for_each_window(a.h, row, [&](int oh, int kh) {
      for_each_window(a.w, column, [&](int ow, int kw) {
        const int64_t pixel = static_cast<int64_t>(oh) * a.w.out + ow;
        f(image + pixel * (channels_last ? a.C : 1), static_cast<int>(static_cast<int64_t>(kh) * a.w.kernel + kw));
      });
    });
  }

  template <typename Argmax>
  FASTCNN_DEVICE void gather(const Argmax* argmax, A (&g)[kLength]) const {
    for_each_source([&](int64_t from, int place) {
      bool mine[kLength] = {};
      load_run<channels_last, kLength>(a, argmax + from, a.out_pixels, run,
                                       [&](int i, Argmax element) { mine[i] = static_cast<int>(element) == place; });
      load_run<channels_last, kLength>(a, static_cast<const T*>(a.dy) + from, a.out_pixels, run,
                                       [&](int i, T element) { g[i] += mine[i] ? widen(element) : A(0); });
    });
  }
};

// The gradients at one pixel of a tensor of the map's own shape.
template <typename T, bool channels_last>
struct TensorGradient {
  using A = Compute<T>;
  static constexpr int kLength = kRun<T>;
  const Arguments& a;
  const Run& run;
  const T* dy;

  FASTCNN_DEVICE TensorGradient(const Arguments& a, const Run& run, int64_t n, int64_t pixel)
      : a(a), run(run), dy(static_cast<const T*>(a.dy) + n * a.C * a.pixels + pixel * (channels_last ? a.C : 1)) {}

  FASTCNN_DEVICE void load(A (&g)[kLength]) const {
#pragma unroll
    for (int j = 0; j < kLength; ++j) g[j] = 0;
    load_run<channels_last, kLength>(a, dy, a.pixels, run, [&](int i, T element) { g[i] = widen(element); });
  }
};

}  // namespace fastcnn::cuda::general
