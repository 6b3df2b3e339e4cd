// LRN of one tile, forward and backward, for lrn and the tail: s = k + alpha/size * sum(x^2), y = x * s^-beta.
//
// Each window sum is added from the window's elements. How they are found depends on the memory format:
//   NCHW            the window is vectors of neighboring channels, in registers where they are five (AlexNet's), else
//                   in a ring of the last few rows;
//   channels_last   a window of five within whole vectors is a vector shifted in registers;
//                   any other is read at shifted places of a tile in scratch, with zeros between the runs.
#pragma once

#include "../lrn.h"
#include "scratch.h"
#include "tile.h"

namespace fastcnn::FASTCNN_CAPABILITY {

// s^-beta, and s^-(beta+1) from it. The usual exponents need no pow.
enum class Power { half, three_quarters, coarse_three_quarters, one, any };

template <Power power, typename A>
FASTCNN_INLINE Vec<A> inverse_power(Vec<A> s, A beta, Vec<A>* over_s = nullptr) {
  Vec<A> t;
  if constexpr (power == Power::any) {
    for (int i = 0; i < kLanes<A>; ++i) t[i] = std::pow(s[i], -beta);
    if (over_s) *over_s = t / s;
  } else if constexpr (power == Power::coarse_three_quarters && std::is_same_v<A, float>) {
    t = coarse_inverse_power(s);
    if (over_s) *over_s = t / s;
  } else if constexpr (power == Power::one) {
    t = 1 / s;
    if (over_s) *over_s = t * t;
  } else {
    const InverseRoot<Vec<A>> r(s);
    t = power == Power::half ? r.root() : r.three_quarters();
    if (over_s) *over_s = t * r.reciprocal();
  }
  return t;
}

#if FASTCNN_SHUFFLE
// The sums of five neighboring lanes of vectors that come one after the other: of pairs, which two windows share.
template <typename A>
class SumOfFive {
 public:
  // The sum of the lanes l-2 ... l+2 of the vector that came before, of zeros at first; `next` comes now.
  FASTCNN_INLINE Vec<A> then(Vec<A> next) {
    constexpr int n = kLanes<A>;
    return [&]<int... i>(std::integer_sequence<int, i...>) FASTCNN_INLINE_LAMBDA {
      const Vec<A> pairs = at_ + __builtin_shufflevector(at_, next, (1 + i)...);
      const Vec<A> back2 = __builtin_shufflevector(pairs_, pairs, (n - 2 + i)...);
      const Vec<A> sum = (back2 + pairs) + __builtin_shufflevector(at_, next, (2 + i)...);
      at_ = next, pairs_ = pairs;
      return sum;
    }(std::make_integer_sequence<int, n>{});
  }

 private:
  Vec<A> at_{}, pairs_{};
};
#endif

template <typename A>
class TileLRN {
 public:
  // The scratch is the same for every tile of at most as many pixels. `coarse` is for results that are rounded to 16
  // bits at once: s^-3/4 then has 13 bits, two more than they can hold.
  TileLRN(const LRN& lrn, const Tile& tile, Scratch& scratch, bool coarse = false)
      : before_(lrn.before(tile.group())),
        after_(lrn.after(tile.group())),
        beta_value_(lrn.beta),
        coarse_(coarse),
        scale_(static_cast<A>(lrn.alpha / lrn.size)),
        beta_(static_cast<A>(lrn.beta)),
        k_(static_cast<A>(lrn.k)),
        slope_(static_cast<A>(2 * lrn.alpha * lrn.beta / lrn.size)) {
    const int64_t lanes = tile.channels_last ? padded(tile).lanes() : (before_ + after_ + 1) * row_stride(tile.pixels);
    for (A*& buffer : buffers_) buffer = scratch.take<A>(lanes);
  }

  // Whether a window is found in registers, not in scratch: what comes next is then of the next pixels.
  bool in_registers(const Tile& tile) const {
    const bool shuffles = FASTCNN_SHUFFLE && tile.run() % kLanes<A> == 0;
    return before_ == 2 && after_ == 2 && (shuffles || !tile.channels_last);
  }

