// Max pooling row by row, and its gradient, which gathers: PoolForward and PoolBackward, as max_pool2d and
// relu_lrn_max_pool2d share them. A tile is a row of the map.
//
// A row is pooled along W first and the pooled rows along H, which keeps torch's rules: of equal values the first in
// row-major order wins, and a NaN always takes over, so that of several the last stays.
#pragma once

#include <limits>

#include "../relu_lrn_max_pool2d.h"
#include "scratch.h"
#include "tile.h"

namespace fastcnn::FASTCNN_CAPABILITY {

template <typename A>
struct PooledRow {
  A* values;
  Lane<A>* places;  // of the maxima: kw, or kh * KW + kw
};

// A pooled row in scratch has the runs of a tile of OW pixels, each with room for whole vectors and for `margin`
// outputs that do not exist before and after them.
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
  void store_to(const PooledRow<A>& row, int64_t at) const {
    store(row.values + at, value);
    std::memcpy(row.places + at, &place, sizeof place);
  }
};

template <typename A>
IntVec<A> places(int64_t p) {
  return IntVec<A>{} + static_cast<Lane<A>>(p);
}

// How far beyond a tile pooling may read or write.
inline int64_t pool_slack(const PoolAxis& w) {
  return 2 * w.padding + w.reach() * w.dilation + (w.stride + 1) * kVectorBytes;
}

inline int64_t row_offset(const Shape& shape, int64_t n, int64_t h) {
  return n * shape.image_stride() + h * shape.W * shape.pixel_stride();
}

// What a kernel knows of the rows of x, or of a tensor of its shape.
template <typename T>
struct Rows {
  using A = Compute<T>;
  const TailTask& task;
  const Tile tile{task.shape.channels_last, task.shape.C, task.lrn.groups, task.shape.W};
  const int64_t ahead = tile.channels_last ? 2048 : 2 * tile.pixels;  // in NCHW, the row after the next

  TensorSource<T> source(const void* x, int64_t n, int64_t row) const {
    const int64_t at = row_offset(task.shape, n, row);
    return {tile, static_cast<const T*>(x) + at, task.shape.channel_stride(), ahead};
  }
  TensorSink<T> sink(void* out, int64_t n, int64_t row) const {
    return {tile, static_cast<T*>(out) + row_offset(task.shape, n, row), task.shape.channel_stride()};
  }
  // A row in the compute type, with room for what pooling reads and writes beyond it.
  A* take(Scratch& scratch) const { return scratch.take<A>(tile.lanes() + pool_slack(task.pool.w)); }
};

template <int stride, typename A>
Vec<A> load_strided(const A* p, int64_t any) {
  if constexpr (stride == 1) return load(p);
  if constexpr (stride == 2) return load_even(p);
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = p[i * any];
  return v;
}

template <typename T>
class PoolForward {
  using A = Compute<T>;

 public:
  PoolForward(const Rows<T>& rows, Scratch& scratch)
      : rows_(rows),
        row_(rows.take(scratch)),
        ring_{scratch.take<A>(slots_ * layout_.lanes()), scratch.take<Lane<A>>(slots_ * layout_.lanes())},
        owners_(scratch.take<int64_t>(slots_)),
        padded_(scratch.take<A>(w_.size + pool_slack(w_))),
        firsts_(scratch.take<Lane<A>>(w_.out + kVectorBytes)) {
    if (scratch.only_counts()) return;
    for (int64_t i = 0; i < slots_; ++i) owners_[i] = -1;
    for (int64_t i = 0; i < w_.size + pool_slack(w_); ++i) padded_[i] = -std::numeric_limits<A>::infinity();
    for (int64_t o = 0; o < w_.out; ++o) firsts_[o] = w_.first(o) < w_.last(o) ? w_.first(o) : 0;
  }

  // Row o of image n's output. produce(n, row, sink) hands a row of what is pooled to a sink.
  template <typename Produce>
  void write(int64_t n, int64_t o, Produce produce) const {
    if (task_.pool.wide_argmax()) write(n, o, produce, static_cast<int32_t*>(task_.argmax));
    else write(n, o, produce, static_cast<uint8_t*>(task_.argmax));
  }

