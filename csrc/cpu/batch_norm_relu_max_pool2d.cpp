// Batch norm, ReLU and max pooling, max_pool2d(relu((x - mean) * scale + bias)), and its gradient. With dz, the
// gradient of what is rectified and pooled, and means over a channel,
//   dx = scale * (dz - mean(dz) - (x - mean) / (var + eps) * mean(dz * (x - mean))).
// Memory: in training forward reads x twice, for the statistics first, and writes the pooled map and its argmax;
// backward reads x, dy and argmax twice, for the sums first, and writes dx. In evaluation statistics and means are
// none.
#include "../batch_norm_relu_max_pool2d.h"

#include <limits>

#include "dispatch.h"
#include "kernel.h"
#include "max_pool2d_backward.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

// Whole vectors, or the rest of a run.
template <bool whole, typename T>
FASTCNN_INLINE Vec<Compute<T>> read(const T* p, int64_t rest) {
  if constexpr (whole) return load(p);
  else return load_first(p, rest);
}

// The channels of a run: a vector of them at a time in channels_last, and one for all in NCHW.
template <typename A, bool channels_last>
struct Channels {
  static constexpr A kNone = std::numeric_limits<A>::quiet_NaN();
  const A *mean, *scale, *bias, *offset, *slope;
  Vec<A> low, floor;  // 0 where a ReLU is before, and after; else NaN, below which nothing is

  Channels(const BatchNormTask& t, int64_t channel)
      : mean(at(t.mean, channel)),
        scale(at(t.scale, channel)),
        bias(at(t.bias, channel)),
        offset(at(t.offset, channel)),
        slope(at(t.slope, channel)),
        low(broadcast(t.relu_first ? A(0) : kNone)),
        floor(broadcast(t.relu ? A(0) : kNone)) {}

  static const A* at(const void* p, int64_t channel) { return p ? static_cast<const A*>(p) + channel : nullptr; }
  FASTCNN_INLINE static Vec<A> of(const A* p, int64_t i) {
    if constexpr (channels_last) return load(p + i);
    else return broadcast(*p);
  }
  FASTCNN_INLINE Vec<A> rectified(Vec<A> x) const { return x < low ? low : x; }
  FASTCNN_INLINE Vec<A> centred(Vec<A> x, int64_t i) const { return rectified(x) - of(mean, i); }
  FASTCNN_INLINE Vec<A> normalized(Vec<A> centred, int64_t i) const { return centred * of(scale, i) + of(bias, i); }
};

// x, normalized and rectified.
template <typename T, bool channels_last>
struct NormalizedSource {
  using A = Compute<T>;
  const BatchNormTask& task;
  TensorSource<T> x;
  int64_t channel;  // the first one of the tile

  FASTCNN_INLINE auto operator()(int64_t r) const {
    return [from = x(r), c = Channels<A, channels_last>(task, channel + x.tile.first_channel(r))](int64_t i)
               FASTCNN_INLINE_LAMBDA {
                 const Vec<A> z = c.normalized(c.centred(from(i), i), i);
                 return z < c.floor ? c.floor : z;
               };
  }
};

