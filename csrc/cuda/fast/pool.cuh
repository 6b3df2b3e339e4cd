// Launches of the fast pools; tails without LRN are among them.
#pragma once

#include "launch.cuh"
#include "max_pool2d.cuh"
#include "relu_lrn_max_pool2d.cuh"

namespace fastcnn::cuda::fast {

template <typename T, bool rectified>
void launch_pool(const char* name, const TailTask& task, Stream stream) {
  Arguments a = arguments<T>(task);
  a.by_columns = Divisor(a.OW);
  with_window(task, [&](auto K) {
    if (task.shape.channels_last) {
      a.by_rows = Divisor(a.OH);
      const Launch shape = share_out_units(a, true, int64_t{a.N} * a.OH * a.OW);
      launch<&pool_vectors<T, K, rectified>>(name, shape.grid, shape.block, 0, stream, a);
    } else {
      const int pairs = (a.OH + 1) / 2;
      a.by_rows = Divisor(pairs);
      a.units = a.C * pairs * a.OW;
      const dim3 grid = folded_grid((a.units + kThreads - 1) / kThreads, a.N);
      if (2 * (a.OH - 1) + K <= a.H && 2 * (a.OW - 1) + K <= a.W) {
        launch<&pool_planes<T, K, rectified, false>>(name, grid, dim3(kThreads), 0, stream, a);
      } else {
        launch<&pool_planes<T, K, rectified, true>>(name, grid, dim3(kThreads), 0, stream, a);
      }
    }
  });
}

template <typename T>
void launch_tail(const char* name, const TailTask& task, Stream stream) {
  Arguments a = arguments<T>(task);
  const bool channels_last = task.shape.channels_last;
  const int columns = channels_last ? (a.OW + 1) / 2 : a.OW + 1;
  a.by_columns = Divisor(columns);
  a.units = a.N * columns;
  a.runs_per_block = channels_last ? std::min(a.runs, kNarrow) : 1;
  a.pixels_per_block = kNarrow / a.runs_per_block;
  // Whole warps, if there are any of so many runs.
  for (int p = a.pixels_per_block; p > a.pixels_per_block / 2; --p) {
    if (p * a.runs_per_block % 32 == 0) { a.pixels_per_block = p; break; }
  }
  const int threads = a.pixels_per_block * a.runs_per_block;
  const int run_blocks = (a.runs + a.runs_per_block - 1) / a.runs_per_block;
  const int units = channels_last ? a.pixels_per_block : kNarrow / 32 * 31;
  const int64_t rows = (int64_t{a.units} + units - 1) / units * a.OH;
  const int64_t most = std::max(1, device().multiprocessors * (3 * kNarrow / threads) / run_blocks);
  const dim3 grid = folded_grid(std::min(rows, most), run_blocks);
  with_window(task, [&](auto K) {
    with_beta(task, [&](auto beta) {
      if (channels_last) {
        launch<&tail_vectors<T, K, beta>>(name, grid, dim3(a.runs_per_block, a.pixels_per_block), 0, stream, a);
      } else {
        launch<&tail_planes<T, K, beta>>(name, grid, dim3(kNarrow), 0, stream, a);
      }
    });
  });
}

inline Launch share_out_blocks(Arguments& a, const TailTask& task) {
  const bool channels_last = task.shape.channels_last, normalized = bool(task.lrn);
  const int rows = (a.H + 1) / 2, columns = (a.W + 1) / 2;
  a.by_rows = Divisor(rows), a.by_columns = Divisor(columns);
  const int64_t units = int64_t{a.N} * rows * columns;
  if (normalized && !channels_last) {
    // Groups are cut up where there are too few units for the device.
    a.units = static_cast<int>(units);
    const int64_t across = (units + kNarrow - 1) / kNarrow, wanted = 3 * device().multiprocessors;
    const int group = a.C / a.runs * a.runs_per_group;
    a.channels = group;
    while (2 * across * (a.C / a.channels) < 3 * wanted && a.channels % 16 == 0 && a.channels > 32) a.channels /= 2;
    const int64_t run_blocks = a.C / a.channels;
    const int64_t most = task.dbias ? std::max<int64_t>(1, wanted / run_blocks) : across;
    return {folded_grid(std::min(across, most), run_blocks), dim3(kNarrow)};
  }
  return task.dbias ? share_out_sums(a, channels_last, units, kBlocks) : share_out_units(a, channels_last, units);
}

template <typename T, Beta beta, bool rectified>
void launch_pool_backward(const char* name, const TailTask& task, Stream stream) {
  with_format<T>(task, [&](auto channels_last, auto length) {
    Arguments a = arguments<T>(task);
    const Launch shape = share_out_blocks(a, task);
    with_window(task, [&](auto K) {
      if constexpr (beta != Beta::none && !channels_last) {
        const size_t shared = sizeof(float) * kNarrow / 32 * (8 * 33 + a.channels);
        launch<&tail_backward_planes<T, K, beta>>(name, shape.grid, shape.block, shared, stream, a);
      } else {
        const size_t shared = shared_of_sums(a, length);
        launch<&pool_backward<T, channels_last, length, K, beta, rectified>>(name, shape.grid, shape.block, shared,
                                                                            stream, a);
      }
    });
  });
}

}  // namespace fastcnn::cuda::fast
