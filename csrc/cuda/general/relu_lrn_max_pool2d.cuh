// The tail of an AlexNet stage, with both LRN and a pool: a block goes down a strip of the map. Rows are rectified and
// normalized, once, into a ring in shared memory, from which they are pooled.
#pragma once

#include "pool.cuh"

namespace fastcnn::cuda::general {

inline constexpr int kSharedBytes = 40 << 10;

struct Strip {
  Arguments a;
  int rows, columns;  // of outputs, a strip
  int row_strips, column_strips;
  int slots, width, channels;  // of the ring: rows, their pixels, their channels
};

template <typename T, bool channels_last>
__global__ void __launch_bounds__(kThreads, 1) tail(const Strip s) {
  using A = Compute<T>;
  constexpr int length = kRun<T>;
  const Arguments& a = s.a;
  A* ring = dynamic_shared<A>();
  const int run_lane = channels_last ? threadIdx.x : threadIdx.y, lane = channels_last ? threadIdx.y : threadIdx.x;
  const int index = block_y() * a.runs_per_block + run_lane;
  if (index - run_lane >= a.runs) return;  // the whole block, before any barrier
  const bool active = index < a.runs;
  const Run run(a, active ? index : 0, length);
  const Normalized<T, channels_last, true> input(a, run);

  // In the ring, as in memory, a pixel's channels or a channel's pixels follow each other.
  const auto slot = [&](int row, int column) {
    return ring + row % s.slots * s.width * s.channels +
           (channels_last ? column * s.channels + run_lane * length : run_lane * length * s.width + column);
  };

  for (int64_t unit = blockIdx.x; unit < a.units; unit += gridDim.x) {
    const int64_t n = unit / (s.row_strips * s.column_strips);
    const int strip = static_cast<int>(unit - n * (s.row_strips * s.column_strips));
    const int first_row = strip / s.column_strips * s.rows, last_row = min(first_row + s.rows, a.h.out);
    const int first_column = strip % s.column_strips * s.columns, last_column = min(first_column + s.columns, a.w.out);
    const int left = max(a.w.element(first_column, 0), 0);
    const int right = min(a.w.element(last_column - 1, a.w.reach - 1) + 1, a.w.size);
    const T* image = static_cast<const T*>(a.x) + n * a.C * a.pixels;
    int next = 0;  // the first row that is not in the ring yet
    for (int oh = first_row; oh < last_row; ++oh) {
      const int begin = a.h.first(oh), end = a.h.last(oh);
      const int bottom = begin < end ? a.h.element(oh, end - 1) + 1 : 0;
      for (int row = max(next, max(a.h.element(oh, 0), 0)); active && row < bottom; ++row) {
        for (int column = left + lane; column < right; column += a.pixels_per_block) {
          const int64_t pixel = static_cast<int64_t>(row) * a.w.size + column;
          A y[length];
          input.load(image + pixel * (channels_last ? a.C : 1), y);
          A* to = slot(row, column - left);
#pragma unroll
          for (int i = 0; i < length; ++i) to[channels_last ? i : i * s.width] = y[i];
        }
      }
      next = max(next, bottom);
      __syncthreads();
      for (int ow = first_column + lane; active && ow < last_column; ow += a.pixels_per_block) {
        Maximum<A, length> maximum;
        for (int i = begin; i < end; ++i) {
          for (int j = a.w.first(ow); j < a.w.last(ow); ++j) {
            const A* from = slot(a.h.element(oh, i), a.w.element(ow, j) - left);
            A y[length];
#pragma unroll
            for (int k = 0; k < length; ++k) y[k] = from[channels_last ? k : k * s.width];
            maximum.take(y, i * a.w.kernel + j);
          }
        }
        maximum.template store<channels_last, T>(a, run, n, static_cast<int64_t>(oh) * a.w.out + ow);
      }
      __syncthreads();
    }
  }
}

// Pixels between the first and last element of as many windows.
inline int64_t span(const Axis& axis, int64_t windows) {
  return std::min<int64_t>((windows - 1) * axis.stride + (axis.reach - 1) * int64_t{axis.dilation} + 1, axis.size);
}

// As wide a strip as the ring has room for; false if it has none for a single window.
template <typename T>
bool plan(const TailTask& task, Strip& s) {
  s.a = arguments(task, kRun<T>);
  Arguments& a = s.a;
  a.runs_per_block = std::min(a.runs, kThreads / (task.shape.channels_last ? 16 : 32));
  a.pixels_per_block = kThreads / a.runs_per_block;
  s.channels = a.runs_per_block * kRun<T>;
  const int64_t rows = span(a.h, 1), pixels = kSharedBytes / (rows * s.channels * int64_t{sizeof(Compute<T>)});
  if (pixels < span(a.w, 1)) return false;
  s.columns = a.w.out;
  while (span(a.w, s.columns) > pixels) --s.columns;
  s.column_strips = (a.w.out + s.columns - 1) / s.columns;
  s.columns = (a.w.out + s.column_strips - 1) / s.column_strips;  // of even widths
  s.slots = static_cast<int>(rows), s.width = static_cast<int>(span(a.w, s.columns));
  // Rows are cut up only where there is too little to do otherwise: the cuts cost rows that are normalized twice.
  const Device here = device();
  const int64_t wanted = int64_t{here.multiprocessors} * (here.threads_per_multiprocessor / kThreads);
  const int64_t blocks = a.N * s.column_strips * ((a.runs + a.runs_per_block - 1) / a.runs_per_block);
  s.row_strips = static_cast<int>(std::clamp<int64_t>(wanted / blocks, 1, (a.h.out + 3) / 4));
  s.rows = (a.h.out + s.row_strips - 1) / s.row_strips;
  s.row_strips = (a.h.out + s.rows - 1) / s.rows;
  a.units = a.N * s.row_strips * s.column_strips;
  return true;
}

template <typename T, bool channels_last>
void launch_tail(const char* name, const TailTask& task, Stream stream) {
  Strip s{};
  if (!plan<T>(task, s)) return launch_pool<T, channels_last, true>(name, task, stream);
  const unsigned p = s.a.pixels_per_block, r = s.a.runs_per_block;
  const dim3 grid = folded_grid(std::min<int64_t>(s.a.units, std::numeric_limits<int>::max()), (s.a.runs + r - 1) / r);
  const size_t shared = size_t{sizeof(Compute<T>)} * s.slots * s.width * s.channels;
  launch<&tail<T, channels_last>>(name, grid, channels_last ? dim3(r, p) : dim3(p, r), shared, stream, s);
}

}  // namespace fastcnn::cuda::general
