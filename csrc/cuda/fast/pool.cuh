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
      const auto with_outputs = [&](auto outputs) {
        const int strips = (a.OH + outputs - 1) / outputs;
        a.by_rows = Divisor(strips);
        a.units = a.C * strips * a.OW;
        const dim3 grid = folded_grid((a.units + kThreads - 1) / kThreads, a.N);
        if (2 * (a.OH - 1) + K <= a.H && 2 * (a.OW - 1) + K <= a.W) {
          launch<&pool_planes<T, K, outputs, rectified, false>>(name, grid, dim3(kThreads), 0, stream, a);
        } else {
          launch<&pool_planes<T, K, outputs, rectified, true>>(name, grid, dim3(kThreads), 0, stream, a);
        }
      };
      // Lanes of small maps are further apart the more outputs a thread has.
      if (a.OH % 3 == 0 && a.OW >= 16) with_outputs(std::integral_constant<int, 3>());
      else with_outputs(std::integral_constant<int, 2>());
    }
  });
}

template <typename T>
void launch_tail(const char* name, const TailTask& task, Stream stream) {
  Arguments a = arguments<T>(task);
  const bool channels_last = task.shape.channels_last;
  const int columns = channels_last ? (a.OW + 1) / 2 : a.OW + 1;
  a.by_columns = Divisor(columns);
  Launch shape = share_out_units(a, channels_last, int64_t{a.N} * columns, kNarrow);
  // A block takes rows of outputs of these units, as many as any other.
  const int units = channels_last ? a.pixels_per_block : kNarrow / 32 * 31;
  shape.grid.x = static_cast<unsigned>((int64_t{a.units} + units - 1) / units * a.OH);
  keep_resident(shape, 3 * kNarrow);
  with_window(task, [&](auto K) {
    with_beta(task, [&](auto beta) {
      if (channels_last) {
        launch<&tail_vectors<T, K, beta>>(name, shape.grid, shape.block, 0, stream, a);
      } else {
        launch<&tail_planes<T, K, beta>>(name, shape.grid, shape.block, 0, stream, a);
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
    while (10 * across * (a.C / a.channels) < 9 * wanted && a.channels % 16 == 0 && a.channels > 32) a.channels /= 2;
    const int64_t run_blocks = a.C / a.channels;
    const int64_t most = task.dbias ? std::max<int64_t>(1, wanted / run_blocks) : across;
    return {folded_grid(std::min(across, most), run_blocks), dim3(kNarrow)};
  }
  const int threads = normalized || !channels_last ? kNarrow : kThreads;
  Launch shape = share_out_units(a, channels_last, units, threads);
  if (task.dbias) keep_resident(shape, threads == kNarrow ? 3 * kNarrow : 2 * kThreads);
  return shape;
}

template <typename T, Beta beta, bool rectified>
void launch_pool_backward(const char* name, const TailTask& task, Stream stream) {
  with_format<T>(task, [&](auto channels_last, auto length) {
    Arguments a = arguments<T>(task);
    const Launch shape = share_out_blocks(a, task);
    with_window(task, [&](auto K) {
      if constexpr (beta != Beta::none && !channels_last) {
        const size_t shared = sizeof(float) * (kNarrow / 32 * (8 * 33 + a.channels) + a.channels + 8);
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
