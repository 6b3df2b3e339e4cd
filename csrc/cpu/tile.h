// A tile holds some pixels with all their channels in the compute type, whatever the tensor's dtype and memory format.
//
// It is laid out so that LRN is one flat loop in either format: a channel's neighbours lie `step` lanes apart (1 in
// channels_last, the number of pixels in NCHW), and `pad` channels of zeros stand before, between and behind the groups.
#pragma once

#include "../tensor.h"
#include "vec.h"

namespace fastcnn::FASTCNN_CAPABILITY {

struct Tile {
  bool channels_last;
  int64_t channels, groups, pixels, pad;

  int64_t group() const { return channels / groups; }
  int64_t step() const { return channels_last ? 1 : pixels; }
  int64_t blocks() const { return channels_last ? pixels * groups : groups; }
  int64_t block_lanes() const { return (group() + pad) * step(); }
  int64_t begin() const { return pad * step(); }
  int64_t end() const { return blocks() * block_lanes(); }
  // Room for a tile: flat loops run on to the end of a vector, and their windows beyond that.
  int64_t lanes() const { return end() + begin() + kVectorBytes; }

  // Data are contiguous in memory and in the tile for runs of this many elements...
  int64_t run() const { return channels_last ? group() : pixels; }
  int64_t runs() const { return channels_last ? blocks() : channels; }
  // ...that start here.
  int64_t run_in_tile(int64_t r) const {
    return channels_last ? pad + r * (group() + pad) : (pad + r + r / group() * pad) * pixels;
  }
  int64_t run_in_memory(int64_t r, int64_t channel_stride) const {
    return channels_last ? r * group() : r * channel_stride;
  }
  int64_t first_channel(int64_t r) const { return channels_last ? r % groups * group() : r; }
};

template <typename A>
void clear_pads(const Tile& tile, A* x) {
  for (int64_t b = 0; b <= tile.blocks(); ++b) {
    A* pad = x + b * tile.block_lanes();
    for (int64_t i = 0; i < tile.pad * tile.step(); ++i) pad[i] = 0;
  }
}

// Read a tile: x + bias (if there is one), and not below `floor` (0: a ReLU; -inf: none; NaN stays).
template <typename T, typename A>
void load_tile(const Tile& tile, const T* x, int64_t channel_stride, const A* bias, A floor, A* out) {
  const int64_t n = tile.run(), runs = tile.runs();
  const auto floored = [=](Vec<A> v) { return v < floor ? broadcast(floor) : v; };
  for (int64_t r = 0; r < runs; ++r) {
    const T* from = x + tile.run_in_memory(r, channel_stride);
    A* to = out + tile.run_in_tile(r);
    if (bias == nullptr) {
      map<A>(from, to, n, [=](Vec<A> v, int64_t) { return floored(v); });
    } else if (tile.channels_last) {
      const A* b = bias + tile.first_channel(r);  // readable for a whole vector
      map<A>(from, to, n, [=](Vec<A> v, int64_t i) { return floored(v + load(b + i)); });
    } else {
      const Vec<A> b = broadcast(bias[r]);
      map<A>(from, to, n, [=](Vec<A> v, int64_t) { return floored(v + b); });
    }
  }
}

template <typename T, typename A>
void store_tile(const Tile& tile, const A* x, T* out, int64_t channel_stride) {
  for (int64_t r = 0; r < tile.runs(); ++r) {
    map<A>(x + tile.run_in_tile(r), out + tile.run_in_memory(r, channel_stride), tile.run(),
           [](Vec<A> v, int64_t) { return v; });
  }
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
