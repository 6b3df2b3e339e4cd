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

// B' d B of the tiles' `columns` channels from `first` on: to v, 16 matrices of tiles x channels, `plane` elements
// apart. A bit of the mask says whether an element of x counts.
template <bool masked>
void transform_input(const WinogradMaps& maps, const uint8_t* mask, int64_t begin, int64_t end, int64_t first,
                     int64_t columns, float* v, int64_t plane) {
  static constexpr float zeros[kLane] = {};
  const Shape& s = maps.shape;
  for (int64_t i = begin; i < end; ++i, v += columns) {
    const Position tile = position_of(maps, i);
    int64_t pixel[4][4];  // outside the map: -1
    for (int y = 0; y < 4; ++y)
      for (int x = 0; x < 4; ++x) {
        const int64_t h = tile.y + y - maps.padding[0], w = tile.x + x - maps.padding[1];
        pixel[y][x] = h >= 0 && h < s.H && w >= 0 && w < s.W ? ((tile.n * s.H + h) * s.W + w) * s.C + first : -1;
      }
    for (int64_t c = 0; c < columns; c += kLane) {
      Floats d[4][4];
      for (int y = 0; y < 4; ++y) {
        Floats in[4];
        for (int x = 0; x < 4; ++x) {
          const int64_t at = pixel[y][x] + c;
          in[x] = load(pixel[y][x] < 0 ? zeros : maps.x + at);
          if (masked && pixel[y][x] >= 0) in[x] = where_set<float>(load_bits(mask, at), in[x]);
        }
        d[y][0] = in[0] - in[2];
        d[y][1] = in[1] + in[2];
        d[y][2] = in[2] - in[1];
        d[y][3] = in[1] - in[3];
      }
      for (int x = 0; x < 4; ++x) {
        store(v + (0 + x) * plane + c, d[0][x] - d[2][x]);
        store(v + (4 + x) * plane + c, d[1][x] + d[2][x]);
        store(v + (8 + x) * plane + c, d[2][x] - d[1][x]);
        store(v + (12 + x) * plane + c, d[1][x] - d[3][x]);
      }
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
