// What Winograd's convolution and its weight gradient have in common: tiles, panels, the transformed input.
#pragma once

#include <algorithm>

#include "bits.h"
#include "product.h"
#include "winograd.h"

namespace fastcnn::FASTCNN_CAPABILITY {

FASTCNN_INLINE int64_t tiles_across(const WinogradMaps& maps) { return (maps.out_w + 1) / 2; }
FASTCNN_INLINE int64_t tiles_per_image(const WinogradMaps& maps) { return (maps.out_h + 1) / 2 * tiles_across(maps); }
FASTCNN_INLINE int64_t tiles(const WinogradMaps& maps) { return maps.shape.N * tiles_per_image(maps); }

// Channels of a group are cut into panels of at most `most`, all multiples of 16: how many, and where each begins.
FASTCNN_INLINE int64_t panels(int64_t channels, int64_t most) { return (channels + most - 1) / most; }
FASTCNN_INLINE int64_t panel_begin(int64_t channels, int64_t most, int64_t panel) {
  return channels / 16 * panel / panels(channels, most) * 16;
}

// Elements from matrix to matrix: a little more than theirs, or the same place of all 16 falls on one cache line.
FASTCNN_INLINE int64_t plane_of(int64_t tiles, int64_t columns) { return tiles * columns + 16; }

// Of a tile's first output.
struct Position {
  int64_t n, y, x;
};

FASTCNN_INLINE Position position_of(const WinogradMaps& maps, int64_t tile) {
  const int64_t across = tiles_across(maps), in_image = tile % tiles_per_image(maps);
  return {tile / tiles_per_image(maps), in_image / across * 2, in_image % across * 2};
}

// Prefetches the maps of a block of tiles while the products of the one before are computed, a few lines at a time.
// Otherwise a third of the time would be spent waiting for them. Addresses may be out of bounds.
class Prefetcher {
 public:
  // Of tiles begin ... end-1, in this many steps.
  Prefetcher(const WinogradMaps& maps, int64_t begin, int64_t end, int64_t steps)
      : maps_(maps), begin_(begin), pixels_(std::max<int64_t>(0, end - begin) * 4), steps_(steps) {}

  // Call ask(tile's position, y, x) for each of its 2x2 pixels.
  template <typename Ask>
  FASTCNN_INLINE void step(const Ask& ask) {
    for (const int64_t last = pixels_ * ++step_ / steps_; pixel_ < last; ++pixel_)
      ask(position_of(maps_, begin_ + pixel_ / 4), pixel_ / 2 % 2, pixel_ % 2);
  }

  static FASTCNN_INLINE void ask(const float* map, int64_t element, int64_t count) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(map) + element * sizeof(float);
    for (int64_t i = 0; i < count; i += 16)
      __builtin_prefetch(reinterpret_cast<const char*>(from + i * sizeof(float)), 0, 2);
  }

 private:
  const WinogradMaps& maps_;
  int64_t begin_, pixels_, steps_, step_ = 0, pixel_ = 0;
};

// -- pieces of a window -----------------------------------------------------------------------------------------------

// A part of a window, from row y and column x on. A window of 3x3 has one, one of 5x5 four, whose convolutions add up:
// with 49 products for 4 outputs instead of 100, and of the same few roundings as 3x3. (One piece of 5x5 would take
// 36, but the numbers that it multiplies by make the error many times as large.)
template <int begin_y, int begin_x, int taps_y, int taps_x>
struct Piece {
  static constexpr int y = begin_y, x = begin_x, rows = taps_y, columns = taps_x;
  static constexpr int products_down = rows + 1, products_across = columns + 1;
  static constexpr int products = products_down * products_across;
};
inline constexpr int kMostProducts = 16;

FASTCNN_INLINE int64_t pieces(int64_t window) { return window == 3 ? 1 : 4; }

// Call run(a Piece) for one piece of a window.
template <typename Run>
FASTCNN_INLINE void with_piece(int64_t piece, const Run& run) {
  switch (piece) {
    case 0: return run(Piece<0, 0, 3, 3>{});
    case 1: return run(Piece<0, 3, 3, 2>{});
    case 2: return run(Piece<3, 0, 2, 3>{});
    default: return run(Piece<3, 3, 2, 2>{});
  }
}

// Along one axis: F(2, 3) takes 4 products and F(2, 2) takes 3, each of one of these inputs and one of these weights,
template <typename V>
FASTCNN_INLINE void input_points(const V (&d)[4], V (&v)[4]) {
  v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
}
template <typename V>
FASTCNN_INLINE void input_points(const V (&d)[3], V (&v)[3]) {
  v[0] = d[0] - d[1], v[1] = d[1], v[2] = d[1] - d[2];
}

