// Max pooling row by row: PoolForward, as max_pool2d, relu_lrn_max_pool2d and batch_norm_relu_max_pool2d share it.
// A tile is a row of the map.
#pragma once

#include <algorithm>
#include <limits>

#include "../relu_lrn_max_pool2d.h"
#include "scratch.h"
#include "tile.h"

namespace fastcnn::FASTCNN_CAPABILITY {

template <typename A>
IntVec<A> places(int64_t p) {
  return IntVec<A>{} + static_cast<Lane<A>>(p);
}

// How maxima are taken: values alone, or with their places, both where there are no NaNs; or whatever there is.
enum class Way { values, places, exact };

template <typename A>
struct Maximum {
  Vec<A> value;
  IntVec<A> place;

  // By torch's rules, whatever the order in which elements come: of equal values the first wins, of NaNs the last.
  template <Way way>
  FASTCNN_INLINE void take(const Maximum& other) {
    const auto [v, p] = other;
    if constexpr (way == Way::values) {
      value = v > value ? v : value;
    } else {
      const auto is_larger = (v > value) | ((v == value) & (p < place));
      if constexpr (way == Way::places) replace(is_larger, other);
      else replace(is_larger | ((v != v) & ((value == value) | (p > place))), other);
    }
  }
  FASTCNN_INLINE void replace(IntVec<A> where, const Maximum& other) {
    value = where ? other.value : value;
    place = where ? other.place : place;
  }
  FASTCNN_INLINE Maximum shifted(int64_t by) const { return {value, place + static_cast<Lane<A>>(by)}; }
};

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
  const int64_t ahead = tile.channels_last ? 2048 : 128;

  Tile rows(int64_t count) const {
    Tile several = tile;
    several.pixels *= count;
    return several;
  }
  TensorSource<T> source(const void* x, int64_t n, int64_t row, int64_t count = 1) const {
    const int64_t at = row_offset(task.shape, n, row);
    return {rows(count), static_cast<const T*>(x) + at, task.shape.channel_stride(), ahead};
  }
  TensorSink<T> sink(void* out, int64_t n, int64_t row, int64_t count = 1) const {
    return {rows(count), static_cast<T*>(out) + row_offset(task.shape, n, row), task.shape.channel_stride()};
  }
  // Rows in the compute type, with room for what pooling reads and writes beyond them.
  A* take(Scratch& scratch, int64_t count) const {
    return scratch.take<A>(rows(count).lanes() + pool_slack(task.pool.w));
  }
};

template <int stride, typename A>
Vec<A> load_strided(const A* p, int64_t any) {
  if constexpr (stride == 1) return load(p);
  if constexpr (stride == 2) return every_other<0>(load(p), load(p + kLanes<A>));
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = p[i * any];
  return v;
}

// Whether nothing comes before the pool but a ReLU. (Batch norm always has a bias.)
inline bool pools_in_place(const TailTask& task) { return task.pool && !task.lrn && !task.bias; }

// What is pooled, rectified or not: the rows of an image, all where they lie, or the last few in the slots of a ring.
template <typename E>
struct PooledMap {
  const E* data;
  int64_t row_stride, first_row = 0, slots = 0;
  bool relu = false;

  const E* row(int64_t h) const { return data + (slots ? h % slots : h - first_row) * row_stride; }
};

// The maxima of windows are found down their columns first, then along them: windows that overlap share a column, and
// columns are vectors of neighbors in memory, in either format. A row of channels_last is done in blocks of columns,
// which stay in the L1 cache in between.
//
// NaN is what comparisons are slow with. So they are done as if there were none; where the sum of all elements says
// that there may be one, the row is done again, exactly.
//
// A is what elements are compared as. As int16_t, 16-bit elements are compared twice as many at a time, but without
// their places, and -0 is less than 0.
template <typename T, typename A = Compute<T>>
class PoolForward {
  static constexpr bool kNarrow = std::is_same_v<A, int16_t>;
  static constexpr int64_t kAhead = 2048;  // bytes