 private:
  template <typename Produce, typename Argmax>
  void write(int64_t n, int64_t o, Produce produce, Argmax* argmax) const {
    typedef typename VectorOf<Argmax, kLanes<A>>::type Narrow;
    const int64_t first = h_.first(o), last = h_.last(o), at = row_offset(out_, n, o);
    for (int64_t i = first; i < last; ++i) pool_along_width(n, h_.element(o, i), produce);
    const Tile pooled{out_.channels_last, out_.C, rows_.tile.groups, out_.W};
    const TensorSink<T> sink{pooled, static_cast<T*>(task_.out) + at, out_.channel_stride()};
    for (int64_t r = 0; r < pooled.runs(); ++r) {
      const auto to = sink(r);
      Argmax* const to_argmax = argmax ? argmax + at + pooled.in_memory(r, out_.channel_stride()) : nullptr;
      for_each_vector<A>(pooled.run(), [&](int64_t lane) FASTCNN_INLINE_LAMBDA {
        Maximum<A> best = Maximum<A>::of_nothing();
        for (int64_t i = first; i < last; ++i) {
          const int64_t from = h_.element(o, i) % slots_ * layout_.lanes() + layout_.start(r) + lane;
          const IntVec<A> place = load_as<IntVec<A>>(ring_.places + from) + places<A>(i * w_.kernel);
          if (i == first) best = {load(ring_.values + from), place};
          else best.take(load(ring_.values + from), place);
        }
        to(lane, best.value);
        if (!argmax) return;
        const Narrow narrow = __builtin_convertvector(best.place, Narrow);
        if (pooled.run() >= kLanes<A>) std::memcpy(to_argmax + lane, &narrow, sizeof narrow);
        else std::memcpy(to_argmax, &narrow, pooled.run() * sizeof(Argmax));
      });
    }
  }

  template <typename Produce>
  void pool_along_width(int64_t n, int64_t row, Produce produce) const {
    const int64_t slot = row % slots_, owner = n * h_.size + row, at = slot * layout_.lanes();
    if (owners_[slot] == owner) return;
    owners_[slot] = owner;
    const PooledRow<A> pooled{ring_.values + at, ring_.places + at};
    if constexpr (std::is_same_v<T, A>) {
      if (untouched(n, row)) {
        Tile in_place = rows_.tile;
        in_place.pad = task_.shape.channel_stride() - w_.size;
        const A* from = static_cast<const A*>(task_.x) + row_offset(task_.shape, n, row);
        return pool_columns(in_place, from - in_place.pad, pooled, rows_.ahead);
      }
    }
    produce(n, row, TileSink<A>{rows_.tile, row_});
    pool_columns(rows_.tile, row_, pooled, 0);
  }

  // Whether a row of NCHW can be pooled where it lies: nothing comes before the pool, and the vectors that reach beyond
  // the row's end stay inside the tensor.
  bool untouched(int64_t n, int64_t row) const {
    const Shape& s = task_.shape;
    const int64_t end = row_offset(s, n, row) + (s.C - 1) * s.channel_stride() + s.W;
    return !s.channels_last && !task_.lrn && !task_.relu && !task_.bias &&
           end + pool_slack(w_) + kVectorBytes <= s.N * s.image_stride();
  }

  // The maxima along W of the tile's row.
  void pool_columns(const Tile& tile, const A* x, const PooledRow<A>& out, int64_t ahead) const {
    if (tile.channels_last) return pool_columns_channels_last(tile, x, out);
    if (w_.stride == 1) return pool_columns_nchw<1>(tile, x, out, ahead);
    if (w_.stride == 2) return pool_columns_nchw<2>(tile, x, out, ahead);
    pool_columns_nchw<0>(tile, x, out, ahead);
  }

  void pool_columns_channels_last(const Tile& tile, const A* x, const PooledRow<A>& out) const {
    const int64_t group = tile.group();
    for (int64_t o = 0; o < w_.out; ++o) {
      const int64_t first = w_.first(o), last = w_.last(o);
      for (int64_t g = 0; g < tile.groups; ++g) {
        const A* window = x + tile.in_scratch(w_.element(o, 0) * tile.groups + g);
        const int64_t step = w_.dilation * tile.groups * tile.run(), to = layout_.start(o * tile.groups + g);
        for (int64_t c = 0; c < group; c += kLanes<A>) {
          Maximum<A> best = Maximum<A>::of_nothing();
          if (first < last) best = {load(window + first * step + c), places<A>(first)};
          for (int64_t i = first + 1; i < last; ++i) best.take(load(window + i * step + c), places<A>(i));
          best.store_to(out, to + c);
        }
      }
    }
  }