template <typename V>
FASTCNN_INLINE void weight_points(const V (&w)[3], V (&u)[4]) {
  u[0] = w[0], u[1] = (w[0] + w[1] + w[2]) / 2, u[2] = (w[0] - w[1] + w[2]) / 2, u[3] = w[2];
}
template <typename V>
FASTCNN_INLINE void weight_points(const V (&w)[2], V (&u)[3]) {
  u[0] = w[0], u[1] = w[0] + w[1], u[2] = w[1];
}

// of which these are the 2 outputs.
template <typename V>
FASTCNN_INLINE void outputs_of(const V (&m)[4], V (&y)[2]) {
  y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3];
}
template <typename V>
FASTCNN_INLINE void outputs_of(const V (&m)[3], V (&y)[2]) {
  y[0] = m[0] + m[1], y[1] = m[1] - m[2];
}

// F(3, 2) and F(2, 2), the transposes: the products of the same inputs and these gradients are summed up to m, of which
// these are the gradients of the weights.
template <typename V>
FASTCNN_INLINE void gradient_points(const V (&e)[2], V (&z)[4]) {
  z[0] = e[0], z[1] = e[0] + e[1], z[2] = e[0] - e[1], z[3] = -e[1];
}
template <typename V>
FASTCNN_INLINE void gradient_points(const V (&e)[2], V (&z)[3]) {
  z[0] = e[0], z[1] = e[0] + e[1], z[2] = -e[1];
}

template <typename V>
FASTCNN_INLINE void weights_of(const V (&m)[4], V (&w)[3]) {
  const V half = (m[1] + m[2]) * 0.5f;
  w[0] = m[0] + half, w[1] = (m[1] - m[2]) * 0.5f, w[2] = half + m[3];
}
template <typename V>
FASTCNN_INLINE void weights_of(const V (&m)[3], V (&w)[2]) {
  w[0] = m[0] + m[1], w[1] = m[1] + m[2];
}

// `along` the rows of a matrix, then its columns.
template <int rows, int columns, int new_rows, int new_columns, typename V, typename Along>
FASTCNN_INLINE void both_axes(const V (&in)[rows][columns], V (&out)[new_rows][new_columns], const Along& along) {
  V half[rows][new_columns];
  for (int y = 0; y < rows; ++y) along(in[y], half[y]);
  for (int x = 0; x < new_columns; ++x) {
    V column[rows], changed[new_rows];
    for (int y = 0; y < rows; ++y) column[y] = half[y][x];
    along(column, changed);
    for (int y = 0; y < new_rows; ++y) out[y][x] = changed[y];
  }
}

// B' d B of the tiles' `columns` channels from `first` on: to v, as many matrices of tiles x channels as the piece of
// the window takes products, `plane` elements apart. A bit of the mask says whether an element of x counts.
template <typename P, bool masked>
void transform_input(const WinogradMaps& maps, const uint8_t* mask, int64_t begin, int64_t end, int64_t first,
                     int64_t columns, float* v, int64_t plane) {
  constexpr int down = P::products_down, across = P::products_across;
  static constexpr float zeros[kLane] = {};
  const Shape& s = maps.shape;
  for (int64_t i = begin; i < end; ++i, v += columns) {
    const Position tile = position_of(maps, i);
    int64_t pixel[down][across];  // outside the map: -1
    for (int y = 0; y < down; ++y)
      for (int x = 0; x < across; ++x) {
        const int64_t h = tile.y + P::y + y - maps.padding[0], w = tile.x + P::x + x - maps.padding[1];
        pixel[y][x] = h >= 0 && h < s.H && w >= 0 && w < s.W ? ((tile.n * s.H + h) * s.W + w) * s.C + first : -1;
      }
    for (int64_t c = 0; c < columns; c += kLane) {
      Floats d[down][across], changed[down][across];
      for (int y = 0; y < down; ++y)
        for (int x = 0; x < across; ++x) {
          const int64_t at = pixel[y][x] + c;
          d[y][x] = load(pixel[y][x] < 0 ? zeros : maps.x + at);
          if (masked && pixel[y][x] >= 0) d[y][x] = where_set<float>(load_bits(mask, at), d[y][x]);
        }
      both_axes(d, changed, [](const auto& in, auto& out) FASTCNN_INLINE_LAMBDA { input_points(in, out); });
      for (int y = 0; y < down; ++y)
        for (int x = 0; x < across; ++x) store(v + (y * across + x) * plane + c, changed[y][x]);
    }
  }
}

// `largest` are bits of magnitudes, which are in the order of the values, with NaN last.
FASTCNN_INLINE void keep_larger(IntVec<float>& largest, Floats value) {
  const IntVec<float> magnitude = (IntVec<float>)value & 0x7fffffff;
  largest = magnitude > largest ? magnitude : largest;
}

FASTCNN_INLINE void report(const IntVec<float>& largest, std::atomic<uint32_t>& of_all) {
  uint32_t most = 0;
  for (int l = 0; l < kLane; ++l) most = std::max(most, static_cast<uint32_t>(largest[l]));
  for (uint32_t seen = of_all.load(); seen < most && !of_all.compare_exchange_weak(seen, most);) {
  }
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