 public:
  PoolForward(const TailTask& task, Scratch& scratch)
      : task_(task),
        columns_{scratch.take<A>(rows_ * pitch_) + padding_,
                 task_.argmax ? scratch.take<A>(rows_ * pitch_) + padding_ : nullptr},
        shared_(scratch.take<A>((task_.shape.channels_last ? pixel_ : w_.out) + kLanes<A>)) {
    if (scratch.only_counts() || task_.shape.channels_last) return;
    for (int64_t i = 0; i < rows_ * pitch_; ++i) columns_.clear(i - padding_);
  }

  // Rows begin ... end-1 of a map of the output: of an image, or in NCHW of one of its channels.
  template <typename E>
  void write(int64_t map, int64_t begin, int64_t end, const PooledMap<E>& from) const {
    for (int64_t o = write_directly(map, begin, end, from), next; o < end; o = next) {
      next = std::min(o + rows_, end);
      const int64_t at = map * h_.out * w_.out * pixel_;
      if (!task_.pool.wide_argmax()) {
        const bool is_right = task_.argmax ? write<Way::places>(at, o, next, from).are_numbers()
                                           : write<Way::values>(at, o, next, from).are_numbers();
        if (is_right) continue;
      }
      write<Way::exact>(at, o, next, from);
    }
  }

  // The same of values alone; false where there may be NaN, which then is not where it should be.
  bool write_numbers(int64_t map, int64_t begin, int64_t end, const PooledMap<T>& from) const {
    bool are_numbers = true;
    for (int64_t o = write_directly(map, begin, end, from), next; o < end; o = next) {
      next = std::min(o + rows_, end);
      are_numbers &= write<Way::values>(map * h_.out * w_.out * pixel_, o, next, from).are_numbers();
    }
    return are_numbers;
  }

 private:
  // The place of what lies outside the map, after all others; its lower bits are 0.
  static constexpr Lane<A> kOutside = Lane<A>{1} << (8 * sizeof(Lane<A>) - 2);

  static constexpr A infinity() {
    if constexpr (!kNarrow) return std::numeric_limits<A>::infinity();
    else return std::is_same_v<T, Half> ? 0x7c00 : 0x7f80;
  }
  static constexpr A lowest() {
    if constexpr (kNarrow) return ~infinity();
    else return -infinity();
  }

  // Whether there may be NaN among elements: what of floats their sum tells, of integers the largest and the smallest.
  struct Seen {
    Vec<A> sum{}, largest{}, smallest{};

    bool are_numbers() const {
      if constexpr (kNarrow) return !any((largest > infinity()) | (smallest < lowest()));
      else return !any(sum != sum);
    }
    FASTCNN_INLINE void join(const Seen& other) {
      if constexpr (kNarrow) {
        largest = other.largest > largest ? other.largest : largest;
        smallest = other.smallest < smallest ? other.smallest : smallest;
      } else {
        sum += other.sum;
      }
    }
    FASTCNN_INLINE static Seen of(Vec<A> v) { return {v, v, v}; }
  };

  template <typename E, typename Count>
  FASTCNN_INLINE static Vec<A> read(const E* p, Count n) {
    if constexpr (kNarrow) return ordered(load_piece(reinterpret_cast<const int16_t*>(p), n));
    else return load_piece(p, n);
  }

  // The maxima of the columns of a row, and in NCHW what windows see beyond its ends.
  struct Columns {
    A *values, *places;  // places: as bits; null: not wanted

    Columns after(int64_t elements) const { return {values + elements, places ? places + elements : nullptr}; }
    void clear(int64_t i) const {
      values[i] = lowest();
      if (places) std::memcpy(places + i, &kOutside, sizeof kOutside);
    }
    template <Way way, int stride>
    FASTCNN_INLINE Maximum<A> at(int64_t i, int64_t any_stride = 0) const {
      const Vec<A> value = load_strided<stride>(values + i, any_stride);
      if (!places || way == Way::values) return {value, IntVec<A>{}};
      return {value, (IntVec<A>)load_strided<stride>(places + i, any_stride)};
    }
    template <Way way, typename Count>
    FASTCNN_INLINE void store(int64_t i, const Maximum<A>& maximum, Count n) const {
      store_piece(values + i, maximum.value, n);
      if (places && way != Way::values) store_piece(places + i, (Vec<A>)maximum.place, n);
    }
  };

