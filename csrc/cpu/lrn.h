// LRN of a tile, forward and backward: the window sum of the CPU kernels.
#pragma once

#include "../lrn.h"
#include "tile.h"

namespace fastcnn::FASTCNN_CAPABILITY {

// s^-beta, and s^-(beta+1) from it. The usual exponents need no pow.
enum class Power { half, three_quarters, one, any };

inline Power power_of(double beta) {
  return beta == 0.5 ? Power::half : beta == 0.75 ? Power::three_quarters : beta == 1 ? Power::one : Power::any;
}

template <Power power, typename A>
inline Vec<A> inverse_power(Vec<A> s, A beta, Vec<A>* over_s = nullptr) {
  Vec<A> t;
  if constexpr (power == Power::any) {
    for (int i = 0; i < kLanes<A>; ++i) t[i] = std::pow(s[i], -beta);
    if (over_s) *over_s = t / s;
  } else if constexpr (power == Power::one) {
    t = 1 / s;
    if (over_s) *over_s = t * t;
  } else {
    const Vec<A> r = rsqrt(s);
    t = power == Power::half ? r : r * sqrt(r);
    if (over_s) *over_s = t * (r * r);
  }
  return t;
}

template <typename A>
struct TileLRN {
  int64_t before, after, step;
  A scale, beta, k, slope;  // s = k + scale * sum(x^2); slope is the factor of the sum in backward

  TileLRN(const LRN& lrn, const Tile& tile)
      : before(lrn.before(tile.group())),
        after(lrn.after(tile.group())),
        step(tile.step()),
        scale(static_cast<A>(lrn.alpha / lrn.size)),
        beta(static_cast<A>(lrn.beta)),
        k(static_cast<A>(lrn.k)),
        slope(static_cast<A>(2 * lrn.alpha * lrn.beta / lrn.size)) {}

  // Sum of f over the lanes x - b*step ... x + a*step, five of them unrolled: AlexNet's window.
  template <typename F>
  Vec<A> window_sum(const A* x, int64_t b, int64_t a, F f) const {
    if (b == 2 && a == 2) {
      return (f(load(x - 2 * step)) + f(load(x - step))) + (f(load(x + step)) + f(load(x + 2 * step))) + f(load(x));
    }
    Vec<A> sum = {};
    for (int64_t j = -b; j <= a; ++j) sum += f(load(x + j * step));
    return sum;
  }

  Vec<A> s(const A* x) const {
    return k + scale * window_sum(x, before, after, [](Vec<A> v) { return v * v; });
  }
};

// y = x * s^-beta
template <Power power, typename A>
void lrn_tile(const TileLRN<A>& lrn, const Tile& tile, const A* x, A* y) {
  for (int64_t i = tile.begin(); i < tile.end(); i += kLanes<A>) {
    store(y + i, load(x + i) * inverse_power<power, A>(lrn.s(x + i), lrn.beta));
  }
}

// dx = dy * s^-beta - slope * x * sum(dy * x * s^-(beta+1)), the sum over the windows that hold the channel.
// On return dy holds dx; q is scratch for the summands.
template <Power power, typename A>
void lrn_backward_tile(const TileLRN<A>& lrn, const Tile& tile, const A* x, A* dy, A* q) {
  for (int64_t i = tile.begin(); i < tile.end(); i += kLanes<A>) {
    Vec<A> over_s;
    const Vec<A> t = inverse_power<power, A>(lrn.s(x + i), lrn.beta, &over_s);
    const Vec<A> g = load(dy + i);
    store(q + i, g * load(x + i) * over_s);
    store(dy + i, g * t);
  }
  clear_pads(tile, q);  // where s is 0 the zeros of x gave NaN
  for (int64_t i = tile.begin(); i < tile.end(); i += kLanes<A>) {
    const Vec<A> sum = lrn.window_sum(q + i, lrn.after, lrn.before, [](Vec<A> v) { return v; });
    store(dy + i, load(dy + i) - lrn.slope * load(x + i) * sum);
  }
}

template <typename A>
void lrn_tile(const LRN& lrn, const Tile& tile, const A* x, A* y) {
  const TileLRN<A> t(lrn, tile);
  switch (power_of(lrn.beta)) {
    case Power::half: return lrn_tile<Power::half>(t, tile, x, y);
    case Power::three_quarters: return lrn_tile<Power::three_quarters>(t, tile, x, y);
    case Power::one: return lrn_tile<Power::one>(t, tile, x, y);
    case Power::any: return lrn_tile<Power::any>(t, tile, x, y);
  }
}

template <typename A>
void lrn_backward_tile(const LRN& lrn, const Tile& tile, const A* x, A* dy, A* q) {
  const TileLRN<A> t(lrn, tile);
  switch (power_of(lrn.beta)) {
    case Power::half: return lrn_backward_tile<Power::half>(t, tile, x, dy, q);
    case Power::three_quarters: return lrn_backward_tile<Power::three_quarters>(t, tile, x, dy, q);
    case Power::one: return lrn_backward_tile<Power::one>(t, tile, x, dy, q);
    case Power::any: return lrn_backward_tile<Power::any>(t, tile, x, dy, q);
  }
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
