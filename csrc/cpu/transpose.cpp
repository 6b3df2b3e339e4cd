// From one memory format to the other: transposes matrices in squares of vectors, in registers.
// Memory: reads x and writes out once. A panel of the longer axis is read or written in one piece, and stays in cache.
#include "transpose.h"

#include <algorithm>

#include "kernel.h"
#include "vec.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

constexpr int64_t kPanel = 128, kLane = kLanes<float>;

int64_t panels(const TransposeTask& task) { return (std::max(task.rows, task.columns) + kPanel - 1) / kPanel; }

int64_t units(const TransposeTask& task) { return task.matrices * panels(task); }

#if FASTCNN_SHUFFLE
// Halves of squares change places, then halves of these.
template <int step>
FASTCNN_INLINE void exchange(Vec<float> (&square)[kLane]) {
  if constexpr (step < kLane) {
    [&]<int... l>(std::integer_sequence<int, l...>) FASTCNN_INLINE_LAMBDA {
      for (int i = 0; i < kLane; ++i) {
        if (i & step) continue;
        const Vec<float> a = square[i], b = square[i + step];
        square[i] = __builtin_shufflevector(a, b, (l & step ? kLane + l - step : l)...);
        square[i + step] = __builtin_shufflevector(a, b, (l & step ? kLane + l : l + step)...);
      }
    }(std::make_integer_sequence<int, kLane>{});
    exchange<2 * step>(square);
  }
}
#endif

FASTCNN_INLINE void transpose(Vec<float> (&square)[kLane]) {
#if FASTCNN_SHUFFLE
  exchange<1>(square);
#else
  for (int i = 0; i < kLane; ++i)
    for (int l = 0; l < i; ++l) {
      const float swapped = square[i][l];
      square[i][l] = square[l][i], square[l][i] = swapped;
    }
#endif
}

// Rows r ... and columns c ... of a matrix of so many rows and columns, a square or what there is of one.
FASTCNN_INLINE void transpose_square(const float* x, float* out, int64_t rows, int64_t columns, int64_t r, int64_t c) {
  const int64_t height = std::min(kLane, rows - r), width = std::min(kLane, columns - c);
  Vec<float> square[kLane];
  for (int64_t i = 0; i < kLane; ++i) {
    square[i] = i < height ? load_some(x + (r + i) * columns + c, width) : Vec<float>{};
  }
  transpose(square);
  for (int64_t i = 0; i < width; ++i) store_some(out + (c + i) * rows + r, square[i], height);
}

void run(const TransposeTask& task, int64_t begin, int64_t end, void*) {
  const int64_t rows = task.rows, columns = task.columns;
  const bool is_wide = columns > rows;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t first = u % panels(task) * kPanel, last = std::min(first + kPanel, std::max(rows, columns));
    const int64_t at = u / panels(task) * rows * columns;
    for (int64_t i = 0; i < std::min(rows, columns); i += kLane)
      for (int64_t j = first; j < last; j += kLane) {
        transpose_square(task.x + at, task.out + at, rows, columns, is_wide ? i : j, is_wide ? j : i);
      }
  }
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(transpose, TransposeTask, units, nullptr, run)