  // Rows whose windows are two or three rows and columns, two apart: the maxima of columns are not stored, only of what
  // the next windows share. What windows see beyond the map is their element that is closest to it, which changes
  // nothing. Returns the first row that is still to be done, `begin` where there may be NaN.
  template <typename E>
  int64_t write_directly(int64_t map, int64_t begin, int64_t end, const PooledMap<E>& from) const {
    const PoolAxis h = h_, w = w_;
    if (task_.argmax || h.kernel != w.kernel || h.stride != 2 || w.stride != 2 || h.dilation != 1 || w.dilation != 1) {
      return begin;
    }
    const auto with_kernel = [&]<int kernel>() {
      return task_.shape.channels_last ? write_pixels<kernel>(map, begin, end, from)
                                       : write_plane<kernel>(map, begin, end, from);
    };
    if (h.kernel == 3) return with_kernel.template operator()<3>();
    return h.kernel == 2 ? with_kernel.template operator()<2>() : begin;
  }

  // In channels_last: the maxima of columns, then of two or three of them.
  template <int kernel, typename E>
  int64_t write_pixels(int64_t map, int64_t begin, int64_t end, const PooledMap<E>& from) const {
    const PoolAxis h = h_, w = w_;
    const int64_t pixel = pixel_, ahead = from.slots ? 0 : kAhead;
    if (pixel < kLanes<A>) return begin;
    const Vec<A> floor = broadcast(from.relu ? A(0) : lowest());
    Seen seen;
    for (int64_t o = begin; o < end; ++o) {
      const E* row[kernel];
      for (int i = 0; i < kernel; ++i) row[i] = from.row(inside(h, o, i));
      const auto column_maxima = [&](int64_t e) FASTCNN_INLINE_LAMBDA {
        Vec<A> best;
        Seen total;
        for (int i = 0; i < kernel; ++i) {
          if (i || kernel == 2) __builtin_prefetch(reinterpret_cast<const char*>(row[i] + e) + ahead);
          const Vec<A> v = read(row[i] + e, WholeVector<A>{});
          best = i ? larger(best, v) : v;
          if (i) total.join(Seen::of(v));
          else total = Seen::of(v);
        }
        seen.join(total);
        return best;
      };
      T* out = static_cast<T*>(task_.out) + (map * h.out + o) * w.out * pixel;
      for (int64_t p = 0; p < w.out; ++p, out += pixel) {
        A* shared = shared_;
        const int64_t first = inside(w, p, 0) * pixel, middle = inside(w, p, kernel - 2) * pixel;
        const int64_t last = inside(w, p, kernel - 1) * pixel;
        for_each_vector<A>(pixel, [&](int64_t c) FASTCNN_INLINE_LAMBDA {
          Vec<A> best = column_maxima(middle + c);
          const Vec<A> next = column_maxima(last + c);
          if constexpr (kernel == 3) {
            best = larger(p ? load(shared) : column_maxima(first + c), best);
            store(shared, next);
            shared += kLanes<A>;
          }
          write_values(out + c, larger(best, next), floor);
        });
      }
    }
    return seen.are_numbers() ? end : begin;
  }

