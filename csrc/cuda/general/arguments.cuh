// What every kernel of the memory-bound operators gets, and how it is made from a task.
#pragma once

#include <limits>

#include "../../relu_lrn_max_pool2d.h"
#include "../divisor.cuh"
#include "../pack.cuh"

namespace fastcnn::cuda::general {

// PoolAxis in 32 bits.
struct Axis {
  int kernel, stride, padding, dilation, size, out, reach;
  Divisor by_stride, by_dilation;

  Axis() = default;
  explicit Axis(const PoolAxis& a) {
    if (a.size + 2 * a.padding >= std::numeric_limits<int>::max() / 2) {
      throw std::runtime_error("fastcnn: CUDA kernels pool maps of fewer than 2**30 rows and columns with padding");
    }
    // A step beyond the map is as good as any other such step.
    const int64_t beyond = a.size + a.padding;
    kernel = static_cast<int>(a.kernel), padding = static_cast<int>(a.padding);
    size = static_cast<int>(a.size), out = static_cast<int>(a.out), reach = static_cast<int>(a.reach());
    stride = static_cast<int>(std::min(a.stride, beyond)), dilation = static_cast<int>(std::min(a.dilation, beyond));
    by_stride = Divisor(stride), by_dilation = Divisor(dilation);
  }
  FASTCNN_DEVICE int element(int o, int i) const { return o * stride - padding + i * dilation; }
  // The i of window o that lie inside the map are first(o) ... last(o) - 1.
  FASTCNN_DEVICE int first(int o) const { return max(by_dilation.divide(max(dilation - 1 - element(o, 0), 0)), 0); }
  FASTCNN_DEVICE int last(int o) const { return min(by_dilation.divide(size - element(o, 0) + dilation - 1), reach); }
};

struct Arguments {
  int64_t N, pixels, out_pixels;  // of the map, before and after
  int C;
  bool relu, vectors, wide_argmax;
  const void *x, *bias, *dy;
  void *out, *argmax, *partials, *terms;
  // Work is shared out as units, `pixels_per_block` of an image's pixels; `chunks` of them make an image.
  int64_t units, chunks;
  int pixels_per_block, runs_per_block, runs, runs_per_group;
  // LRN: s = k + scale * sum(x^2) over channels c - before ... c + after; slope is the factor of the sum in backward.
  int group, before, after;
  double scale, k, beta, slope;
  Axis h, w;
  Divisor by_width;  // of the map that units cut up
};

// Fewer than an int has room for, so that a run or a window may reach beyond the last.
inline int channels_of(const TailTask& task) {
  if (task.shape.C >= 1 << 30) throw std::runtime_error("fastcnn: CUDA kernels take fewer than 2**30 channels");
  return static_cast<int>(task.shape.C);
}

inline Arguments arguments(const TailTask& task, int run) {
  const Shape& shape = task.shape;
  Arguments a{};
  a.N = shape.N, a.pixels = a.out_pixels = shape.pixels(), a.C = channels_of(task);
  a.relu = task.relu;
  a.x = task.x, a.bias = task.bias, a.dy = task.dy;
  a.out = task.out, a.argmax = task.argmax, a.partials = task.partials, a.terms = task.terms;
  a.group = static_cast<int>(shape.C / task.lrn.groups);
  a.vectors =
      shape.channels_last && a.group % run == 0 && aligned(a.x) && aligned(a.dy) && aligned(a.out) && aligned(a.argmax);
  a.runs_per_group = (a.group + run - 1) / run;
  a.runs = a.runs_per_group * static_cast<int>(task.lrn.groups);
  if (task.lrn) {
    a.before = static_cast<int>(task.lrn.before(a.group)), a.after = static_cast<int>(task.lrn.after(a.group));
    a.scale = task.lrn.alpha / task.lrn.size, a.k = task.lrn.k, a.beta = task.lrn.beta;
    a.slope = 2 * a.scale * a.beta;
  }
  if (task.pool) {
    a.h = Axis(task.pool.h), a.w = Axis(task.pool.w);
    a.out_pixels = task.pool.h.out * task.pool.w.out;
    a.wide_argmax = task.pool.wide_argmax();
    if (a.pixels >= std::numeric_limits<int>::max()) {
      throw std::runtime_error("fastcnn: CUDA kernels pool maps of fewer than 2**31 pixels");
    }
  }
  return a;
}

// Cut `pixels` an image of width `width` into units, for blocks that go round until all are done; `waves` times as many
// blocks as the device holds at once.
inline Launch share_out(Arguments& a, bool channels_last, int64_t pixels, int64_t width, int waves = 4) {
  const int pixel_lanes = channels_last ? 1 : 32;
  a.runs_per_block = std::min(a.runs, kThreads / pixel_lanes);
  a.pixels_per_block = kThreads / a.runs_per_block;
  a.chunks = (pixels + a.pixels_per_block - 1) / a.pixels_per_block;
  a.units = a.N * a.chunks;
  if (width > 0 && width < std::numeric_limits<int>::max()) a.by_width = Divisor(static_cast<unsigned>(width));
  const Device here = device();
  const int run_blocks = (a.runs + a.runs_per_block - 1) / a.runs_per_block;
  const int64_t resident = static_cast<int64_t>(here.multiprocessors) * (here.threads_per_multiprocessor / kThreads);
  const int64_t most = std::max<int64_t>(1, waves * resident / run_blocks);
  const unsigned p = a.pixels_per_block, r = a.runs_per_block;
  return {folded_grid(std::min(a.units, most), run_blocks), channels_last ? dim3(r, p) : dim3(p, r)};
}

}  // namespace fastcnn::cuda::general
