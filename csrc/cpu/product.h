// Products of matrices whose sums stay in registers.
#pragma once

#include <algorithm>

#include "vec.h"

namespace fastcnn::FASTCNN_CAPABILITY {

using Floats = Vec<float>;
inline constexpr int64_t kLane = kLanes<float>;
// As many vectors of a row as leave registers for 6 rows of sums.
inline constexpr int kColumns = kVectorBytes == 64 ? 4 : 2;

// sums[rows x columns] = a[rows x depth] * b[depth x columns], added to what is there or not. Element (r, d) of a is
// a[r * a_row + d * a_depth]; rows of b are b_row elements apart, those of sums sums_row.
template <int rows, int columns>
FASTCNN_INLINE void multiply_rows(const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_row,
                                  int64_t depth, float* sums, int64_t sums_row, bool add) {
  Floats sum[rows][columns];
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < columns; ++j) sum[r][j] = Floats{};
  for (int64_t d = 0; d < depth; ++d, b += b_row) {
    Floats row[columns];
    for (int j = 0; j < columns; ++j) row[j] = load(b + j * kLane);
    for (int r = 0; r < rows; ++r) {
      const Floats value = broadcast(a[r * a_row + d * a_depth]);
      for (int j = 0; j < columns; ++j) sum[r][j] += value * row[j];
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < columns; ++j) {
      float* const to = sums + r * sums_row + j * kLane;
      store(to, add ? load(to) + sum[r][j] : sum[r][j]);
    }
}

// Call run(number) for as many vectors at a time, from column j on, as multiply_rows may take; there are a
// multiple of 16 columns.
template <typename Run>
FASTCNN_INLINE void in_columns(int64_t columns, const Run& run) {
  for (int64_t j = 0; j < columns; j += kColumns * kLane) switch (std::min<int64_t>(kColumns, (columns - j) / kLane)) {
      case 1: run(std::integral_constant<int, 1>{}, j); break;
      case 3: run(std::integral_constant<int, std::min(kColumns, 3)>{}, j); break;
      case 4: run(std::integral_constant<int, kColumns>{}, j); break;
      default: run(std::integral_constant<int, 2>{}, j);
    }
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