  // In NCHW: the maxima of two or three neighbors in a row, then of two or three rows.
  template <int kernel, typename E>
  int64_t write_plane(int64_t map, int64_t begin, int64_t end, const PooledMap<E>& from) const {
    const PoolAxis h = h_, w = w_;
    if (w.padding || w.element(w.out - 1, 1) >= w.size) return begin;
    // A row shorter than a vector is one vector, with what follows it in the map and in the output: rows done later.
    const auto fits = [&](int64_t o) {
      if (w.element(w.out - 1, kernel) > w.size) return false;
      return (end - o) * w.out >= kLanes<A> && (h.size - inside(h, o, kernel - 1)) * w.size > 2 * kLanes<A>;
    };
    int64_t stop = end;
    while (w.out < kLanes<A> && stop > begin && !fits(stop - 1)) --stop;
    if (stop == begin) return begin;
    const Vec<A> floor = broadcast(from.relu ? A(0) : lowest());
    Seen seen;
    const auto row_maxima = [&](const E* row, int64_t o) FASTCNN_INLINE_LAMBDA {
      const E* const p = row + 2 * o;
      __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead);
      __builtin_prefetch(reinterpret_cast<const char*>(p + kLanes<A>) + kAhead);
      const Vec<A> left = read(p, WholeVector<A>{}), right = read(p + kLanes<A>, WholeVector<A>{});
      seen.join(Seen::of(left));
      seen.join(Seen::of(right));
      const Vec<A> even = every_other<0>(left, right), best = larger(even, every_other<1>(left, right));
      if constexpr (kernel == 2) return best;
      const Vec<A> next = read_all(row[std::min(2 * (o + kLanes<A>), w.size - 1)]);
      seen.join(Seen::of(next));
      return larger(best, followed_by_last(even, next));
    };
    const auto row = [&](int64_t o, int64_t i) FASTCNN_INLINE_LAMBDA { return from.row(inside(h, o, i)); };
    if constexpr (kernel == 3) {
      A* shared = shared_;
      for_each_vector<A>(w.out, [&](int64_t o) FASTCNN_INLINE_LAMBDA {
        store(shared, row_maxima(row(begin, 0), o));
        shared += kLanes<A>;
      });
    }
    for (int64_t o = begin; o < stop; ++o) {
      const E *const middle = row(o, kernel - 2), *const last = row(o, kernel - 1);
      T* const out = static_cast<T*>(task_.out) + (map * h.out + o) * w.out;
      A* shared = shared_;
      for_each_vector<A>(w.out, [&](int64_t p) FASTCNN_INLINE_LAMBDA {
        Vec<A> best = row_maxima(middle, p);
        const Vec<A> next = row_maxima(last, p);
        if constexpr (kernel == 3) {
          best = larger(load(shared), best);
          store(shared, next);
          shared += kLanes<A>;
        }
        write_values(out + p, larger(best, next), floor);
      });
    }
    return seen.are_numbers() ? stop : begin;
  }

  // Element i of window o, or that of the window closest to it.
  static int64_t inside(const PoolAxis& axis, int64_t o, int64_t i) {
    return std::clamp<int64_t>(axis.element(o, i), 0, axis.size - 1);
  }
  FASTCNN_INLINE static Vec<A> larger(Vec<A> v, Vec<A> w) { return w > v ? w : v; }
  template <typename E>
  FASTCNN_INLINE static Vec<A> read_all(const E& element) {
    if constexpr (kNarrow) return ordered(broadcast<int16_t>(element.bits));
    else return broadcast<A>(to_compute(element));
  }
  FASTCNN_INLINE static void write_values(T* to, Vec<A> v, Vec<A> floor) {
    __builtin_prefetch(reinterpret_cast<const char*>(to) + kAhead, 1);
    v = floor > v ? floor : v;
    if constexpr (kNarrow) store(reinterpret_cast<int16_t*>(to), ordered(v));
    else store(to, v);
  }

  template <Way way, typename E>
  Seen write(int64_t at, int64_t begin, int64_t end, const PooledMap<E>& from) const {
    Seen seen_all;
    for (int64_t first = 0, done = 0, seen; first < w_.out; first += block_, done = seen) {
      const int64_t last = std::min(first + block_, w_.out);
      seen = last == w_.out ? w_.size : std::clamp(w_.element(last - 1, w_.kernel), done, w_.size);
      for (int64_t o = begin; o < end; ++o) {
        seen_all.join(pool_columns<way>(o, from, done * pixel_, seen * pixel_, columns_.after((o - begin) * pitch_)));
      }
      for (int64_t o = begin; o < end; ++o) {
        pool_along_width<way>(first, last, columns_.after((o - begin) * pitch_), at + o * w_.out * pixel_);
      }
    }
    return seen_all;
  }

  // The maxima of columns, elements begin ... end-1 of a row, and what these tell of NaN.
  template <Way way, typename E>
  FASTCNN_INLINE Seen pool_columns(int64_t o, const PooledMap<E>& from, int64_t begin, int64_t end,
                                   const Columns columns) const {
    const PoolAxis h = h_;  // copies, here and below, which stay in registers: what is stored might change the members
    const int64_t first = h.first(o), last = h.last(o);
    const Vec<A> floor = broadcast(from.relu ? A(0) : lowest());
    const auto rectified = [floor](Vec<A> v) FASTCNN_INLINE_LAMBDA { return floor > v ? floor : v; };  // NaN stays
    Seen seen;
    // Rows i ... i+count-1 of the windows, to what is there from those before. `far`: from memory, for which to ask.
    const auto rows = [&]<int count, bool far>(int64_t i) FASTCNN_INLINE_LAMBDA {
      const E* row[count];
      int64_t place[count];
      for (int k = 0; k < count; ++k) row[k] = from.row(h.element(o, i + k)) + begin, place[k] = (i + k) * w_.kernel;
      for_each_piece<A>(end - begin, [&](int64_t e, auto n) FASTCNN_INLINE_LAMBDA {
        Maximum<A> best;
        Seen total;
        for (int k = 0; k < count; ++k) {
          if (far) __builtin_prefetch(reinterpret_cast<const char*>(row[k] + e) + 2048);
          const Vec<A> v = read(row[k] + e, n);
          if (k) total.join(Seen::of(v));
          else total = Seen::of(v);
          const Maximum<A> next{way == Way::values ? v : rectified(v), places<A>(place[k])};
          if (!k) best = next;
          else if (way == Way::places) best.replace(next.value > best.value, next);  // its place comes after
          else best.template take<way>(next);
        }
        seen.join(total);
        if (way == Way::values) best.value = rectified(best.value);  // the same, sooner
        if (i > first) best.template take<way>(columns.template at<way, 1>(begin + e));
        columns.template store<way>(begin + e, best, n);
      });
    };
    const auto some = [&]<int count>(int64_t i) FASTCNN_INLINE_LAMBDA {
      if (from.slots) rows.template operator()<count, false>(i);
      else rows.template operator()<count, true>(i);
    };
    int64_t i = first;
    if (way != Way::exact) {
      for (; i + 3 <= last; i += 3) some.template operator()<3>(i);
      for (; i + 2 <= last; i += 2) some.template operator()<2>(i);
    }
    for (; i < last; ++i) some.template operator()<1>(i);
    for (int64_t e = begin; first >= last && e < end; ++e) columns.clear(e);  // windows step over the whole map
    return seen;
  }

  // Outputs first ... last-1 of a row, which is at `at` in the output.
  template <Way way>
  FASTCNN_INLINE void pool_along_width(int64_t first, int64_t last, const Columns columns, int64_t at) const {
    const PoolAxis w = w_;
    const Out out{static_cast<T*>(task_.out) + at, task_.argmax, at, task_.pool.wide_argmax()};
    // The maximum of the columns begin ... end-1 of windows; of so many, if not 0.
    const auto window = [&]<int count>(int64_t begin, int64_t end, auto column) FASTCNN_INLINE_LAMBDA {
      Maximum<A> best{broadcast(lowest()), places<A>(kOutside)};
      if constexpr (count > 0) best = column(begin);
      for (int64_t i = begin + (count > 0); i < (count ? begin + count : end); ++i) best.template take<way>(column(i));
      return best;
    };
    const auto with_count = [&](int64_t count, auto f) FASTCNN_INLINE_LAMBDA {
      if (way != Way::exact && count == 3) f.template operator()<3>();
      else if (way != Way::exact && count == 2) f.template operator()<2>();
      else f.template operator()<0>();
    };
    if (task_.shape.channels_last) {
      const int64_t pixel = pixel_;
      for (int64_t o = first; o < last; ++o) {
        const int64_t start = w.element(o, 0) * pixel, step = w.dilation * pixel, i0 = w.first(o), i1 = w.last(o);
        with_count(i1 - i0, [&]<int count>() FASTCNN_INLINE_LAMBDA {
          for_each_piece<A>(pixel, [&](int64_t c, auto n) FASTCNN_INLINE_LAMBDA {
            const auto column = [&](int64_t i) FASTCNN_INLINE_LAMBDA {
              return columns.template at<way, 1>(start + c + i * step).shifted(i);
            };
            out.template store<way>(o * pixel + c, window.template operator()<count>(i0, i1, column), n);
          });
        });
      }
      return;
    }
    const auto along = [&]<int stride, int count>() FASTCNN_INLINE_LAMBDA {
      for_each_piece<A>(last - first, [&](int64_t o, auto n) FASTCNN_INLINE_LAMBDA {
        const int64_t start = w.element(first + o, 0);
        const auto column = [&](int64_t i) FASTCNN_INLINE_LAMBDA {
          return columns.template at<way, stride>(start + i * w.dilation, w.stride).shifted(i);
        };
        out.template store<way>(first + o, window.template operator()<count>(0, w.reach(), column), n);
      });
    };
    with_count(w.reach(), [&]<int count>() FASTCNN_INLINE_LAMBDA {
      if (w.stride == 1) along.template operator()<1, count>();
      else if (w.stride == 2) along.template operator()<2, count>();
      else along.template operator()<0, count>();
    });
  }

  // Where a row of output goes.
  struct Out {
    T* values;
    void* argmax;
    int64_t at;
    bool is_wide;

    template <Way way, typename Count>
    FASTCNN_INLINE void store(int64_t i, const Maximum<A>& maximum, Count n) const {
      if constexpr (kNarrow) store_piece(reinterpret_cast<int16_t*>(values + i), ordered(maximum.value), n);
      else store_piece(values + i, maximum.value, n);
      if constexpr (way == Way::values) return;
      if (!argmax) return;
      const IntVec<A> place = maximum.place & (kOutside - 1);
      if (way == Way::exact && is_wide) store_places(static_cast<int32_t*>(argmax) + at + i, place, n);
      else store_places(static_cast<uint8_t*>(argmax) + at + i, place, n);
    }
    template <typename Argmax, typename Count>
    FASTCNN_INLINE static void store_places(Argmax* to, IntVec<A> place, Count n) {
      const auto narrow = __builtin_convertvector(place, typename VectorOf<Argmax, kLanes<A>>::type);
      std::memcpy(to, &narrow, n * sizeof(Argmax));
    }
  };

  const TailTask& task_;
  const PoolAxis &h_ = task_.pool.h, &w_ = task_.pool.w;
  // Output rows at a time: in NCHW several, as vectors that are loaded soon after parts of them were stored wait until
  // these are in cache.
  const int64_t rows_ = task_.shape.channels_last ? 1 : 4;
  // Elements of a pixel of a map, and of one of its rows.
  const int64_t pixel_ = task_.shape.channels_last ? task_.shape.C : 1, length_ = w_.size * pixel_;
  const int64_t block_ = pixel_ > 1 ? std::max<int64_t>(1, 1024 / (w_.stride * pixel_)) : w_.out;
  const int64_t padding_ = task_.shape.channels_last ? 0 : w_.padding, pitch_ = padding_ + length_ + pool_slack(w_);
  const Columns columns_;
  A* const shared_;
};

