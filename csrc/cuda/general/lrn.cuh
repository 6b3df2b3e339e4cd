// LRN of a thread's run of channels, of any size and exponent: s = k + alpha/size * sum(x^2), y = x * s^-beta, and its
// gradient, dx = dy * s^-beta - 2*alpha*beta/size * x * sum(q), q = dy * x * s^-(beta+1), over the windows that hold
// the channel. The window is read again for each channel, and q is written to memory by a pass of its own.
#pragma once

#include "channels.cuh"

namespace fastcnn::cuda::general {

// s^-beta, and s^-(beta+1) from it. The usual exponents need no pow.
template <typename A>
FASTCNN_DEVICE A inverse_power(A s, A beta, A* over_s = nullptr) {
  A t;
  if (beta == A(0.75) || beta == A(0.5)) {
    const A r = inverse_sqrt(s);
    t = beta == A(0.5) ? r : r * approximate_sqrt(r);
    if (over_s) *over_s = t * (r * r);
  } else {
    t = power(s, -beta);
    if (over_s) *over_s = t / s;
  }
  return t;
}

// The input of a thread's run: x + bias, rectified.
template <typename T, bool channels_last>
struct Input {
  using A = Compute<T>;
  static constexpr int kLength = kRun<T>;
  const Arguments& a;
  const Run& run;
  A bias[kLength];

  FASTCNN_DEVICE Input(const Arguments& a, const Run& run) : a(a), run(run) {
#pragma unroll
    for (int i = 0; i < kLength; ++i) bias[i] = bias_of(run.c + i);
  }
  FASTCNN_DEVICE A bias_of(int c) const {
    return a.bias && run.holds(c) ? static_cast<const A*>(a.bias)[c] : A(-0.0);  // -0 changes nothing
  }
  FASTCNN_DEVICE A rectified(A v) const { return a.relu && v < 0 ? A(0) : v; }

  // 0 where the group has no such channel.
  FASTCNN_DEVICE void load(const T* x, A (&v)[kLength]) const {
#pragma unroll
    for (int i = 0; i < kLength; ++i) v[i] = 0;
    load_run<channels_last, kLength>(a, x, a.pixels, run,
                                     [&](int i, T element) { v[i] = rectified(widen(element) + bias[i]); });
  }
  // Any channel of the group.
  FASTCNN_DEVICE A at(const T* x, int c) const {
    return rectified(widen(x[channels_last ? c : c * a.pixels]) + bias_of(c));
  }
};

// y of a run.
template <typename T, bool channels_last, bool normalized>
struct Normalized {
  using A = Compute<T>;
  static constexpr int kLength = kRun<T>;
  Input<T, channels_last> input;
  A scale, k, beta;

  FASTCNN_DEVICE Normalized(const Arguments& a, const Run& run)
      : input(a, run), scale(static_cast<A>(a.scale)), k(static_cast<A>(a.k)), beta(static_cast<A>(a.beta)) {}

  FASTCNN_DEVICE void load(const T* x, A (&y)[kLength]) const {
    input.load(x, y);
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      if (normalized && i < input.run.count) y[i] *= inverse_power(scale_of(x, input.run.c + i), beta);
    }
  }

  // s of a channel of the group.
  FASTCNN_DEVICE A scale_of(const T* x, int c) const {
    A sum = 0;
    const int end = min(c + input.a.after + 1, input.run.last);
#pragma unroll 1  // it is there for each channel of the run
    for (int j = max(c - input.a.before, input.run.first); j < end; ++j) {
      const A v = input.at(x, j);
      sum += v * v;
    }
    return k + scale * sum;
  }
};

// dx of a run, from the gradients of y that `gradient` finds.
template <typename T, bool channels_last, bool normalized>
struct Differentiated {
  using A = Compute<T>;
  static constexpr int kLength = kRun<T>;
  Normalized<T, channels_last, normalized> y;
  A slope;

  FASTCNN_DEVICE Differentiated(const Arguments& a, const Run& run) : y(a, run), slope(static_cast<A>(a.slope)) {}

  // q of the run, of which any window is the sum.
  template <typename Gradient>
  FASTCNN_DEVICE void load_terms(const T* x, const Gradient& gradient, A (&q)[kLength]) const {
    A v[kLength];
    y.input.load(x, v);
    gradient.load(q);
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      if (i < y.input.run.count) {
        A over_s;
        inverse_power(y.scale_of(x, y.input.run.c + i), y.beta, &over_s);
        q[i] *= v[i] * over_s;
      }
    }
  }

  // Without LRN and ReLU x is not read; with LRN `terms` are.
  template <typename Gradient>
  FASTCNN_DEVICE void load(const T* x, const Gradient& gradient, [[maybe_unused]] const A* terms,
                           A (&dx)[kLength]) const {
    const Arguments& a = y.input.a;
    A v[kLength];
    if (normalized || a.relu) y.input.load(x, v);
    gradient.load(dx);
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      if (normalized && i < y.input.run.count) {
        const int c = y.input.run.c + i;
        A sum = 0;
        const int end = min(c + a.before + 1, y.input.run.last);
#pragma unroll 1
        for (int j = max(c - a.after, y.input.run.first); j < end; ++j) {
          sum += terms[channels_last ? j : j * a.pixels];
        }
        dx[i] = dx[i] * inverse_power(y.scale_of(x, c), y.beta) - slope * v[i] * sum;
      }
      if (a.relu && v[i] <= 0) dx[i] = 0;
    }
  }
};

}  // namespace fastcnn::cuda::general
