// The kernels that pool straight from memory, each thread a run of channels of one output: windows overlap in the L1
// cache.
#pragma once

#include "elementwise.cuh"

namespace fastcnn::cuda::general {

// The pooled map of what `input` makes of x.
template <typename T, bool channels_last, typename Input>
FASTCNN_DEVICE void pool_runs(const Arguments& a, const Run& run, const Input& input) {
  for_each_pixel<channels_last>(a, a.out_pixels, [&](int64_t n, int64_t pixel) {
    const int oh = a.by_width.divide(static_cast<int>(pixel)), ow = static_cast<int>(pixel) - oh * a.w.out;
    const T* image = static_cast<const T*>(a.x) + n * a.C * a.pixels;
    Maximum<Compute<T>, kRun<T>> maximum;
    for (int i = a.h.first(oh); i < a.h.last(oh); ++i) {
      for (int j = a.w.first(ow); j < a.w.last(ow); ++j) {
        const int64_t at = static_cast<int64_t>(a.h.element(oh, i)) * a.w.size + a.w.element(ow, j);
        Compute<T> y[kRun<T>];
        input.load(image + at * (channels_last ? a.C : 1), y);
        maximum.take(y, i * a.w.kernel + j);
      }
    }
    maximum.template store<channels_last, T>(a, run, n, pixel);
  });
}

template <typename T, bool channels_last, bool normalized>
__global__ void __launch_bounds__(kThreads, 1) pool(const Arguments a) {
  const int index = run_of_thread<channels_last>(a);
  if (index >= a.runs) return;
  const Run run(a, index, kRun<T>);
  pool_runs<T, channels_last>(a, run, Normalized<T, channels_last, normalized>(a, run));
}

template <typename T, bool channels_last, bool normalized>
void launch_pool(const char* name, const TailTask& task, Stream stream) {
  Arguments a = arguments(task, kRun<T>);
  const Launch shape = share_out(a, channels_last, a.out_pixels, a.w.out);
  launch<&pool<T, channels_last, normalized>>(name, shape.grid, shape.block, 0, stream, a);
}

}  // namespace fastcnn::cuda::general
