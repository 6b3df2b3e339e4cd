// Max pooling of tiles that hold one row each: the pool's maximum and its gather, as the CPU kernels share them.
//
// A row is pooled along W first and the pooled rows along H, which keeps torch's rules: of equal values the first in
// row-major order wins, and a NaN always takes over, so that of several the last stays.
#pragma once

#include <limits>

#include "../max_pool2d.h"
#include "tile.h"

namespace fastcnn::FASTCNN_CAPABILITY {

template <typename A>
struct PooledRow {
  A* values;
  Lane<A>* places;  // of the maxima: kw, or kh * KW + kw
};

// A pooled row in scratch has the runs of a tile of OW pixels, each with room for whole vectors and for `margin` outputs
// that do not exist before and behind.
struct PooledLayout {
  bool channels_last;
  int64_t groups, group, width, margin;

  int64_t run() const { return channels_last ? group : width; }
  int64_t runs() const { return channels_last ? width * groups : groups * group; }
  int64_t stride() const { return (run() + 2 * margin + kVectorBytes - 1) / kVectorBytes * kVectorBytes; }
  int64_t lanes() const { return runs() * stride(); }
  int64_t start(int64_t r) const { return r * stride() + margin; }
};

template <typename A>
struct Maximum {
  Vec<A> value;
  IntVec<A> place;

  // Of a dilated window that steps over the whole map. Its place is outside, so that no element gets its gradient.
  static Maximum of_nothing() { return {broadcast(-std::numeric_limits<A>::infinity()), IntVec<A>{}}; }

