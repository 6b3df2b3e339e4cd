// A tile is some pixels with all their channels, in either memory format. It is handled by runs, the pieces in which it
// is contiguous: in NCHW a run is one channel of all the pixels, in channels_last one group of channels of one pixel.
//
// Kernels are written on sources and sinks: source(r)(i) gives the vector at element i of run r in the compute type,
// sink(r)(i, v) takes it. They read and write tensors of any dtype, or a tile in scratch. A run shorter than a vector
// is one vector with whatever follows it in the rest; only its own elements are read from and written to tensors.
#pragma once

#include "../tensor.h"
#include "vec.h"

namespace fastcnn::FASTCNN_CAPABILITY {

struct Tile {
  bool channels_last;
  int64_t channels, groups, pixels;
  int64_t pad = 0;  // zeros between the runs of a tile in scratch

  int64_t group() const { return channels / groups; }
  int64_t run() const { return channels_last ? group() : pixels; }
  int64_t runs() const { return channels_last ? pixels * groups : channels; }
  int64_t in_memory(int64_t r, int64_t channel_stride) const { return r * (channels_last ? run() : channel_stride); }
  int64_t in_scratch(int64_t r) const { return pad + r * (run() + pad); }
  int64_t first_channel(int64_t r) const { return channels_last ? r % groups * run() : r; }
  // Room for a tile in scratch; vectors, and windows on them, run on beyond its end.
  int64_t lanes() const { return in_scratch(runs()) + pad + kVectorBytes; }
};

// Call f(i) for vectors that together cover the n elements of a run. The last one overlaps its neighbour where n is no
// multiple of the lanes, so f must be idempotent.
template <typename A, typename F>
FASTCNN_INLINE void for_each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= n; i += kLanes<A>) f(i);
  if (i < n) f(n > kLanes<A> ? n - kLanes<A> : 0);
}

// The same, with the number of its elements: f(i, n), which for a whole vector is a constant of the compiler's.
template <typename A, typename F>
FASTCNN_INLINE void for_each_piece(int64_t n, F f) {
  if (n < kLanes<A>) return f(int64_t{0}, n);
  for_each_vector<A>(n, [&](int64_t i) FASTCNN_INLINE_LAMBDA { f(i, WholeVector<A>{}); });
}

// A tensor's elements. Reading one asks for that `ahead` elements further, which will be needed a little later: the
// pieces in which tensors are read are too short for the hardware to see them coming.
template <typename T>
struct TensorSource {
  using A = Compute<T>;
  Tile tile;
  const T* x;
  int64_t channel_stride, ahead;

  FASTCNN_INLINE auto operator()(int64_t r) const {
    return [from = x + tile.in_memory(r, channel_stride), n = tile.run(),
            ahead = ahead](int64_t i) FASTCNN_INLINE_LAMBDA {
      // A vector of 16-bit elements is half a line: every other one asks.
      if (sizeof(T) == sizeof(A) || (i & kLanes<A>) == 0) {
        __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(from + i) + ahead * sizeof(T)));
      }
      return n < kLanes<A> ? load_first(from, n) : load(from + i);
    };
  }
};

// A tensor's x + bias, not below `floor` (0: a ReLU; -inf: none; NaN stays).
template <typename T>
struct RectifiedSource {
  using A = Compute<T>;
  TensorSource<T> x;
  const A* bias;  // -0 changes nothing; readable for a vector beyond its end
  A floor;

  FASTCNN_INLINE auto operator()(int64_t r) const {
    const A* b = bias + x.tile.first_channel(r);
    return [from = x(r), b, one = broadcast(*b), many = x.tile.channels_last, low = broadcast(floor)](int64_t i)
               FASTCNN_INLINE_LAMBDA {
                 const Vec<A> v = from(i) + (many ? load(b + i) : one);
                 return v < low ? low : v;
               };
  }
};

// Writing an element asks for those that will be written a little later, which otherwise were waited for one by one.
template <typename T>
struct TensorSink {
  using A = Compute<T>;
  Tile tile;
  T* out;
  int64_t channel_stride;

  FASTCNN_INLINE auto operator()(int64_t r) const {
    return [to = out + tile.in_memory(r, channel_stride), n = tile.run()](int64_t i, Vec<A> v) FASTCNN_INLINE_LAMBDA {
      constexpr int kAhead = 512;  // bytes
      __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(to + i) + kAhead), 1);
      if (n < kLanes<A>) store_first(to, v, n);
      else store(to + i, v);
    };
  }
};

template <typename A>
struct TileSource {
  Tile tile;
  const A* x;
  FASTCNN_INLINE auto operator()(int64_t r) const {
    return [from = x + tile.in_scratch(r)](int64_t i) FASTCNN_INLINE_LAMBDA { return load(from + i); };
  }
};

// In ascending order of runs: what a vector writes beyond its run's end is overwritten by the next, or lies in a pad.
template <typename A>
struct TileSink {
  Tile tile;
  A* out;
  FASTCNN_INLINE auto operator()(int64_t r) const {
    return [to = out + tile.in_scratch(r)](int64_t i, Vec<A> v) FASTCNN_INLINE_LAMBDA { store(to + i, v); };
  }
};

template <typename A, typename Source, typename Sink>
FASTCNN_INLINE void copy(const Tile& tile, Source source, Sink sink) {
  const int64_t runs = tile.runs(), n = tile.run();
  for (int64_t r = 0; r < runs; ++r) {
    const auto from = source(r);
    const auto to = sink(r);
    for_each_vector<A>(n, [&](int64_t i) FASTCNN_INLINE_LAMBDA { to(i, from(i)); });
  }
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