  template <int stride>
  void pool_columns_nchw(const Tile& tile, const A* x, const PooledRow<A>& out, int64_t ahead) const {
    const bool clipped = w_.padding > 0 || w_.element(w_.out - 1, w_.reach() - 1) >= w_.size;
    for (int64_t c = 0; c < tile.channels; ++c) {
      const A* row = x + tile.in_scratch(c);
      for (int64_t i = 0; ahead && i < w_.size; i += kVectorBytes / sizeof(A)) __builtin_prefetch(row + ahead + i);
      if (clipped) {
        std::memcpy(padded_ + w_.padding, row, w_.size * sizeof(A));
        row = padded_ + w_.padding;
      }
      for (int64_t o = 0; o < w_.out; o += kLanes<A>) {
        const A* window = row + w_.element(o, 0);
        Maximum<A> best{load_strided<stride>(window, w_.stride), load_as<IntVec<A>>(firsts_ + o)};
        for (int64_t i = 1; i < w_.reach(); ++i) {
          best.take(load_strided<stride>(window + i * w_.dilation, w_.stride), places<A>(i));
        }
        best.store_to(out, layout_.start(c) + o);
      }
    }
  }

  const Rows<T> rows_;
  const TailTask& task_ = rows_.task;
  const PoolAxis &h_ = task_.pool.h, &w_ = task_.pool.w;
  const Shape out_ = task_.out_shape();
  const PooledLayout layout_{out_.channels_last, rows_.tile.groups, rows_.tile.group(), w_.out, 0};
  A* const row_;
  // Rows pooled along W: row r of the map is in slot r % slots, if owners[slot] says so.
  const int64_t slots_ = std::min((h_.reach() - 1) * h_.dilation + 1, h_.size);
  const PooledRow<A> ring_;
  int64_t* const owners_;
  A* const padded_;        // a row of NCHW with -inf where windows reach over its ends
  Lane<A>* const firsts_;  // the windows' first elements inside the map
};

template <typename T>
class PoolBackward {
  using A = Compute<T>;

 public:
  PoolBackward(const Rows<T>& rows, Scratch& scratch)
      : rows_(rows),
        ring_{scratch.take<A>(slots_ * layout_.lanes()), scratch.take<Lane<A>>(slots_ * layout_.lanes())},
        owners_(scratch.take<int64_t>(slots_)),
        covering_(scratch.take<Covering>(slots_)),
        sources_(scratch.take<Source>(slots_ * w_.reach() * w_.stride)),
        counts_(scratch.take<int64_t>(w_.stride)) {
    if (scratch.only_counts()) return;
    for (int64_t i = 0; i < slots_; ++i) owners_[i] = -1;
    for (int64_t i = 0; i < slots_ * layout_.lanes(); ++i) ring_.places[i] = -1;  // where no output is
  }

  // The gradient of a row of what was pooled, to a tile of Rows::take().
  void gather(int64_t n, int64_t row, A* to) {
    covered_ = 0;
    for (int64_t i = h_.reach() - 1; i >= 0; --i) {
      const int64_t shifted = row + h_.padding - i * h_.dilation, o = shifted / h_.stride;
      if (shifted < 0 || shifted % h_.stride || o >= h_.out) continue;
      covering_[covered_++] = {task_.pool.wide_argmax() ? dy_row<int32_t>(n, o) : dy_row<uint8_t>(n, o), i};
    }
    if (out_.channels_last) gather_channels_last(to);
    else gather_nchw(to);
  }

 private:
  // A pooled row whose windows hold the row as their line kh.
  struct Covering {
    PooledRow<A> row;
    int64_t kh;
  };

  // A window on dy whose gradient an input element gets where the window's maximum is at `place`.
  struct Source {
    const A* dy;
    const Lane<A>* argmax;
    Lane<A> place;
  };

  template <typename Argmax>
  PooledRow<A> dy_row(int64_t n, int64_t o) const {
    const int64_t slot = o % slots_, owner = n * h_.out + o, at = row_offset(out_, n, o);
    const PooledRow<A> row{ring_.values + slot * layout_.lanes(), ring_.places + slot * layout_.lanes()};
    if (owners_[slot] == owner) return row;
    owners_[slot] = owner;
    const Tile pooled{out_.channels_last, out_.C, rows_.tile.groups, out_.W};
    const TensorSource<T> dy{pooled, static_cast<const T*>(task_.dy) + at, out_.channel_stride(), rows_.ahead};
    for (int64_t r = 0; r < pooled.runs(); ++r) {
      const int64_t to = layout_.start(r);
      const auto from = dy(r);
      const Argmax* argmax = static_cast<const Argmax*>(task_.argmax) + at + pooled.in_memory(r, out_.channel_stride());
      for_each_vector<A>(pooled.run(), [&](int64_t i) { store(row.values + to + i, from(i)); });
      for (int64_t i = 0; i < pooled.run(); ++i) row.places[to + i] = argmax[i];
    }
    return row;
  }

  Source source(const Covering& covering, int64_t kw, int64_t at) const {
    const auto place = static_cast<Lane<A>>(covering.kh * w_.kernel + kw);
    return {covering.row.values + at, covering.row.places + at, place};
  }