  void take(Vec<A> v, IntVec<A> p) {
    const auto wins = (v > value) | (v != v);
    value = wins ? v : value;
    place = wins ? p : place;
  }
};

template <typename A>
inline IntVec<A> places(int64_t p) {
  return IntVec<A>{} + static_cast<Lane<A>>(p);
}

template <typename A>
void pool_columns_channels_last(const PoolAxis& w, const Tile& tile, const A* x, const PooledLayout& layout,
                                const PooledRow<A>& out) {
  for (int64_t o = 0; o < w.out; ++o) {
    const int64_t first = w.first(o), last = w.last(o);
    for (int64_t g = 0; g < tile.groups; ++g) {
      const A* window = x + tile.in_scratch(w.element(o, 0) * tile.groups + g);
      const int64_t step = w.dilation * tile.groups * tile.run(), to = layout.start(o * tile.groups + g);
      for (int64_t c = 0; c < tile.group(); c += kLanes<A>) {
        Maximum<A> best = Maximum<A>::of_nothing();
        if (first < last) best = {load(window + first * step + c), places<A>(first)};
        for (int64_t i = first + 1; i < last; ++i) best.take(load(window + i * step + c), places<A>(i));
        store(out.values + to + c, best.value);
        std::memcpy(out.places + to + c, &best.place, sizeof best.place);
      }
    }
  }
}

// A row of NCHW with -inf where windows reach over its ends; `firsts` are the windows' first elements inside the map.
template <typename A>
struct PaddedRow {
  A* row;
  Lane<A>* firsts;
};

template <int stride, typename A>
inline Vec<A> load_strided(const A* p, int64_t any) {
  if constexpr (stride == 1) return load(p);
  if constexpr (stride == 2) return load_even(p);
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = p[i * any];
  return v;
}

template <int stride, typename A>
void pool_columns_nchw(const PoolAxis& w, const Tile& tile, const A* x, const PooledLayout& layout,
                       const PooledRow<A>& out, const PaddedRow<A>& padded, int64_t ahead) {
  const bool clipped = w.padding > 0 || w.element(w.out - 1, w.reach() - 1) >= w.size;
  for (int64_t c = 0; c < tile.channels; ++c) {
    const A* row = x + tile.in_scratch(c);
    if (ahead) for (int64_t i = 0; i < w.size; i += kVectorBytes / sizeof(A)) __builtin_prefetch(row + ahead + i);
    if (clipped) {
      std::memcpy(padded.row + w.padding, row, w.size * sizeof(A));
      row = padded.row + w.padding;
    }
    for (int64_t o = 0; o < w.out; o += kLanes<A>) {
      const A* window = row + w.element(o, 0);
      Maximum<A> best{load_strided<stride>(window, w.stride), load_as<IntVec<A>>(padded.firsts + o)};
      for (int64_t i = 1; i < w.reach(); ++i) {
        best.take(load_strided<stride>(window + i * w.dilation, w.stride), places<A>(i));
      }
      store(out.values + layout.start(c) + o, best.value);
      std::memcpy(out.places + layout.start(c) + o, &best.place, sizeof best.place);
    }
  }
}

// How far behind a tile the functions of this file may read or write.
inline int64_t pool_slack(const PoolAxis& w) {
  return 2 * w.padding + w.reach() * w.dilation + (w.stride + 1) * kVectorBytes;
}

// The maxima along W of the tile's row.
template <typename A>
void pool_columns(const PoolAxis& w, const Tile& tile, const A* x, const PooledLayout& layout, const PooledRow<A>& out,
                  const PaddedRow<A>& padded, int64_t ahead) {
  if (tile.channels_last) return pool_columns_channels_last(w, tile, x, layout, out);
  if (w.stride == 1) return pool_columns_nchw<1>(w, tile, x, layout, out, padded, ahead);
  if (w.stride == 2) return pool_columns_nchw<2>(w, tile, x, layout, out, padded, ahead);
  pool_columns_nchw<0>(w, tile, x, layout, out, padded, ahead);
}

// A window on dy whose gradient an input element gets where the window's maximum is at `place`.
template <typename A>
struct Source {
  const A* dy;
  const Lane<A>* argmax;
  Lane<A> place;
};

template <typename A>
inline Vec<A> gather(const Source<A>* sources, int64_t count, int64_t at) {
  Vec<A> sum = {};
  for (int64_t s = 0; s < count; ++s) {
    const auto mine = load_as<IntVec<A>>(sources[s].argmax + at) == places<A>(sources[s].place);
    sum += mine ? load(sources[s].dy + at) : Vec<A>{};
  }
  return sum;
}

// The windows of pooled rows that hold an input row: rows[i] is the row of which it is line kh[i].
template <typename A>
struct Covering {
  PooledRow<A>* rows;
  int64_t* kh;
  int64_t count;
};

template <typename A>
void gather_channels_last(const PoolAxis& w, const Covering<A>& covering, const Tile& tile, const PooledLayout& layout,
                          Source<A>* sources, A* dx) {
  for (int64_t column = 0; column < w.size; ++column) {
    int64_t count = 0;
    for (int64_t i = 0; i < covering.count; ++i) {
      for (int64_t kw = 0; kw < w.reach(); ++kw) {
        const int64_t shifted = column + w.padding - kw * w.dilation, o = shifted / w.stride;
        if (shifted < 0 || shifted % w.stride || o >= w.out) continue;
        const PooledRow<A>& row = covering.rows[i];
        const int64_t at = layout.start(o * tile.groups);
        const auto place = static_cast<Lane<A>>(covering.kh[i] * w.kernel + kw);
        sources[count++] = {row.values + at, row.places + at, place};
      }
    }
    for (int64_t g = 0; g < tile.groups; ++g) {
      A* to = dx + tile.in_scratch(column * tile.groups + g);
      for (int64_t c = 0; c < tile.group(); c += kLanes<A>) store(to + c, gather(sources, count, g * layout.stride() + c));
    }
  }
}

// Columns of one phase, column % stride, see the same kw at the same distance: their gather is a flat loop over outputs.
template <typename A>
void gather_nchw(const PoolAxis& w, const Covering<A>& covering, const Tile& tile, const PooledLayout& layout,
                 Source<A>* sources, int64_t* counts, A* dx) {
  const int64_t most = covering.count * w.reach();
  for (int64_t phase = 0; phase < w.stride; ++phase) {
    Source<A>* mine = sources + phase * most;
    counts[phase] = 0;
    for (int64_t i = 0; i < covering.count; ++i) {
      for (int64_t kw = 0; kw < w.reach(); ++kw) {
        const int64_t shifted = phase + w.padding - kw * w.dilation;
        if (shifted % w.stride) continue;
        const int64_t at = layout.start(0) + shifted / w.stride;
        const auto place = static_cast<Lane<A>>(covering.kh[i] * w.kernel + kw);
        mine[counts[phase]++] = {covering.rows[i].values + at, covering.rows[i].places + at, place};
      }
    }
  }
  const int64_t per_phase = (w.size + w.stride - 1) / w.stride;
  for (int64_t c = 0; c < tile.channels; ++c) {
    A* row = dx + tile.in_scratch(c);
    const int64_t from = c * layout.stride();
    for (int64_t j = 0; j < per_phase; j += kLanes<A>) {
      const auto phase = [&](int64_t p) { return gather(sources + p * most, counts[p], from + j); };
      if (w.stride == 1) {
        store(row + j, phase(0));
      } else if (w.stride == 2) {
        store_interleaved(row + 2 * j, phase(0), phase(1));
      } else {
        for (int64_t p = 0; p < w.stride; ++p) {
          const Vec<A> v = phase(p);
          for (int64_t l = 0; l < kLanes<A> && (j + l) * w.stride + p < w.size; ++l) row[(j + l) * w.stride + p] = v[l];
        }
      }
    }
  }
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
