// The tail of an AlexNet stage, max_pool2d(lrn(relu(x + bias))), any part of which may be absent, and its gradient.
// Memory: forward reads x once and writes the pooled map and its argmax; backward reads x, dy and argmax and writes dx.
#include "dispatch.cuh"
#include "fast/launch.cuh"
#include "fast/relu_lrn_max_pool2d.cuh"
#include "general/relu_lrn_max_pool2d.cuh"
#include "operators.h"

namespace fastcnn::cuda {
namespace fast {
namespace {

// Of maps of more than one column.
void launch_tail(const char* name, const TailTask& task, Stream stream) {
  with_dtype_and_format(task, [&](auto t, auto channels_last, auto) {
    using T = decltype(t);
    with_window(task, [&](auto K) {
      with_beta(task, [&](auto beta) {
        Arguments a = arguments(task);
        const int columns = channels_last ? (a.OW + 1) / 2 : a.OW + 1;
        a.by_columns = Divisor(columns);
        Launch shape = share_out_units(a, channels_last, int64_t{a.N} * columns, kNarrow);
        // A block takes rows of outputs of these units, as many as any other.
        const int units = channels_last ? a.pixels_per_block : kNarrow / 32 * 31;
        shape.grid.x = static_cast<unsigned>((int64_t{a.units} + units - 1) / units * a.OH);
        keep_resident(shape, kResidentNarrow);
        if constexpr (channels_last) {
          launch<&tail_vectors<T, K, beta>>(name, shape.grid, shape.block, 0, stream, a);
        } else {
          launch<&tail_planes<T, K, beta>>(name, shape.grid, shape.block, 0, stream, a);
        }
      });
    });
  });
}

void launch_tail_backward(const char* name, const TailTask& task, Stream stream) {
  with_dtype_and_format(task, [&](auto t, auto channels_last, auto length) {
    using T = decltype(t);
    with_window(task, [&](auto K) {
      with_beta(task, [&](auto beta) {
        Arguments a = arguments(task);
        const Launch shape = share_out_blocks(a, task);
        if constexpr (channels_last) {
          launch<&pool_backward<T, true, length, K, beta, true>>(name, shape.grid, shape.block,
                                                                 bytes_of_sums(a, length), stream, a);
        } else {
          const size_t bytes = sizeof(float) * floats_of_tail_backward(a.channels);
          launch<&tail_backward_planes<T, K, beta>>(name, shape.grid, shape.block, bytes, stream, a);
        }
      });
    });
  });
}

}  // namespace
}  // namespace fast

namespace {

// The bias gradient's second stage.
struct Partials {
  const void* partials;
  void* dbias;
  int64_t rows;
  int C;
};

template <typename A>
__global__ void __launch_bounds__(32 * general::kRowLanes) sum_partials(const Partials p) {
  general::add_rows(static_cast<const A*>(p.partials), p.rows, p.C,
                    [&](int c, A sum) { static_cast<A*>(p.dbias)[c] = sum; });
}

template <typename A>
void launch_sum_partials(const TailTask& task, Stream stream) {
  const Partials p{task.partials, task.dbias, bias_partials(task), general::channels_of(task)};
  general::launch_add_rows<&sum_partials<A>, A>("relu_lrn_max_pool2d_backward", p.C, stream, p);
}

}  // namespace

void relu_lrn_max_pool2d(const TailTask& task, Stream stream) {
  constexpr auto name = "relu_lrn_max_pool2d";
  if (empty(task)) return;
  if (!task.pool && task.lrn) return lrn(task, stream);
  if (task.pool && !task.lrn) return max_pool2d(task, stream);
  if (fast::takes(task) && task.shape.W > 1) return fast::launch_tail(name, task, stream);
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    using T = decltype(t);
    if (task.pool) general::launch_tail<T, channels_last>(name, task, stream);
    else general::launch_forward<T, channels_last, false>(name, task, stream);
  });
}

void relu_lrn_max_pool2d_backward(const TailTask& task, Stream stream) {
  constexpr auto name = "relu_lrn_max_pool2d_backward";
  if (empty(task)) {
    // The bias gradient is zero.
  } else if (!task.pool && task.lrn) {
    lrn_backward(task, stream);
  } else if (task.pool && !task.lrn) {
    max_pool2d_backward(task, stream);
  } else if (fast::takes(task)) {
    fast::launch_tail_backward(name, task, stream);
  } else {
    with_dtype_and_format(task, [&](auto t, auto channels_last) {
      using T = decltype(t);
      if (task.pool) general::launch_backward<T, channels_last, true, true>(name, task, stream);
      else general::launch_backward<T, channels_last, false, false>(name, task, stream);
    });
  }
  if (!task.dbias || !task.shape.C) return;
  if (task.dtype == DType::float64) launch_sum_partials<double>(task, stream);
  else launch_sum_partials<float>(task, stream);
}

// One row for each block along x of backward.
int64_t bias_partials(const TailTask& task) {
  if (empty(task)) return 0;
  if (fast::takes(task)) {
    fast::Arguments a = fast::arguments(task);
    return (task.pool ? fast::share_out_blocks(a, task) : fast::share_out_pixels(a, task)).grid.x;
  }
  int64_t rows = 0;
  with_dtype_and_format(task, [&](auto t, auto channels_last) {
    general::Arguments a = general::arguments(task, general::kRun<decltype(t)>);
    rows = general::share_out(a, channels_last, a.pixels, 0, general::kSumWaves).grid.x;
  });
  return rows;
}

}  // namespace fastcnn::cuda