  FASTCNN_INLINE static Vec<A> sum_of(const Source* sources, int64_t count, int64_t at) {
    Vec<A> sum = {};
    for (int64_t s = 0; s < count; ++s) {
      const auto mine = load_as<IntVec<A>>(sources[s].argmax + at) == places<A>(sources[s].place);
      sum += mine ? load(sources[s].dy + at) : Vec<A>{};
    }
    return sum;
  }

  void gather_channels_last(A* to) const {
    const Tile& tile = rows_.tile;
    const int64_t group = tile.group();
    for (int64_t column = 0; column < w_.size; ++column) {
      int64_t count = 0;
      for (int64_t i = 0; i < covered_; ++i) {
        for (int64_t kw = 0; kw < w_.reach(); ++kw) {
          const int64_t shifted = column + w_.padding - kw * w_.dilation, o = shifted / w_.stride;
          if (shifted < 0 || shifted % w_.stride || o >= w_.out) continue;
          sources_[count++] = source(covering_[i], kw, layout_.start(o * tile.groups));
        }
      }
      for (int64_t g = 0; g < tile.groups; ++g) {
        A* const at = to + tile.in_scratch(column * tile.groups + g);
        for (int64_t c = 0; c < group; c += kLanes<A>) {
          store(at + c, sum_of(sources_, count, g * layout_.stride() + c));
        }
      }
    }
  }

  // Columns of one phase, column % stride, see the same kw at the same distance: a flat loop over outputs gathers them.
  void gather_nchw(A* to) const {
    const int64_t most = covered_ * w_.reach();
    for (int64_t phase = 0; phase < w_.stride; ++phase) {
      counts_[phase] = 0;
      for (int64_t i = 0; i < covered_; ++i) {
        for (int64_t kw = 0; kw < w_.reach(); ++kw) {
          const int64_t shifted = phase + w_.padding - kw * w_.dilation;
          if (shifted % w_.stride) continue;
          sources_[phase * most + counts_[phase]++] = source(covering_[i], kw, layout_.start(0) + shifted / w_.stride);
        }
      }
    }
    const int64_t per_phase = (w_.size + w_.stride - 1) / w_.stride;
    for (int64_t c = 0; c < rows_.tile.channels; ++c) {
      A* const row = to + rows_.tile.in_scratch(c);
      const int64_t from = c * layout_.stride();
      for (int64_t j = 0; j < per_phase; j += kLanes<A>) {
        const auto phase = [&](int64_t p) { return sum_of(sources_ + p * most, counts_[p], from + j); };
        if (w_.stride == 1) {
          store(row + j, phase(0));
        } else if (w_.stride == 2) {
          store_interleaved(row + 2 * j, phase(0), phase(1));
        } else {
          for (int64_t p = 0; p < w_.stride; ++p) {
            const Vec<A> v = phase(p);
            for (int64_t l = 0; l < kLanes<A> && (j + l) * w_.stride + p < w_.size; ++l)
              row[(j + l) * w_.stride + p] = v[l];
          }
        }
      }
    }
  }

  const Rows<T> rows_;
  const TailTask& task_ = rows_.task;
  const PoolAxis &h_ = task_.pool.h, &w_ = task_.pool.w;
  const Shape out_ = task_.out_shape();
  // In NCHW the gather looks this far beyond the ends of a row of dy.
  const int64_t seen_ = (w_.reach() * w_.dilation + w_.padding + w_.size) / w_.stride + 1;
  const int64_t margin_ = out_.channels_last ? 0 : seen_ - w_.out + kVectorBytes;
  const PooledLayout layout_{out_.channels_last, rows_.tile.groups, rows_.tile.group(), w_.out, margin_};
  // Rows of dy in the compute type: row o is in slot o % slots, if owners[slot] says so.
  const int64_t slots_ = std::min((h_.reach() - 1) * h_.dilation / h_.stride + 1, h_.out);
  const PooledRow<A> ring_;
  int64_t* const owners_;
  Covering* const covering_;
  int64_t covered_ = 0;
  Source* const sources_;
  int64_t* const counts_;  // of the sources of each phase
};

// A unit of backward is a block of rows of x, so that a row of dy is read for several of them.
inline constexpr int64_t kBlockRows = 8;

inline int64_t row_blocks(const TailTask& task) { return (task.shape.H + kBlockRows - 1) / kBlockRows; }

template <typename F>
FASTCNN_INLINE void for_each_row(const TailTask& task, int64_t unit, F f) {
  const int64_t n = unit / row_blocks(task), first = unit % row_blocks(task) * kBlockRows;
  for (int64_t row = first; row < std::min(first + kBlockRows, task.shape.H); ++row) f(n, row);
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