template <typename V>
FASTCNN_INLINE double sum_of_lanes(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  double lanes[n];
  for (int l = 0; l < n; ++l) lanes[l] = v[l];
  for (int half = n / 2; half; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

// Sums of two terms over the pixels of tiles, for each channel: of a few in the compute type, lane by lane in NCHW, and
// of all in double.
template <typename A>
class Sums {
 public:
  Sums(int64_t channels, Scratch& scratch)
      : first(scratch.take<double>(channels)),
        second(scratch.take<double>(channels)),
        channels_(channels),
        few_first_(scratch.take<A>((channels + 1) * kLanes<A>)),
        few_second_(scratch.take<A>((channels + 1) * kLanes<A>)) {}

  void clear() const {
    for (int64_t c = 0; c < channels_; ++c) first[c] = second[c] = 0;
    for (int64_t i = 0; i < channels_ * kLanes<A>; i += kLanes<A>) put(i, Vec<A>{}, Vec<A>{});
  }

  // term(r)(i, whole, terms) hands both vectors at element i of run r to terms.
  template <typename Terms>
  FASTCNN_INLINE void add(const Tile& tile, Terms term) const {
    if (tile.channels_last) add_pixels(tile, term);
    else add_channels(tile, term);
  }

  // In NCHW, after the last tile.
  void add_lanes() const {
    for (int64_t c = 0; c < channels_; ++c) {
      const int64_t at = c * kLanes<A>;
      first[c] += sum_of_lanes(load(few_first_ + at)), second[c] += sum_of_lanes(load(few_second_ + at));
      put(at, Vec<A>{}, Vec<A>{});
    }
  }

  double *const first, *const second;

 private:
  static constexpr int64_t kFew = 64;  // pixels in channels_last; vectors in NCHW

  FASTCNN_INLINE void put(int64_t i, Vec<A> a, Vec<A> b) const { store(few_first_ + i, a), store(few_second_ + i, b); }

  template <typename Terms>
  FASTCNN_INLINE void add_pixels(const Tile& tile, Terms term) const {
    const int64_t n = tile.channels;
    for (int64_t begin = 0; begin < tile.pixels; begin += kFew) {
      for (int64_t r = begin; r < std::min(begin + kFew, tile.pixels); ++r) {
        const auto at = term(r);
        const auto add = [&](int64_t i, auto whole) FASTCNN_INLINE_LAMBDA {
          at(i, whole, [&](Vec<A> a, Vec<A> b) FASTCNN_INLINE_LAMBDA {
            put(i, load(few_first_ + i) + a, load(few_second_ + i) + b);
          });
        };
        int64_t i = 0;
        for (; i + kLanes<A> <= n; i += kLanes<A>) add(i, std::true_type{});
        if (i < n) add(i, std::false_type{});
      }
      for (int64_t c = 0; c < n; ++c) first[c] += few_first_[c], second[c] += few_second_[c];
      for (int64_t i = 0; i < n; i += kLanes<A>) put(i, Vec<A>{}, Vec<A>{});
    }
  }

  template <typename Terms>
  FASTCNN_INLINE void add_channels(const Tile& tile, Terms term) const {
    const int64_t n = tile.pixels;
    for (int64_t c = 0; c < tile.channels; ++c) {
      const auto at = term(c);
      Vec<A> sum = load(few_first_ + c * kLanes<A>), other = load(few_second_ + c * kLanes<A>);
      int64_t i = 0;
      for (int64_t few = 0; i + kLanes<A> <= n; i += kLanes<A>) {
        at(i, std::true_type{}, [&](Vec<A> a, Vec<A> b) FASTCNN_INLINE_LAMBDA { sum += a, other += b; });
        if (++few < kFew) continue;
        few = 0;
        first[c] += sum_of_lanes(sum), second[c] += sum_of_lanes(other);
        sum = other = Vec<A>{};
      }
      if (i < n) {
        at(i, std::false_type{}, [&, rest = static_cast<Lane<A>>(n - i)](Vec<A> a, Vec<A> b) FASTCNN_INLINE_LAMBDA {
          IntVec<A> lane;
          for (int l = 0; l < kLanes<A>; ++l) lane[l] = l;
          sum += lane < rest ? a : Vec<A>{}, other += lane < rest ? b : Vec<A>{};
        });
      }
      put(c * kLanes<A>, sum, other);
    }
  }

  const int64_t channels_;
  A *const few_first_, *const few_second_;
};

// f gets whether channels are last, as a constant.
template <typename F>
FASTCNN_INLINE void with_format(const BatchNormTask& task, F f) {
  if (task.shape.channels_last) f(std::true_type{});
  else f(std::false_type{});
}

// The piece of x, or of a tensor of its shape, that a unit without a pool does.
struct Piece {
  Tile tile;
  int64_t at, channel, part;

  Piece(const BatchNormTask& task, int64_t u) {
    const Shape& s = task.shape;
    if (s.channels_last) {
      tile = {true, s.C, 1, task.part_pixels(u)};
      at = u * task.piece_pixels() * s.C, channel = 0, part = u;
    } else {
      tile = {false, 1, 1, s.pixels()};
      at = u * s.pixels(), channel = u % s.C, part = u / s.C;
    }
  }
  // No stride: in NCHW there is one channel.
  template <typename T>
  TensorSource<T> source(const void* x) const {
    return {tile, static_cast<const T*>(x) + at, 0, 1024};
  }
  template <typename T>
  TensorSink<T> sink(void* out) const {
    return {tile, static_cast<T*>(out) + at, 0};
  }
};

// Of each part the mean and the sum of squared differences from it, by sums of differences from that of
// its first pixels: a number so close to it that little is lost, whatever the pixels are.
template <typename T>
struct Statistics {
  using A = Compute<T>;
  const BatchNormTask& task;
  const Sums<A> sums;
  A* const near;

  Statistics(const BatchNormTask& t, Scratch& scratch)
      : task(t), sums(width(t), scratch), near(scratch.take<A>(width(t) + kVectorBytes)) {}

  static int64_t width(const BatchNormTask& t) { return t.shape.channels_last ? t.shape.C : 1; }

  void unit(int64_t u) const {
    const Piece piece(task, u);
    with_format(task, [&](auto channels_last) { piece_statistics<channels_last>(piece); });
  }

  template <bool channels_last>
  void piece_statistics(const Piece& piece) const {
    const Tile& tile = piece.tile;
    const T* const x = static_cast<const T*>(task.x) + piece.at;
    const Channels<A, channels_last> c(task, 0);
    const int64_t n = tile.run();
    if constexpr (channels_last) {
      const int64_t few = std::min(tile.pixels, std::max<int64_t>(16, 1024 / n));
      for (int64_t i = 0; i < n; i += kLanes<A>) {
        Vec<A> sum = {};
        for (int64_t r = 0; r < few; ++r) {
          const T* const p = x + r * n + i;
          sum += c.rectified(i + kLanes<A> <= n ? load(p) : load_first(p, n - i));
        }
        store(near + i, sum / static_cast<A>(few));
      }
    } else {
      const int64_t few = std::min<int64_t>(n, 64);
      Vec<A> sum = {};
      for (int64_t i = 0; i < few; i += kLanes<A>) {
        sum += c.rectified(i + kLanes<A> <= few ? load(x + i) : load_first(x + i, few - i));
      }
      near[0] = static_cast<A>(sum_of_lanes(sum) / few);
    }
    sums.clear();
    sums.add(tile, [&](int64_t r) FASTCNN_INLINE_LAMBDA {
      return [p = x + r * n, n, c, from = near](int64_t i, auto whole, auto terms) FASTCNN_INLINE_LAMBDA {
        const Vec<A> d = c.rectified(read<whole>(p + i, n - i)) - c.of(from, i);
        terms(d, d * d);
      };
    });
    sums.add_lanes();
    double* const means = task.sums + piece.part * task.shape.C + piece.channel;
    double* const squares = means + task.sum_rows * task.shape.C;
    for (int64_t c = 0; c < tile.channels; ++c) {
      const double shift = sums.first[c] / tile.pixels;
      means[c] = near[c] + shift;
      squares[c] = sums.second[c] - shift * sums.first[c];
    }
  }
};

template <typename T>
struct Forward {
  using A = Compute<T>;
  const BatchNormTask& task;
  const Rows<T> rows;
  const PooledRows<T> pool;

  Forward(const BatchNormTask& t, Scratch& scratch) : task(t), rows{t}, pool(rows, scratch) {}

  void unit(int64_t u) const {
    with_format(task, [&](auto channels_last) FASTCNN_INLINE_LAMBDA {
      if (!task.pool) {
        const Piece piece(task, u);
        const NormalizedSource<T, channels_last> y{task, piece.source<T>(task.x), piece.channel};
        return copy<A>(piece.tile, y, piece.sink<T>(task.out));
      }
      pool.unit(u, [&](int64_t n, int64_t row, int64_t count, auto sink) {
        const TensorSource<T> x = rows.source(task.x, n, row, count);
        copy<A>(x.tile, NormalizedSource<T, channels_last>{task, x, n % task.planes}, sink);
      });
    });
  }
};

// What both passes of backward need: dz of a tile, from dy where there is no pool, and from what one passes on.
template <typename T>
struct Gradients {
  using A = Compute<T>;
  const BatchNormTask& task;
  const Rows<T> rows;
  A* const gathered;
  PoolBackward<T> pool;

  Gradients(const BatchNormTask& t, Scratch& scratch)
      : task(t), rows{t}, gathered(rows.take(scratch, rows_at_a_time_backward(t))), pool(t, scratch) {}

  // f(tile, x, dy, dx, channel, part) for the tiles of a unit, once for each format.
  template <typename F>
  FASTCNN_INLINE void for_each_tile(int64_t u, F f) {
    with_format(task, [&](auto channels_last) FASTCNN_INLINE_LAMBDA {
      if (!task.pool) {
        const Piece p(task, u);
        const auto x = p.source<T>(task.x), dy = p.source<T>(task.dy);
        return f(channels_last, p.tile, x, dy, p.sink<T>(task.out), p.channel);
      }
      for_each_rows(task, u, [&](int64_t n, int64_t row, int64_t count) {
        pool.gather(n, row, count, gathered);
        const Tile tile = rows.rows(count);
        const TensorSource<A> dy{tile, gathered, tile.run(), 0};  // no pads
        const TensorSource<T> x = rows.source(task.x, n, row, count);
        f(channels_last, tile, x, dy, rows.sink(task.out, n, row, count), n % task.planes);
      });
    });
  }
};

// With a pool, of the outputs: dz of an output is the gradient at its maximum, which is fetched from where that was.
template <typename T>
struct GradientSums {
  using A = Compute<T>;
  const BatchNormTask& task;
  const PoolAxis &h, &w;
  const Shape out = task.out_shape();
  Gradients<T> gradients;
  const Sums<A> sums;
  T* const maxima;         // of a row of outputs, as they lie in memory there but for the stride of channels
  int64_t* const offsets;  // from a window's start, by place, if that is a byte
  // A dilated window can step over the map. Its place is none.
  const bool by_outputs;

  GradientSums(const BatchNormTask& t, Scratch& scratch)
      : task(t),
        h(t.pool.h),
        w(t.pool.w),
        gradients(t, scratch),
        sums(width(t), scratch),
        maxima(scratch.take<T>(t.shape.C * t.pool.w.out)),
        offsets(scratch.take<int64_t>(256)),
        by_outputs(t.pool && !skips(h) && !skips(w)) {
    if (scratch.only_counts()) return;
    for (int64_t p = 0; p < std::min<int64_t>(h.kernel * w.kernel, 256); ++p) offsets[p] = offset(p);
  }

  static int64_t width(const BatchNormTask& t) { return t.pool || t.shape.channels_last ? t.shape.C : 1; }
  static bool skips(const PoolAxis& axis) {
    for (int64_t o = 0; o < axis.out; ++o) {
      if (axis.first(o) >= axis.last(o)) return true;
    }
    return false;
  }
  int64_t offset(int64_t place) const {
    const int64_t rows = place / w.kernel * h.dilation, columns = place % w.kernel * w.dilation;
    return (rows * task.shape.W + columns) * task.shape.pixel_stride();
  }

  void unit(int64_t u) {
    sums.clear();
    if (by_outputs) {
      const int64_t blocks = output_blocks(task), n = u / blocks, first = u % blocks * kOutputRows;
      for (int64_t o = first; o < std::min(first + kOutputRows, h.out); ++o) add_outputs(n, o);
    } else {
      gradients.for_each_tile(u, [&](auto channels_last, Tile tile, auto x, auto dy, auto, int64_t channel) {
        add<channels_last>(tile, x.x, x.channel_stride, dy.x, dy.channel_stride, channel);
      });
    }
    sums.add_lanes();
    const int64_t channels = width(task);
    double *const first = task.sums + u * channels, *const second = first + task.sum_rows * task.shape.C;
    for (int64_t c = 0; c < channels; ++c) first[c] = sums.first[c], second[c] = sums.second[c];
  }

  static constexpr int64_t kOutputRows = 8;
  static int64_t output_blocks(const BatchNormTask& t) { return (t.pool.h.out + kOutputRows - 1) / kOutputRows; }

 private:
  void add_outputs(int64_t n, int64_t o) const {
    const int64_t at = row_offset(out, n, o);
    if (task.pool.wide_argmax()) {
      fetch(n, o, static_cast<const int32_t*>(task.argmax) + at, [&](int64_t place) { return offset(place); });
    } else {
      fetch(n, o, static_cast<const uint8_t*>(task.argmax) + at, [&](int64_t place) { return offsets[place]; });
    }
    const Tile tile{out.channels_last, out.C, 1, out.W};
    const T* const dy = static_cast<const T*>(task.dy) + at;
    with_format(task, [&](auto last) { add<last>(tile, maxima, out.W, dy, out.channel_stride(), 0); });
  }

  template <typename Argmax, typename Offset>
  void fetch(int64_t n, int64_t o, const Argmax* argmax, Offset offset) const {
    const Shape& s = task.shape;
    const T* const x = static_cast<const T*>(task.x);
    // Of the first window; it may lie in the padding.
    const int64_t start = n * s.image_stride() + (h.element(o, 0) * s.W + w.element(0, 0)) * s.pixel_stride();
    if (s.channels_last) {
      for (int64_t i = 0; i < out.W; ++i) {
        const int64_t at = start + i * w.stride * s.C, to = i * s.C;
        for (int64_t c = 0; c < s.C; ++c) maxima[to + c] = x[at + c + offset(argmax[to + c])];
      }
    } else {
      for (int64_t c = 0; c < s.C; ++c) {
        const int64_t at = start + c * s.channel_stride(), from = c * out.channel_stride();
        for (int64_t i = 0; i < out.W; ++i) maxima[c * out.W + i] = x[at + i * w.stride + offset(argmax[from + i])];
      }
    }
  }

  template <bool channels_last, typename D>
  void add(Tile tile, const T* x, int64_t x_stride, const D* dy, int64_t dy_stride, int64_t channel) const {
    sums.add(tile, [&](int64_t r) FASTCNN_INLINE_LAMBDA {
      return [px = x + tile.in_memory(r, x_stride), pd = dy + tile.in_memory(r, dy_stride), n = tile.run(),
              c = Channels<A, channels_last>(task, channel + tile.first_channel(r))](int64_t i, auto whole, auto terms)
                 FASTCNN_INLINE_LAMBDA {
                   const Vec<A> d = c.centred(read<whole>(px + i, n - i), i), dz = read<whole>(pd + i, n - i);
                   const Vec<A> passed = c.normalized(d, i) <= c.floor ? Vec<A>{} : dz;
                   terms(passed, passed * d);
                 };
    });
  }
};

template <typename T>
struct Backward {
  using A = Compute<T>;
  const BatchNormTask& task;
  Gradients<T> gradients;

  Backward(const BatchNormTask& t, Scratch& scratch) : task(t), gradients(t, scratch) {}

  void unit(int64_t u) {
    gradients.for_each_tile(u, [&](auto channels_last, Tile tile, auto x, auto dy, auto dx, int64_t channel) {
      const int64_t runs = tile.runs(), n = tile.run();
      for (int64_t r = 0; r < runs; ++r) {
        const auto from = x(r);
        const auto gradient = dy(r);
        const auto to = dx(r);
        const Channels<A, channels_last> c(task, channel + tile.first_channel(r));
        for_each_vector<A>(n, [&](int64_t i) FASTCNN_INLINE_LAMBDA {
          const Vec<A> v = from(i), d = c.centred(v, i);
          const Vec<A> dz = c.normalized(d, i) <= c.floor ? Vec<A>{} : gradient(i);
          Vec<A> result = c.of(c.scale, i) * dz;
          if (task.training) result += c.of(c.offset, i) + c.of(c.slope, i) * d;
          to(i, v <= c.low ? Vec<A>{} : result);
        });
      }
    });
  }
};

int64_t pieces(const BatchNormTask& task) { return task.pieces(); }
int64_t units(const BatchNormTask& task) { return task.pool ? UnitRows::units(task) : task.pieces(); }
int64_t blocks(const BatchNormTask& task) { return task.pool ? task.shape.N * row_blocks(task) : task.pieces(); }

// Of rows of outputs; of inputs where some windows are empty.
int64_t sum_blocks(const BatchNormTask& task) {
  using Any = GradientSums<float>;
  const bool by_outputs = task.pool && !Any::skips(task.pool.h) && !Any::skips(task.pool.w);
  return by_outputs ? task.shape.N * Any::output_blocks(task) : blocks(task);
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(batch_norm_statistics, BatchNormTask, pieces, scratch_bytes<Statistics>, run<Statistics>)
FASTCNN_REGISTER_KERNEL(batch_norm_relu_max_pool2d, BatchNormTask, units, scratch_bytes<Forward>, run<Forward>)
FASTCNN_REGISTER_KERNEL(batch_norm_sums, BatchNormTask, sum_blocks, scratch_bytes<GradientSums>, run<GradientSums>)
FASTCNN_REGISTER_KERNEL(batch_norm_relu_max_pool2d_backward, BatchNormTask, blocks, scratch_bytes<Backward>,
                        run<Backward>)
