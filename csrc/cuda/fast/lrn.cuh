// LRN over five channels, all of them in registers: s = k + alpha/5 * sum(x^2), y = x * s^-beta, and its gradient,
// dx = dy * s^-beta - 2*alpha*beta/5 * x * sum(q), q = dy * x * s^-(beta+1), over the windows that hold the channel.
// Memory: forward reads x and writes y once; backward reads x and dy and writes dx. What neighbouring threads share
// comes from the L1 cache.
#pragma once

#include "place.cuh"

namespace fastcnn::cuda::fast {

// sums[j] = start + the squares of v[j] ... v[j + 4], or just their sum. Windows 2i and 2i + 1 share all but their
// outermost elements, which are added up in pairs that the next windows share.
template <bool squares, int n>
FASTCNN_DEVICE void sums_of_five(const float (&v)[n], float start, float (&sums)[n - 4]) {
  static_assert(n % 2 == 0);
  const auto add = [](float sum, float x) { return squares ? x * x + sum : x + sum; };
  float pairs[n / 2 - 1];
#pragma unroll
  for (int i = 0; i < n / 2 - 1; ++i) {
    const float first = v[2 * i + 1];
    pairs[i] = add(!squares ? first : i % 2 ? first * first : add(start, first), v[2 * i + 2]);
  }
#pragma unroll
  for (int i = 0; i < n / 2 - 2; ++i) {
    const float inner = pairs[i] + pairs[i + 1];
    sums[2 * i] = add(inner, v[2 * i]);
    sums[2 * i + 1] = add(inner, v[2 * i + 5]);
  }
}

// s^-beta / factor, from s / scale; r^2 is scale / s.
template <Beta beta>
FASTCNN_DEVICE float power(float s, float& r) {
  r = inverse_sqrt_of_normal(s);
  return beta == Beta::half ? r : r * sqrt_of_normal(r);
}

// relu(x + bias) of the thread's channels and their neighbours.
template <int count>
struct Rectifier {
  float bias[count], lowest;

  FASTCNN_DEVICE Rectifier(const Arguments& a, int first, int length, Neighbours exist) : lowest(a.lowest) {
    const int around = (count - length) / 2;
#pragma unroll
    for (int j = 0; j < count; ++j) {
      const bool exists = j < around ? exist.left : j < around + length || exist.right;
      bias[j] = a.bias && exists ? static_cast<const float*>(a.bias)[first - around + j] : -0.0f;  // changes nothing
    }
  }
  FASTCNN_DEVICE void apply(float (&v)[count]) const {
#pragma unroll
    for (int j = 0; j < count; ++j) v[j] = max_or_nan(v[j] + bias[j], lowest);
  }
};

template <>
struct Rectifier<0> {
  FASTCNN_DEVICE Rectifier(const Arguments&, int, int, Neighbours) {}
};

// y / factor of the channels that have two neighbours.
template <Beta beta, int n>
FASTCNN_DEVICE void normalize(const float (&v)[n], float start, float (&y)[n - 4]) {
  sums_of_five<true>(v, start, y);
#pragma unroll
  for (int i = 0; i < n - 4; ++i) {
    float r;
    y[i] = v[i + 2] * power<beta>(y[i], r);
  }
}

// dx of the channels that have four neighbours in v, from dy, g, of these and two neighbours.
template <Beta beta, int n>
FASTCNN_DEVICE void differentiate(const Arguments& a, const float (&v)[n], float (&g)[n - 4], float (&dx)[n - 8]) {
  float s[n - 4], q[n - 4];
  sums_of_five<true>(v, a.start, s);
#pragma unroll
  for (int j = 0; j < n - 4; ++j) {
    float r;
    g[j] *= power<beta>(s[j], r);
    q[j] = g[j] * (v[j + 2] * (r * r));
  }
  sums_of_five<false>(q, 0, dx);
#pragma unroll
  for (int i = 0; i < n - 8; ++i) dx[i] = a.factor * (g[i + 2] - a.twice_beta * v[i + 4] * dx[i]);
}

template <typename T, bool channels_last, int length, Beta beta, bool rectified>
__global__ void __launch_bounds__(kThreads, 1) lrn(const Arguments a) {
  const Place<channels_last> place(a);
  if (!place.exists) return;
  const int stride = a.H * a.W;
  const int64_t at = offset_of<channels_last, length>(a, stride, place.unit, place.run);
  float v[length + 4], y[length];
  const Planes<channels_last, length + 4> planes(stride);
  Span<T, channels_last, length, 2>(opaque(static_cast<const T*>(a.x) + at), planes, place.neighbours).widen(v);
  if constexpr (rectified) Rectifier<length + 4>(a, place.run * length, length, place.neighbours).apply(v);
  normalize<beta>(v, a.start, y);
#pragma unroll
  for (int i = 0; i < length; ++i) y[i] *= a.factor;
  store<T, channels_last>(static_cast<T*>(a.out) + at, stride, y);
}

// A thread has the same channels of several pixels, where their sums are wanted.
template <typename T, bool channels_last, int length, Beta beta, bool rectified>
__global__ void __launch_bounds__(kThreads, 1) lrn_backward(const Arguments a) {
  const Place<channels_last> place(a);
  const int stride = a.H * a.W, step = gridDim.x * a.pixels_per_block;
  float sums[length] = {};
  if (place.run < a.runs) {
    const Rectifier<rectified ? length + 8 : 0> rectify(a, place.run * length, length, place.neighbours);
    const Planes<channels_last, length + 8> planes(stride);
    for (int unit = place.unit; unit < a.units; unit += step) {
      const int64_t at = offset_of<channels_last, length>(a, stride, unit, place.run);
      const Span<T, channels_last, length, 4> x(opaque(static_cast<const T*>(a.x) + at), planes, place.neighbours);
      const Span<T, channels_last, length, 2> dy(opaque(static_cast<const T*>(a.dy) + at), planes, place.neighbours);
      float v[length + 8], g[length + 4], dx[length];
      x.widen(v);
      dy.widen(g);
      if constexpr (rectified) rectify.apply(v);
      differentiate<beta>(a, v, g, dx);
#pragma unroll
      for (int i = 0; i < length; ++i) {
        if (rectified && v[4 + i] <= a.blocked) dx[i] = 0;
        sums[i] += dx[i];
      }
      store<T, channels_last>(static_cast<T*>(a.out) + at, stride, dx);
    }
  }
  if (rectified && a.partials) store_sums<channels_last>(a, place.run, sums);
}

}  // namespace fastcnn::cuda::fast
