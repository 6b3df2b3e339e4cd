// Which tasks the fast kernels take, and how their work is shared out.
#pragma once

#include "../dispatch.cuh"
#include "place.cuh"

namespace fastcnn::cuda::fast {

inline int channels_of_thread(const TailTask& task) {
  if (!task.shape.channels_last) return kPlanes;
  return task.dtype == DType::float32 ? kVector<float> : kVector<Half>;
}

// The most channels of a group whose sums fit in shared memory, with room for other blocks.
inline constexpr int64_t kMostChannels = 4096;

// Whether there are kernels for the task's dtype, LRN and pool, its shape, and where its tensors are.
inline bool takes(const TailTask& task) {
  if (task.dtype == DType::float64) return false;
  const Shape& shape = task.shape;
  constexpr int64_t most = std::numeric_limits<int>::max() / 2;
  const bool small = shape.image_stride() < most && shape.N * shape.pixels() < most && shape.N * shape.C < most;
  const int64_t group = shape.C / task.lrn.groups;
  const bool whole = group % channels_of_thread(task) == 0 && (!task.lrn || group <= kMostChannels);
  return (task.lrn || task.pool) && usual_beta(task.lrn) && (!task.pool || usual_window(task.pool)) && small && whole &&
         aligned(task.x) && aligned(task.dy) && aligned(task.out) && aligned(task.argmax);
}

inline Arguments arguments(const TailTask& task) {
  const Shape& shape = task.shape;
  Arguments a{};
  a.x = task.x, a.bias = task.bias, a.dy = task.dy;
  a.out = task.out, a.argmax = task.argmax, a.partials = task.partials;
  a.N = static_cast<int>(shape.N), a.C = static_cast<int>(shape.C);
  a.H = static_cast<int>(shape.H), a.W = static_cast<int>(shape.W);
  a.OH = static_cast<int>(task.out_shape().H), a.OW = static_cast<int>(task.out_shape().W);
  a.image = shape.image_stride(), a.out_image = task.out_shape().image_stride();
  using limits = std::numeric_limits<float>;
  a.lowest = task.relu ? 0 : -limits::infinity(), a.blocked = task.relu ? 0 : limits::quiet_NaN();
  a.factor = 1;
  if (task.lrn) {
    const double scale = task.lrn.alpha / static_cast<double>(task.lrn.size);
    a.start = static_cast<float>(task.lrn.k / scale), a.half_start = a.start / 2;
    a.factor = static_cast<float>(std::pow(scale, -task.lrn.beta));
    a.twice_beta = static_cast<float>(2 * task.lrn.beta);
  }
  a.runs = a.C / channels_of_thread(task), a.runs_per_group = a.runs / static_cast<int>(task.lrn.groups);
  a.by_group = Divisor(a.runs_per_group);
  return a;
}

// Blocks of at most `threads` threads, for all channels of `units` units.
inline Launch share_out_units(Arguments& a, bool channels_last, int64_t units, int threads = kThreads) {
  a.units = static_cast<int>(units);
  a.runs_per_block = channels_last ? std::min(a.runs, threads) : 1;
  a.pixels_per_block = threads / a.runs_per_block;
  // Whole warps, if there are any of so many runs.
  for (int p = a.pixels_per_block; p > a.pixels_per_block / 2; --p) {
    if (p * a.runs_per_block % 32 == 0) {
      a.pixels_per_block = p;
      break;
    }
  }
  const int64_t across = (units + a.pixels_per_block - 1) / a.pixels_per_block;
  const int run_blocks = (a.runs + a.runs_per_block - 1) / a.runs_per_block;
  const unsigned p = a.pixels_per_block, r = a.runs_per_block;
  return {folded_grid(across, run_blocks), dim3(channels_last ? r : p, channels_last ? p : r)};
}

// No more blocks than the device holds at once, with `threads` threads on a multiprocessor.
inline void keep_resident(Launch& shape, int threads) {
  const int64_t blocks = int64_t{device().multiprocessors} * (threads / (shape.block.x * shape.block.y));
  const int64_t high = int64_t{shape.grid.y} * shape.grid.z;
  shape.grid.x = static_cast<unsigned>(std::clamp<int64_t>(blocks / high, 1, shape.grid.x));
}

// Where the map keeps its size. Each block that leaves a row of sums for the bias gradient goes round.
inline Launch share_out_pixels(Arguments& a, const TailTask& task) {
  a.by_pixels = Divisor(static_cast<unsigned>(task.shape.pixels()));
  Launch shape = share_out_units(a, task.shape.channels_last, task.shape.N * task.shape.pixels());
  if (task.dbias) keep_resident(shape, kResident);
  return shape;
}

// The gradient of a pool, whose units are blocks of 2 x 2 elements.
inline Launch share_out_blocks(Arguments& a, const TailTask& task) {
  const bool channels_last = task.shape.channels_last, narrow = task.lrn || !channels_last;
  const int rows = (a.H + 1) / 2, columns = (a.W + 1) / 2;
  a.by_rows = Divisor(rows), a.by_columns = Divisor(columns);
  Launch shape = share_out_units(a, channels_last, int64_t{a.N} * rows * columns, narrow ? kNarrow : kThreads);
  if (task.lrn && !channels_last) {
    // A thread goes through all channels of its group, or through part of them where there are too few units.
    const int64_t across = shape.grid.x, wanted = int64_t{device().multiprocessors} * kResidentNarrow / kNarrow;
    a.channels = a.C / static_cast<int>(task.lrn.groups);
    while (10 * across * (a.C / a.channels) < 9 * wanted && a.channels % 16 == 0 && a.channels > 32) a.channels /= 2;
    shape.grid = folded_grid(across, a.C / a.channels);
  }
  if (task.dbias) keep_resident(shape, narrow ? kResidentNarrow : kResident);
  return shape;
}

inline size_t bytes_of_sums(const Arguments& a, int length) {
  return a.partials ? sizeof(float) * kThreads * length : 0;
}

// f(T{}, channels_last and the channels of a thread as constants)
template <typename F>
void with_dtype_and_format(const TailTask& task, F f) {
  const auto with_format = [&](auto t) {
    if (task.shape.channels_last) f(t, std::true_type(), std::integral_constant<int, kVector<decltype(t)>>());
    else f(t, std::false_type(), std::integral_constant<int, kPlanes>());
  };
  switch (task.dtype) {
    case DType::float16: return with_format(Half());
    case DType::bfloat16: return with_format(BFloat16());
    default: return with_format(float());
  }
}

// f(whether there is a bias or a ReLU, as a constant)
template <typename F>
void with_rectified(const TailTask& task, F f) {
  if (task.relu || task.bias || task.dbias) f(std::true_type());
  else f(std::false_type());
}

template <typename F>
void with_beta(const TailTask& task, F f) {
  if (usual_beta(task.lrn) == Beta::half) f(std::integral_constant<Beta, Beta::half>());
  else f(std::integral_constant<Beta, Beta::three_quarters>());
}

// f(K as a constant)
template <typename F>
void with_window(const TailTask& task, F f) {
  if (usual_window(task.pool) == 3) f(std::integral_constant<int, 3>());
  else f(std::integral_constant<int, 2>());
}

}  // namespace fastcnn::cuda::fast