// The rows of the output that are a unit. In NCHW they are several, because pieces of channels are too short otherwise;
// but where channels are not pooled one by one, not so many that few units are left to share out.
struct UnitRows {
  int64_t n, begin, end;

  UnitRows(const TailTask& task, int64_t unit) {
    const int64_t rows = most(task), per_image = units(task) / task.shape.N;
    n = unit / per_image, begin = unit % per_image * rows, end = std::min(begin + rows, task.out_shape().H);
  }
  int64_t count() const { return end - begin; }

  static int64_t units(const TailTask& task) {
    const int64_t rows = most(task);
    return task.shape.N * ((task.out_shape().H + rows - 1) / rows);
  }
  static int64_t most(const TailTask& task) {
    constexpr int64_t kFew = 4;
    const Shape out = task.out_shape();
    if (out.channels_last) return pools_in_place(task) ? kFew : 1;
    // In the compute type they should stay in the L2 cache.
    const int64_t row = std::max<int64_t>(1, task.shape.C * task.shape.W * (task.pool ? task.pool.h.stride : 1));
    return std::clamp(std::min((1 << 16) / row, out.N * out.H / 64), kFew, std::max(kFew, out.H));
  }
};

// Rows of the map that a unit needs at a time.
inline int64_t rows_at_a_time(const TailTask& task) {
  const int64_t rows = UnitRows::most(task);
  if (!task.pool || task.shape.channels_last) return rows;
  const PoolAxis& h = task.pool.h;
  return std::min((rows - 1) * h.stride + (h.kernel - 1) * h.dilation + 1, h.size);
}

