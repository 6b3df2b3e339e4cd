// The gradient of max pooling: PoolBackward, as the operators share it. In channels_last an element gathers the
// gradients of the windows that hold it, a vector of channels at a time; in NCHW, where neighbors in memory are
// neighbors in the map, an output's gradient is added to the element that was its maximum. Both add in the same order.
#pragma once

#include <algorithm>

#include "max_pool2d.h"

namespace fastcnn::FASTCNN_CAPABILITY {

// Backward does x in blocks of rows, so that a row of dy is read for several of them. In NCHW a block is done at a
// time: a channel of it should stay in the L1 cache and all in the L2 cache, but there should be units to share out.
inline int64_t rows_of_block(const TailTask& task) {
  constexpr int64_t kFew = 8;
  const Shape& s = task.shape;
  if (s.channels_last) return kFew;
  const int64_t most = std::min({(1 << 13) / s.W, (1 << 17) / (s.C * s.W), s.N * s.H / 64});
  return std::clamp(most, kFew, std::max(kFew, s.H));
}

inline int64_t row_blocks(const TailTask& task) {
  return (task.shape.H + rows_of_block(task) - 1) / rows_of_block(task);
}

inline int64_t rows_at_a_time_backward(const TailTask& task) {
  return task.shape.channels_last ? 1 : std::min(rows_of_block(task), task.shape.H);
}

// f(n, row, count) for the rows of a unit that are done at a time.
template <typename F>
FASTCNN_INLINE void for_each_rows(const TailTask& task, int64_t unit, F f) {
  const int64_t n = unit / row_blocks(task), first = unit % row_blocks(task) * rows_of_block(task);
  const int64_t end = std::min(first + rows_of_block(task), task.shape.H), step = rows_at_a_time_backward(task);
  for (int64_t row = first; row < end; row += step) f(n, row, std::min(step, end - row));
}

// The gradient of what was pooled. The gradients that an element gets are added in the order of the windows' rows, and
// within a row in the opposite order.
template <typename T>
class PoolBackward {
  using A = Compute<T>;

 public:
  PoolBackward(const TailTask& task, Scratch& scratch)
      : task_(task),
        ring_{scratch.take<A>(slots_ * length_), scratch.take<Lane<A>>(slots_ * length_)},
        owners_(scratch.take<int64_t>(slots_)),
        covering_(scratch.take<Covering>(slots_)),
        taps_(scratch.take<Tap>(channels_last_ ? w_.size * w_.reach() : 0)),
        first_tap_(scratch.take<int64_t>(channels_last_ ? w_.size + 1 : 0)),
        sources_(scratch.take<Source>(slots_ * w_.reach())),
        starts_(scratch.take<int64_t>(channels_last_ ? 0 : w_.out)),
        offsets_(scratch.take<int64_t>(channels_last_ ? 0 : places_)) {
    if (scratch.only_counts() || !task_.pool) return;
    if (channels_last_) {
      find_taps();
      for (int64_t i = 0; i < slots_; ++i) owners_[i] = -1;
      for (int64_t i = 0; i < slots_ * length_; ++i) ring_.places[i] = -1;  // where no output is
    } else {
      for (int64_t o = 0; o < w_.out; ++o) starts_[o] = w_.first(o) < w_.last(o) ? w_.element(o, 0) : kNowhere;
      for (int64_t p = 0; p < places_; ++p) {
        const int64_t y = p / w_.kernel, x = p % w_.kernel;
        offsets_[p] = y < h_.kernel ? y * h_.dilation * w_.size + x * w_.dilation : kNowhere;
      }
    }
  }

  // Of rows of an image: in channels_last one row, to a tile of Rows::take().
  void gather(int64_t n, int64_t row, int64_t count, A* to) {
    const bool is_wide = task_.pool.wide_argmax();
    if (channels_last_) is_wide ? gather_row<int32_t>(n, row, to) : gather_row<uint8_t>(n, row, to);
    else is_wide ? scatter<int32_t>(n, row, count, to) : scatter<uint8_t>(n, row, count, to);
  }

 private:
  static constexpr int64_t kNowhere = -(int64_t{1} << 40);

  // A pooled row in the compute type.
  struct PooledRow {
    A* values;
    Lane<A>* places;
  };

  // A pooled row whose windows hold the row as their line kh.
  struct Covering {
    PooledRow row;
    int64_t kh;
  };

  // A window that holds a column as its column kw.
  struct Tap {
    int64_t output, kw;
  };

  // A window on dy whose gradient an input element gets where the window's maximum is at `place`.
  struct Source {
    const A* dy;
    const Lane<A>* argmax;
    Lane<A> place;
  };

  void find_taps() {
    int64_t count = 0;
    for (int64_t column = 0; column < w_.size; ++column) {
      first_tap_[column] = count;
      for (int64_t kw = 0; kw < w_.reach(); ++kw) {
        const int64_t shifted = column + w_.padding - kw * w_.dilation, o = shifted / w_.stride;
        if (shifted >= 0 && shifted % w_.stride == 0 && o < w_.out) taps_[count++] = {o, kw};
      }
    }
    first_tap_[w_.size] = count;
  }