  // How many elements ahead of what is read a source should ask for.
  int64_t ahead(const Tile& tile, int64_t channel_stride) const {
    if (tile.channels_last) return 2048;
    return in_registers(tile) ? 128 : (1024 / tile.pixels + 1) * channel_stride;
  }

  // y = x * s^-beta
  template <typename Source, typename Sink>
  void forward(const Tile& tile, Source x, Sink y) const {
    with_power([&]<Power power>() {
      if (!tile.channels_last) forward_nchw<power>(tile, x, y);
      else if (in_registers(tile)) forward_registers<power>(tile, x, y);
      else forward_tile<power>(tile, x, y);
    });
  }

  // dx = dy * s^-beta - 2*alpha*beta/size * x * sum(dy * x * s^-(beta+1)), the sum over the windows that hold the
  // channel. The sink also gets x.
  template <typename Source, typename Gradient, typename Sink>
  void backward(const Tile& tile, Source x, Gradient dy, Sink dx) const {
    with_power([&]<Power power>() {
      if (!tile.channels_last) backward_nchw<power>(tile, x, dy, dx);
      else if (in_registers(tile)) backward_registers<power>(tile, x, dy, dx);
      else backward_tile<power>(tile, x, dy, dx);
    });
  }

 private:
  using V = Vec<A>;

  static constexpr auto square = [](V v) FASTCNN_INLINE_LAMBDA { return v * v; };
  static constexpr auto itself = [](V v) FASTCNN_INLINE_LAMBDA { return v; };

  template <typename F>
  void with_power(F f) const {
    if (beta_value_ == 0.5) return f.template operator()<Power::half>();
    if (beta_value_ == 0.75 && coarse_) return f.template operator()<Power::coarse_three_quarters>();
    if (beta_value_ == 0.75) return f.template operator()<Power::three_quarters>();
    if (beta_value_ == 1) return f.template operator()<Power::one>();
    return f.template operator()<Power::any>();
  }

  // NCHW. A ring holds the rows of exactly one window, so that the window sum is the sum over the ring.
  struct Ring {
    A* rows_;
    int64_t count, stride, at;

    Ring(A* rows, int64_t count, int64_t pixels)
        : rows_(rows), count(count), stride(row_stride(pixels)), at(count - 1) {
      for (int64_t i = 0; i < count * stride; ++i) rows_[i] = 0;
    }
    void advance() { at = at + 1 < count ? at + 1 : 0; }
    A* newest() const { return rows_ + at * stride; }
    A* back(int64_t steps) const { return rows_ + (at >= steps ? at - steps : at - steps + count) * stride; }

    template <int fixed, typename F>
    FASTCNN_INLINE V sum(int64_t p, F f) const {
      const A* row = rows_ + p;
      if constexpr (fixed == 5) {
        return (f(load(row)) + f(load(row + stride))) + (f(load(row + 2 * stride)) + f(load(row + 3 * stride))) +
               f(load(row + 4 * stride));
      }
      V sum{};
      for (int64_t r = 0; r < count; ++r) sum += f(load(row + r * stride));
      return sum;
    }
  };

  static int64_t row_stride(int64_t pixels) { return (pixels + kVectorBytes - 1) / kVectorBytes * kVectorBytes; }

  template <Power power, typename Source, typename Sink>
  void forward_nchw(const Tile& tile, Source x, Sink y) const {
    if (in_registers(tile)) forward_columns<power>(tile, x, y);
    else if (before_ + after_ == 4) forward_planes<power, 5>(tile, x, y);
    else forward_planes<power, 0>(tile, x, y);
  }

  // The sums of five vectors that come one after the other, of pairs, which two sums share; at first there were zeros.
  class PairSums {
   public:
    FASTCNN_INLINE V then(V next) {
      const V pair = last_ + next, sum = (pairs_[0] + pairs_[2]) + next;
      pairs_[0] = pairs_[1], pairs_[1] = pairs_[2], pairs_[2] = pair, last_ = next;
      return sum;
    }

   private:
    V last_{}, pairs_[3] = {};
  };