// Pools rows that are produced, or of the map where they lie.
template <typename T>
class PooledRows {
  using A = Compute<T>;

 public:
  PooledRows(const Rows<T>& rows, Scratch& scratch)
      : rows_(rows),
        pool_(task_, scratch),
        narrow_(task_, scratch),
        rows_made_(scratch.take<A>(lanes())),
        owners_(scratch.take<int64_t>(slots_)) {
    if (scratch.only_counts()) return;
    for (int64_t i = 0; i < slots_; ++i) owners_[i] = -1;
  }

  // produce(n, row, count, sink) hands rows of what is pooled to a sink: in channels_last one row.
  template <typename Produce>
  void unit(int64_t u, Produce produce) const {
    const UnitRows rows(task_, u);
    const int64_t pitch = task_.shape.W * (task_.shape.channels_last ? task_.shape.C : 1);
    if (pools_in_place(task_)) {
      const T* const x = static_cast<const T*>(task_.x) + rows.n * h_.size * pitch;
      const PooledMap<T> from{.data = x, .row_stride = pitch, .relu = task_.relu};
      if constexpr (sizeof(T) == 2) {
        if (!task_.argmax && narrow_.write_numbers(rows.n, rows.begin, rows.end, from)) return;
      }
      pool_.write(rows.n, rows.begin, rows.end, from);
    } else if (task_.shape.channels_last) {
      for (int64_t i = h_.first(rows.begin); i < h_.last(rows.begin); ++i) {
        const int64_t row = h_.element(rows.begin, i), slot = row % slots_, owner = rows.n * h_.size + row;
        if (owners_[slot] == owner) continue;
        owners_[slot] = owner;
        produce(rows.n, row, 1, TileSink<A>{rows_.tile, rows_made_ + slot * slot_lanes_});
      }
      pool_.write(rows.n, rows.begin, rows.end,
                  PooledMap<A>{.data = rows_made_, .row_stride = slot_lanes_, .slots = slots_});
    } else {
      const int64_t begin = std::max<int64_t>(h_.element(rows.begin, 0), 0);
      const int64_t end = std::clamp(h_.element(rows.end - 1, h_.kernel - 1) + 1, begin, h_.size);
      const Tile tile = rows_.rows(end - begin);
      produce(rows.n, begin, end - begin, TileSink<A>{tile, rows_made_});
      for (int64_t c = 0; c < tile.channels; ++c) {
        const PooledMap<A> map{.data = rows_made_ + tile.in_scratch(c), .row_stride = pitch, .first_row = begin};
        pool_.write(rows.n * tile.channels + c, rows.begin, rows.end, map);
      }
    }
  }

 private:
  int64_t lanes() const {
    if (!task_.pool || pools_in_place(task_)) return 0;
    return task_.shape.channels_last ? slots_ * slot_lanes_ : rows_.rows(rows_at_a_time(task_)).lanes();
  }

  const Rows<T> rows_;
  const TailTask& task_ = rows_.task;
  const PoolAxis& h_ = task_.pool.h;
  const PoolForward<T> pool_;
  struct Nothing {
    Nothing(const TailTask&, Scratch&) {}
  };
  [[no_unique_address]] const std::conditional_t<sizeof(T) == 2, PoolForward<T, int16_t>, Nothing> narrow_;
  // In channels_last row r is in slot r % slots, if owners[slot] says so.
  const int64_t slots_ = std::min((h_.reach() - 1) * h_.dilation + 1, h_.size), slot_lanes_ = rows_.tile.lanes();
  A* const rows_made_;
  int64_t* const owners_;
};

}  // namespace fastcnn::FASTCNN_CAPABILITY
