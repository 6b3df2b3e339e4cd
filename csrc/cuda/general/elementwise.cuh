// The kernels that compute a map of the input's own size: LRN and ReLU forward, and backward of all three operators.
// Units of pixels are dealt out to blocks; see share_out().
#pragma once

#include "lrn.cuh"
#include "max_pool2d.cuh"

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

template <typename T, bool channels_last, bool normalized>
__global__ void __launch_bounds__(kThreads, 1) relu_lrn(const Arguments a) {
  const int index = run_of_thread<channels_last>(a);
  if (index >= a.runs) return;
  const Run run(a, index, kRun<T>);
  const Normalized<T, channels_last, normalized> input(a, run);
  for_each_pixel<channels_last>(a, a.pixels, [&](int64_t n, int64_t pixel) {
    const int64_t at = n * a.C * a.pixels + pixel * (channels_last ? a.C : 1);
    Compute<T> y[kRun<T>];
    input.load(static_cast<const T*>(a.x) + at, y);
    store_run<channels_last, kRun<T>>(a, static_cast<T*>(a.out) + at, a.pixels, run,
                                      [&](int i) { return narrow<T>(y[i]); });
  });
}

// The bias gradient's first stage: of each block, the sum of dx over its pixels, in the order of its threads.
template <bool channels_last, typename A, int length>
FASTCNN_DEVICE void add_up(const Arguments& a, const A (&sums)[length]) {
  A* shared = dynamic_shared<A>();  // [pixel][run][channel of the run]
  const int run = channels_last ? threadIdx.x : threadIdx.y, pixel = channels_last ? threadIdx.y : threadIdx.x;
  const int row = a.runs_per_block * length;
#pragma unroll
  for (int i = 0; i < length; ++i) shared[pixel * row + run * length + i] = sums[i];
  __syncthreads();
  const int threads = a.runs_per_block * a.pixels_per_block;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < row; i += threads) {
    const int index = block_y() * a.runs_per_block + i / length;
    if (index >= a.runs) break;
    const Run mine(a, index, length);
    if (i % length >= mine.count) continue;
    A sum = 0;
    for (int p = 0; p < a.pixels_per_block; ++p) sum += shared[p * row + i];
    static_cast<A*>(a.partials)[static_cast<int64_t>(blockIdx.x) * a.C + mine.c + i % length] = sum;
  }
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
  if (a.partials) add_up<channels_last>(a, sums);
}

template <typename T, bool channels_last, bool normalized>
void launch_forward(const char* name, const TailTask& task, Stream stream) {
  Arguments a = arguments(task, kRun<T>);
  const Launch shape = share_out(a, channels_last, a.pixels, 0);
  launch<&relu_lrn<T, channels_last, normalized>>(name, shape.grid, shape.block, 0, stream, a);
}

constexpr int kBiasWaves = 1;  // few sums for the second stage

template <typename T, bool channels_last, bool normalized, bool pooled>
void launch_backward(const char* name, const TailTask& task, Stream stream) {
  Arguments a = arguments(task, kRun<T>);
  const Launch shape = share_out(a, channels_last, a.pixels, task.shape.W, task.dbias ? kBiasWaves : 4);
  if constexpr (normalized) {
    launch<&lrn_terms<T, channels_last, pooled>>(name, shape.grid, shape.block, 0, stream, a);
  }
  const size_t shared = task.partials ? kThreads * kRun<T> * sizeof(Compute<T>) : 0;
  launch<&tail_backward<T, channels_last, normalized, pooled>>(name, shape.grid, shape.block, shared, stream, a);
}

}  // namespace fastcnn::cuda::general