  // f.operator()<count>(first, p): so many vectors of pixels from p on, through the channels from `first` on. Each is
  // read and written in pieces of as many vectors as are done at a time: if they are short, memory is slow.
  template <typename F>
  FASTCNN_INLINE void for_each_columns(const Tile& tile, F f) const {
    constexpr int kMany = 4;
    for (int64_t first = 0; first < tile.channels; first += tile.group()) {
      int64_t p = 0;
      for (; p + kMany * kLanes<A> <= tile.pixels; p += kMany * kLanes<A>) f.template operator()<kMany>(first, p);
      for_each_vector<A>(tile.pixels - p, [&](int64_t i) FASTCNN_INLINE_LAMBDA {
        f.template operator()<1>(first, tile.pixels < kLanes<A> ? 0 : std::min(p + i, tile.pixels - kLanes<A>));
      });
    }
  }

  // What is of the window stays in registers.
  template <Power power, typename Source, typename Sink>
  void forward_columns(const Tile& tile, Source x, Sink y) const {
    const int64_t channels = tile.group();
    for_each_columns(tile, [&]<int count>(int64_t first, int64_t p) FASTCNN_INLINE_LAMBDA {
      V now[count] = {}, next[count] = {};
      PairSums squares[count];
      for (int64_t c = -2; c < channels; ++c) {
        const auto from = x(first + std::min(c + 2, channels - 1));
        const auto to = y(first + std::max<int64_t>(c, 0));
        for (int i = 0; i < count; ++i) {
          const int64_t at = p + i * kLanes<A>;
          const V after = c + 2 < channels ? from(at) : V{}, sum = squares[i].then(after * after);
          if (c >= 0) to(at, now[i] * inverse_power<power, A>(k_ + scale_ * sum, beta_));
          now[i] = next[i], next[i] = after;
        }
      }
    });
  }

  template <Power power, int fixed, typename Source, typename Sink>
  void forward_planes(const Tile& tile, Source x, Sink y) const {
    const int64_t n = tile.pixels, channels = tile.group();
    for (int64_t first = 0; first < tile.channels; first += channels) {
      Ring ring(buffers_[0], before_ + after_ + 1, n);
      for (int64_t c = -after_; c < channels; ++c) {
        ring.advance();
        read_channel(ring.newest(), tile, x, first, c + after_);
        if (c < 0) continue;
        const A* const now = ring.back(after_);
        const auto to = y(first + c);
        for_each_vector<A>(n, [&](int64_t p) FASTCNN_INLINE_LAMBDA {
          const V sum = ring.template sum<fixed>(p, square);
          to(p, load(now + p) * inverse_power<power, A>(k_ + scale_ * sum, beta_));
        });
      }
    }
  }

  template <Power power, typename Source, typename Gradient, typename Sink>
  void backward_nchw(const Tile& tile, Source x, Gradient dy, Sink dx) const {
    if (in_registers(tile)) backward_columns<power>(tile, x, dy, dx);
    else if (before_ + after_ == 4) backward_planes<power, 5>(tile, x, dy, dx);
    else backward_planes<power, 0>(tile, x, dy, dx);
  }

  // Channel c completes the sum of channel c - 2.
  template <Power power, typename Source, typename Gradient, typename Sink>
  void backward_columns(const Tile& tile, Source x, Gradient dy, Sink dx) const {
    const int64_t channels = tile.group();
    for_each_columns(tile, [&]<int count>(int64_t first, int64_t p) FASTCNN_INLINE_LAMBDA {
      V value[count][5] = {};   // x of the channels c-2 ... c+2
      V direct[count][3] = {};  // dy * s^-beta of c-2 ... c
      PairSums squares[count], summands[count];
      for (int64_t c = -2; c < channels + 2; ++c) {
        const auto from = x(first + std::min(c + 2, channels - 1));
        const auto gradient = dy(first + std::clamp<int64_t>(c, 0, channels - 1));
        const auto to = dx(first + std::max<int64_t>(c - 2, 0));
        for (int j = 0; j < count; ++j) {
          const int64_t at = p + j * kLanes<A>;
          const V after = c + 2 < channels ? from(at) : V{};
          for (int i = 0; i < 4; ++i) value[j][i] = value[j][i + 1];
          value[j][4] = after;
          const V sum = squares[j].then(after * after);
          if (c < 0) continue;
          V product{}, summand{};
          if (c < channels) {
            V over_s;
            const V g = gradient(at);
            product = g * inverse_power<power, A>(k_ + scale_ * sum, beta_, &over_s);
            summand = g * value[j][2] * over_s;
          }
          direct[j][0] = direct[j][1], direct[j][1] = direct[j][2], direct[j][2] = product;
          const V of_window = summands[j].then(summand);
          if (c >= 2) to(at, direct[j][0] - slope_ * value[j][0] * of_window, value[j][0]);
        }
      }
    });
  }

