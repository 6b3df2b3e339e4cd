// Products of matrices whose sums stay in registers.
#pragma once

#include <algorithm>

#include "vec.h"

namespace fastcnn::FASTCNN_CAPABILITY {

using Floats = Vec<float>;
inline constexpr int64_t kLane = kLanes<float>;
// As many rows of sums, and vectors of each, as registers have room for beside what they are the products of.
inline constexpr int kRows = 6;
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

FASTCNN_INLINE int64_t row_blocks(int64_t rows) { return (rows + kRows - 1) / kRows; }

// Call run(number, r) for each block of at most kRows rows, from row r on, all of about the same size.
template <typename Run>
FASTCNN_INLINE void in_rows(int64_t rows, const Run& run) {
  const int64_t blocks = row_blocks(rows);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t r = rows * i / blocks;
    switch (rows * (i + 1) / blocks - r) {
      case 1: run(std::integral_constant<int, 1>{}, r); break;
      case 2: run(std::integral_constant<int, 2>{}, r); break;
      case 3: run(std::integral_constant<int, 3>{}, r); break;
      case 4: run(std::integral_constant<int, 4>{}, r); break;
      case 5: run(std::integral_constant<int, 5>{}, r); break;
      default: run(std::integral_constant<int, kRows>{}, r);
    }
  }
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
