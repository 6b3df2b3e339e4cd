// A thread computes a run of consecutive channels of one pixel, as many as fill 16 bytes. In channels_last the lanes of
// a warp take neighbouring runs, and a run is one access; in NCHW they take neighbouring pixels.
#pragma once

#include "arguments.cuh"

namespace fastcnn::cuda::general {

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
inline constexpr int kRun = 16 / sizeof(T);

// The thread's run: channels c ... c + count - 1 of a group's first ... last - 1.
struct Run {
  int c, count, first, last;

  FASTCNN_DEVICE Run(const Arguments& a, int index, int length) {
    const int group = index / a.runs_per_group;
    first = group * a.group;
    last = first + a.group;
    c = first + (index - group * a.runs_per_group) * length;
    count = min(length, last - c);
  }
  FASTCNN_DEVICE bool holds(int channel) const { return channel >= first && channel < last; }
};

// f(i, element of channel c + i) for the run. x is the pixel's first channel.
template <bool channels_last, int length, typename T, typename F>
FASTCNN_DEVICE void load_run(const Arguments& a, const T* x, int64_t stride, const Run& run, F f) {
  if (channels_last && a.vectors) {
    const Pack<T, length> pack(x + run.c);
#pragma unroll
    for (int i = 0; i < length; ++i) f(i, pack.element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < length; ++i) {
      if (i < run.count) f(i, x[channels_last ? run.c + i : (run.c + i) * stride]);
    }
  }
}

// Store value(i) as channel c + i, for the whole run.
template <bool channels_last, int length, typename T, typename F>
FASTCNN_DEVICE void store_run(const Arguments& a, T* out, int64_t stride, const Run& run, F value) {
  if (channels_last && a.vectors) {
    Pack<T, length> pack;
#pragma unroll
    for (int i = 0; i < length; ++i) pack.element[i] = value(i);
    pack.store(out + run.c);
  } else {
#pragma unroll
    for (int i = 0; i < length; ++i) {
      if (i < run.count) out[channels_last ? run.c + i : (run.c + i) * stride] = value(i);
    }
  }
}

}  // namespace fastcnn::cuda::general