  // Channel c completes the sum of channel c - before, whose x is then the oldest of its ring.
  template <Power power, int fixed, typename Source, typename Gradient, typename Sink>
  void backward_planes(const Tile& tile, Source x, Gradient dy, Sink dx) const {
    const int64_t rows = before_ + after_ + 1, n = tile.pixels, channels = tile.group();
    for (int64_t first = 0; first < tile.channels; first += channels) {
      Ring ring(buffers_[0], rows, n), summands(buffers_[1], rows, n), direct(buffers_[2], rows, n);  // dy * s^-beta
      for (int64_t c = -after_; c < channels + before_; ++c) {
        ring.advance();
        read_channel(ring.newest(), tile, x, first, c + after_);
        if (c < 0) continue;
        summands.advance();
        direct.advance();
        const A *const now = ring.back(after_), *const old = ring.back(rows - 1),
                       *const old_direct = direct.back(before_);
        A *const summand = summands.newest(), *const product = direct.newest();
        if (c < channels) {
          const auto gradient = dy(first + c);
          for_each_vector<A>(n, [&](int64_t p) FASTCNN_INLINE_LAMBDA {
            V over_s;
            const V g = gradient(p), s = k_ + scale_ * ring.template sum<fixed>(p, square);
            store(product + p, g * inverse_power<power, A>(s, beta_, &over_s));
            store(summand + p, g * load(now + p) * over_s);
          });
        } else {
          for_each_vector<A>(n, [&](int64_t p) FASTCNN_INLINE_LAMBDA { store(summand + p, V{}); });
        }
        if (c < before_) continue;
        const auto to = dx(first + c - before_);
        for_each_vector<A>(n, [&](int64_t p) FASTCNN_INLINE_LAMBDA {
          const V sum = summands.template sum<fixed>(p, itself), value = load(old + p);
          to(p, load(old_direct + p) - slope_ * value * sum, value);
        });
      }
    }
  }

  // A channel's row, of zeros where it does not exist.
  template <typename Source>
  FASTCNN_INLINE static void read_channel(A* row, const Tile& tile, Source x, int64_t first, int64_t c) {
    const bool exists = c < tile.group();
    const auto from = x(exists ? first + c : first);
    for_each_vector<A>(tile.pixels, [&](int64_t p) FASTCNN_INLINE_LAMBDA { store(row + p, exists ? from(p) : V{}); });
  }

  // channels_last, in registers.
#if FASTCNN_SHUFFLE

  template <Power power, typename Source, typename Sink>
  void forward_registers(const Tile& tile, Source x, Sink y) const {
    const int64_t n = tile.run();
    for (int64_t r = 0; r < tile.runs(); ++r) {
      const auto from = x(r);
      const auto to = y(r);
      V now = from(0);
      SumOfFive<A> squares;
      squares.then(now * now);
      for (int64_t i = 0; i < n; i += kLanes<A>) {
        const V next = i + kLanes<A> < n ? from(i + kLanes<A>) : V{};
        const V s = k_ + scale_ * squares.then(next * next);
        to(i, now * inverse_power<power, A>(s, beta_));
        now = next;
      }
    }
  }