  template <typename Argmax>
  PooledRow dy_row(int64_t n, int64_t o) const {
    const int64_t slot = o % slots_, owner = n * h_.out + o, at = row_offset(out_, n, o);
    const PooledRow row{ring_.values + slot * length_, ring_.places + slot * length_};
    if (owners_[slot] == owner) return row;
    owners_[slot] = owner;
    const T* const dy = static_cast<const T*>(task_.dy) + at;
    const Argmax* const argmax = static_cast<const Argmax*>(task_.argmax) + at;
    const int64_t count = w_.out * out_.C;
    for_each_vector<A>(count, [&](int64_t i) { store(row.values + i, load_some(dy + i, count - i)); });
    for (int64_t i = 0; i < count; ++i) row.places[i] = argmax[i];
    return row;
  }

  template <typename Argmax>
  void gather_row(int64_t n, int64_t row, A* to) const {
    int64_t covered = 0;
    for (int64_t i = h_.reach() - 1; i >= 0; --i) {
      const int64_t shifted = row + h_.padding - i * h_.dilation, o = shifted / h_.stride;
      if (shifted < 0 || shifted % h_.stride || o >= h_.out) continue;
      covering_[covered++] = {dy_row<Argmax>(n, o), i};
    }
    for (int64_t column = 0; column < w_.size; ++column) {
      int64_t count = 0;
      for (int64_t i = 0; i < covered; ++i) {
        for (int64_t t = first_tap_[column]; t < first_tap_[column + 1]; ++t) {
          const auto place = static_cast<Lane<A>>(covering_[i].kh * w_.kernel + taps_[t].kw);
          const int64_t at = taps_[t].output * out_.C;
          sources_[count++] = {covering_[i].row.values + at, covering_[i].row.places + at, place};
        }
      }
      A* const pixel = to + column * out_.C;
      for (int64_t c = 0; c < out_.C; c += kLanes<A>) {
        Vec<A> sum = {};
        for (int64_t s = 0; s < count; ++s) {
          const auto mine = load_as<IntVec<A>>(sources_[s].argmax + c) == places<A>(sources_[s].place);
          sum += mine ? load(sources_[s].dy + c) : Vec<A>{};
        }
        store(pixel + c, sum);
      }
    }
  }

  // Rows row ... row+count-1 of each channel.
  template <typename Argmax>
  void scatter(int64_t n, int64_t row, int64_t count, A* to) const {
    const int64_t first = std::max<int64_t>(0, row + h_.padding - (h_.kernel - 1) * h_.dilation);
    const int64_t begin = (first + h_.stride - 1) / h_.stride;
    const int64_t end = std::min((row + count - 1 + h_.padding) / h_.stride + 1, h_.out);
    const int64_t size = count * w_.size;
    for (int64_t c = 0; c < out_.C; ++c, to += size) {
      std::fill_n(to, size, A(0));
      for (int64_t o = begin; o < end; ++o) {
        if (h_.first(o) >= h_.last(o)) continue;
        const int64_t at = row_offset(out_, n, o) + c * out_.channel_stride();
        scatter_row(static_cast<const T*>(task_.dy) + at, static_cast<const Argmax*>(task_.argmax) + at,
                    (h_.element(o, 0) - row) * w_.size, to, size);
      }
    }
  }

  // A row of outputs, whose windows start with row `start` of `to`. What is outside of it is skipped. Not inlined, so
  // that all it needs stays in registers.
  template <typename Argmax>
  __attribute__((noinline)) void scatter_row(const T* dy, const Argmax* argmax, int64_t start, A* to,
                                             uint64_t size) const {
    const int64_t *const starts = starts_, *const offsets = offsets_;
    const uint64_t places = places_;
    for (int64_t o = w_.out - 1; o >= 0; --o) {
      const uint64_t place = argmax[o];
      if (sizeof(Argmax) > 1 && place >= places) continue;
      const uint64_t target = start + starts[o] + offsets[place];
      if (target < size) to[target] += to_compute(dy[o]);
    }
  }

  const TailTask& task_;
  const PoolAxis &h_ = task_.pool.h, &w_ = task_.pool.w;
  const Shape out_ = task_.out_shape();
  const bool channels_last_ = out_.channels_last;
  // In channels_last, rows of dy: row o is in slot o % slots, if owners[slot] says so.
  const int64_t slots_ = channels_last_ ? std::min((h_.reach() - 1) * h_.dilation / h_.stride + 1, h_.out) : 0;
  const int64_t length_ = w_.out * out_.C + kVectorBytes;
  const PooledRow ring_;
  int64_t* const owners_;
  Covering* const covering_;
  Tap* const taps_;  // of each column
  int64_t* const first_tap_;
  Source* const sources_;
  // In NCHW, of each output the column where its window starts, and of each place its offset from there.
  const int64_t places_ = std::max<int64_t>(256, h_.kernel* w_.kernel);
  int64_t *const starts_, *const offsets_;
};

}  // namespace fastcnn::FASTCNN_CAPABILITY
