// LRN of a thread's run of channels: s = k + alpha/size * sum(x^2), y = x * s^-beta, and its gradient,
// dx = dy * s^-beta - 2*alpha*beta/size * x * sum(q), q = dy * x * s^-(beta+1), over the windows that hold the channel.
//
// AlexNet's window, five channels and beta = 3/4, is held in registers; neighbouring runs come from the L1 cache. For
// any other the window is read again for each channel, and q is written to memory by a pass of its own. Either way each
// sum is added anew from its window's elements.
#pragma once

#include "channels.cuh"

namespace fastcnn::cuda {

enum class Norm { none, five, any };

// The channels to either side that one window in registers needs.
template <Norm norm>
inline constexpr int kReach = norm == Norm::five ? 2 : 0;

// s^-beta, and s^-(beta+1) from it. The usual exponents need no pow.
template <Norm norm, typename A>
FASTCNN_DEVICE A inverse_power(A s, A beta, A* over_s = nullptr) {
  A t;
  if (norm == Norm::five || beta == A(0.75) || beta == A(0.5)) {
    const A r = inverse_sqrt(s);
    t = norm != Norm::five && beta == A(0.5) ? r : r * approximate_sqrt(r);
    if (over_s) *over_s = t * (r * r);
  } else {
    t = power(s, -beta);
    if (over_s) *over_s = t / s;
  }
  return t;
}

// sums[j] = v[j] + ... + v[j + 4]
template <int n, typename A>
FASTCNN_DEVICE void sums_of_five(const A (&v)[n], A (&sums)[n - 4]) {
#pragma unroll
  for (int j = 0; j < n - 4; ++j) sums[j] = (v[j] + v[j + 1]) + (v[j + 2] + v[j + 3]) + v[j + 4];
}

// The input of a thread's run: x + bias, rectified, with `reach` channels to either side.
template <typename T, bool channels_last, int reach>
struct Input {
  using A = Compute<T>;
  static constexpr int kLength = kRun<T>, kCount = kLength + 2 * reach;
  const Arguments& a;
  const Run& run;
  A bias[kCount];

  FASTCNN_DEVICE Input(const Arguments& a, const Run& run) : a(a), run(run) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) bias[j] = bias_of(run.c - reach + j);
  }
  FASTCNN_DEVICE A bias_of(int c) const {
    return a.bias && run.holds(c) ? static_cast<const A*>(a.bias)[c] : A(-0.0);  // -0 changes nothing
  }
  FASTCNN_DEVICE A rectified(A v) const { return a.relu && v < 0 ? A(0) : v; }

  // The channels around the run at a pixel, 0 where the group has none.
  FASTCNN_DEVICE void load(const T* x, A (&v)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = 0;
    for_each_channel<channels_last, kLength, reach, reach>(a, x, a.pixels, run, [&](int j, T element) {
      v[j] = rectified(widen(element) + bias[j]);
    });
  }
  // Any channel of the group.
  FASTCNN_DEVICE A at(const T* x, int c) const {
    return rectified(widen(x[channels_last ? c : c * a.pixels]) + bias_of(c));
  }
};

// y of a run.
template <typename T, bool channels_last, Norm norm>
struct Normalized {
  using A = Compute<T>;
  static constexpr int kLength = kRun<T>;
  Input<T, channels_last, kReach<norm>> input;
  A scale, k, beta;

  FASTCNN_DEVICE Normalized(const Arguments& a, const Run& run)
      : input(a, run), scale(static_cast<A>(a.scale)), k(static_cast<A>(a.k)), beta(static_cast<A>(a.beta)) {}

  FASTCNN_DEVICE void load(const T* x, A (&y)[kLength]) const {
    A v[input.kCount];
    input.load(x, v);
    if constexpr (norm == Norm::five) {
      A squares[input.kCount], sums[kLength];
#pragma unroll
      for (int j = 0; j < input.kCount; ++j) squares[j] = v[j] * v[j];
      sums_of_five(squares, sums);
#pragma unroll
      for (int i = 0; i < kLength; ++i) y[i] = v[i + 2] * inverse_power<norm>(k + scale * sums[i], beta);
    } else {
#pragma unroll
      for (int i = 0; i < kLength; ++i) {
        y[i] = v[i];
        if (norm == Norm::any && i < input.run.count) y[i] *= inverse_power<norm>(scale_of(x, input.run.c + i), beta);
      }
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

// dx of a run, from the gradients of y that `gradient` finds for the run and kReach channels to either side.
template <typename T, bool channels_last, Norm norm>
struct Differentiated {
  using A = Compute<T>;
  static constexpr int kLength = kRun<T>;
  Input<T, channels_last, 2 * kReach<norm>> input;
  Normalized<T, channels_last, Norm::any> any;
  A slope;

  FASTCNN_DEVICE Differentiated(const Arguments& a, const Run& run)
      : input(a, run), any(a, run), slope(static_cast<A>(a.slope)) {}

  // q of the run, of which any window is the sum.
  template <typename Gradient>
  FASTCNN_DEVICE void load_terms(const T* x, const Gradient& gradient, A (&q)[kLength]) const {
    A v[kLength];
    any.input.load(x, v);
    gradient.load(q);
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      if (i < input.run.count) {
        A over_s;
        inverse_power<norm>(any.scale_of(x, input.run.c + i), any.beta, &over_s);
        q[i] *= v[i] * over_s;
      }
    }
  }

  // Without LRN and ReLU x is not read; `terms` are read for any window.
  template <typename Gradient>
  FASTCNN_DEVICE void load(const T* x, const Gradient& gradient, [[maybe_unused]] const A* terms,
                           A (&dx)[kLength]) const {
    A v[input.kCount];
    if (norm != Norm::none || input.a.relu) input.load(x, v);
    if constexpr (norm == Norm::five) {
      constexpr int around = kLength + 4;
      A squares[input.kCount], sums[around], g[around], q[around], q_sums[kLength];
      gradient.load(g);
#pragma unroll
      for (int j = 0; j < input.kCount; ++j) squares[j] = v[j] * v[j];
      sums_of_five(squares, sums);
#pragma unroll
      for (int j = 0; j < around; ++j) {
        A over_s;
        const A t = inverse_power<norm>(any.k + any.scale * sums[j], any.beta, &over_s);
        // Where s is 0 a channel that does not exist would give NaN.
        q[j] = input.run.holds(input.run.c - 2 + j) ? g[j] * v[j + 2] * over_s : A(0);
        g[j] *= t;
      }
      sums_of_five(q, q_sums);
#pragma unroll
      for (int i = 0; i < kLength; ++i) dx[i] = g[i + 2] - slope * v[i + 4] * q_sums[i];
    } else {
      gradient.load(dx);
#pragma unroll
      for (int i = 0; i < kLength; ++i) {
        if (norm == Norm::any && i < input.run.count) {
          const int c = input.run.c + i;
          A sum = 0;
          const int end = min(c + input.a.before + 1, input.run.last);
#pragma unroll 1
          for (int j = max(c - input.a.after, input.run.first); j < end; ++j) {
            sum += terms[channels_last ? j : j * input.a.pixels];
          }
          dx[i] = dx[i] * inverse_power<norm>(any.scale_of(x, c), any.beta) - slope * v[i] * sum;
        }
      }
    }
    if (!input.a.relu) return;
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      if (v[i + 2 * kReach<norm>] <= 0) dx[i] = 0;
    }
  }
};

}  // namespace fastcnn::cuda