  template <Power power, typename Source, typename Gradient, typename Sink>
  void backward_registers(const Tile& tile, Source x, Gradient dy, Sink dx) const {
    const int64_t n = tile.run();
    for (int64_t r = 0; r < tile.runs(); ++r) {
      const auto from = x(r);
      const auto gradient = dy(r);
      const auto to = dx(r);
      V now = from(0), last{}, direct{};  // x; of the vector before: x, and dy * s^-beta
      SumOfFive<A> squares, summands;
      squares.then(now * now);
      for (int64_t i = 0; i <= n; i += kLanes<A>) {
        const V next = i + kLanes<A> < n ? from(i + kLanes<A>) : V{};
        V direct_now{}, summand{};
        if (i < n) {
          V over_s;
          const V g = gradient(i), s = k_ + scale_ * squares.then(next * next);
          direct_now = g * inverse_power<power, A>(s, beta_, &over_s);
          summand = g * now * over_s;
        }
        const V sum = summands.then(summand);
        if (i > 0) to(i - kLanes<A>, direct - slope_ * last * sum, last);
        last = now, direct = direct_now, now = next;
      }
    }
  }
#else
  template <Power, typename... Arguments>
  void forward_registers(Arguments...) const {}
  template <Power, typename... Arguments>
  void backward_registers(Arguments...) const {}
#endif

  // channels_last, through a tile in scratch: flat loops over all of it, pads included.
  Tile padded(Tile tile) const {
    tile.pad = std::max(before_, after_);
    return tile;
  }

  static void clear_pads(const Tile& tile, A* x) {
    for (int64_t r = 0; r <= tile.runs(); ++r) {
      for (int64_t i = 1; i <= tile.pad; ++i) x[tile.in_scratch(r) - i] = 0;
    }
  }

  template <typename F>
  FASTCNN_INLINE static V window_sum(const A* x, int64_t before, int64_t after, F f) {
    V sum{};
    for (int64_t j = -before; j <= after; ++j) sum += f(load(x + j));
    return sum;
  }

  FASTCNN_INLINE V scale_at(const A* x) const { return k_ + scale_ * window_sum(x, before_, after_, square); }

  template <Power power, typename Source, typename Sink>
  void forward_tile(const Tile& unpadded, Source x, Sink y) const {
    const Tile tile = padded(unpadded);
    A *const in = buffers_[0], *const out = buffers_[1];
    copy<A>(tile, x, TileSink<A>{tile, in});
    clear_pads(tile, in);
    for (int64_t i = tile.in_scratch(0); i < tile.in_scratch(tile.runs()); i += kLanes<A>) {
      store(out + i, load(in + i) * inverse_power<power, A>(scale_at(in + i), beta_));
    }
    copy<A>(tile, TileSource<A>{tile, out}, y);
  }

  template <Power power, typename Source, typename Gradient, typename Sink>
  void backward_tile(const Tile& unpadded, Source x, Gradient dy, Sink dx) const {
    const Tile tile = padded(unpadded);
    A *const in = buffers_[0], *const direct = buffers_[1], *const summands = buffers_[2];
    copy<A>(tile, x, TileSink<A>{tile, in});
    copy<A>(tile, dy, TileSink<A>{tile, direct});
    clear_pads(tile, in);
    const int64_t begin = tile.in_scratch(0), end = tile.in_scratch(tile.runs());
    for (int64_t i = begin; i < end; i += kLanes<A>) {
      V over_s;
      const V t = inverse_power<power, A>(scale_at(in + i), beta_, &over_s), g = load(direct + i);
      store(summands + i, g * load(in + i) * over_s);
      store(direct + i, g * t);
    }
    clear_pads(tile, summands);  // where s is 0 the zeros of x gave NaN
    for (int64_t r = 0; r < tile.runs(); ++r) {
      const auto to = dx(r);
      for_each_vector<A>(tile.run(), [&](int64_t i) FASTCNN_INLINE_LAMBDA {
        const int64_t at = tile.in_scratch(r) + i;
        const V sum = window_sum(summands + at, after_, before_, itself), now = load(in + at);
        to(i, load(direct + at) - slope_ * now * sum, now);
      });
    }
  }

  int64_t before_, after_;
  double beta_value_;
  bool coarse_;
  A scale_, beta_, k_, slope_;  // s = k + scale * sum(x^2); slope is the factor of the sum in backward
  A* buffers_[3];
};

}  // namespace fastcnn::FASTCNN_CAPABILITY
