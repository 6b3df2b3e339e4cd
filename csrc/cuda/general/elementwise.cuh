// The kernels that compute a map of the input's own size: LRN and ReLU forward, and backward of all three operators.
// Units of pixels are dealt out to blocks; see share_out().
#pragma once

#include "lrn.cuh"
#include "max_pool2d.cuh"
#include "sums.cuh"

namespace fastcnn::cuda::general {

// f(n, pixel) for the thread's pixels.
template <bool channels_last, typename F>
FASTCNN_DEVICE void for_each_pixel(const Arguments& a, int64_t pixels, F f) {
  for (int64_t unit = blockIdx.x; unit < a.units; unit += gridDim.x) {
    const int64_t n = unit / a.chunks;
    const int64_t pixel = (unit - n * a.chunks) * a.pixels_per_block + (channels_last ? threadIdx.y : threadIdx.x);
    if (pixel < pixels) f(n, pixel);
  }
}

template <bool channels_last>
FASTCNN_DEVICE int run_of_thread(const Arguments& a) {
  return block_y() * a.runs_per_block + (channels_last ? threadIdx.x : threadIdx.y);
}

// The map that `input` makes of x.
template <typename T, bool channels_last, typename Input>
FASTCNN_DEVICE void map_runs(const Arguments& a, const Run& run, const Input& input) {
  for_each_pixel<channels_last>(a, a.pixels, [&](int64_t n, int64_t pixel) {
    const int64_t at = n * a.C * a.pixels + pixel * (channels_last ? a.C : 1);
    Compute<T> y[kRun<T>];
    input.load(static_cast<const T*>(a.x) + at, y);
    store_run<channels_last, kRun<T>>(a, static_cast<T*>(a.out) + at, a.pixels, run,
                                      [&](int i) { return narrow<T>(y[i]); });
  });
}

template <typename T, bool channels_last, bool normalized>
__global__ void __launch_bounds__(kThreads, 1) relu_lrn(const Arguments a) {
  const int index = run_of_thread<channels_last>(a);
  if (index >= a.runs) return;
  const Run run(a, index, kRun<T>);
  map_runs<T, channels_last>(a, run, Normalized<T, channels_last, normalized>(a, run));
}

template <typename T, bool channels_last, bool pooled>
using Gradient = std::conditional_t<pooled, PoolGradient<T, channels_last>, TensorGradient<T, channels_last>>;

// The terms of LRN's backward for any window, laid out like x.
template <typename T, bool channels_last, bool pooled>
__global__ void __launch_bounds__(kThreads, 1) lrn_terms(const Arguments a) {
  using A = Compute<T>;
  const int index = run_of_thread<channels_last>(a);
  if (index >= a.runs) return;
  const Run run(a, index, kRun<T>);
  const Differentiated<T, channels_last, true> input(a, run);
  for_each_pixel<channels_last>(a, a.pixels, [&](int64_t n, int64_t pixel) {
    const int64_t at = n * a.C * a.pixels + pixel * (channels_last ? a.C : 1);
    A q[kRun<T>];
    const Gradient<T, channels_last, pooled> gradient(a, run, n, pixel);
    input.load_terms(static_cast<const T*>(a.x) + at, gradient, q);
    store_run<channels_last, kRun<T>>(a, static_cast<A*>(a.terms) + at, a.pixels, run, [&](int i) { return q[i]; });
  });
}

template <typename T, bool channels_last, bool normalized, bool pooled>
__global__ void __launch_bounds__(kThreads, 1) tail_backward(const Arguments a) {
  using A = Compute<T>;
  const int index = run_of_thread<channels_last>(a);
  A sums[kRun<T>] = {};
  if (index < a.runs) {
    const Run run(a, index, kRun<T>);
    const Differentiated<T, channels_last, normalized> input(a, run);
    for_each_pixel<channels_last>(a, a.pixels, [&](int64_t n, int64_t pixel) {
      const int64_t at = n * a.C * a.pixels + pixel * (channels_last ? a.C : 1);
      A dx[kRun<T>];
      const Gradient<T, channels_last, pooled> gradient(a, run, n, pixel);
      input.load(static_cast<const T*>(a.x) + at, gradient, static_cast<const A*>(a.terms) + at, dx);
#pragma unroll
      for (int i = 0; i < kRun<T>; ++i) sums[i] += dx[i];
      store_run<channels_last, kRun<T>>(a, static_cast<T*>(a.out) + at, a.pixels, run,
                                        [&](int i) { return narrow<T>(dx[i]); });
    });
  }
  if (!a.partials) return;
  add_up<channels_last, kRun<T>>(a, static_cast<A*>(a.partials), [&](int i) { return sums[i]; });
}

template <typename T, bool channels_last, bool normalized>
void launch_forward(const char* name, const TailTask& task, Stream stream) {
  Arguments a = arguments(task, kRun<T>);
  const Launch shape = share_out(a, channels_last, a.pixels, 0);
  launch<&relu_lrn<T, channels_last, normalized>>(name, shape.grid, shape.block, 0, stream, a);
}

template <typename T, bool channels_last, bool normalized, bool pooled>
void launch_backward(const char* name, const TailTask& task, Stream stream) {
  Arguments a = arguments(task, kRun<T>);
  const Launch shape = share_out(a, channels_last, a.pixels, task.shape.W, task.dbias ? kSumWaves : 4);
  if constexpr (normalized) {
    launch<&lrn_terms<T, channels_last, pooled>>(name, shape.grid, shape.block, 0, stream, a);
  }
  const size_t shared = task.partials ? bytes_to_add_up<T, Compute<T>>() : 0;
  launch<&tail_backward<T, channels_last, normalized, pooled>>(name, shape.grid, shape.block, shared, stream, a);
}

}  // namespace fastcnn::cuda::general
