// Batch norm of a thread's run of channels, z = (x - mean) * scale + bias with scale = weight / sqrt(var + eps), with a
// ReLU before or after it, and a pool. With dz, the gradient of z, and means over a channel,
//   dx = scale * (dz - mean(dz) - (x - mean) / (var + eps) * mean(dz * (x - mean))).
#pragma once

#include "../../batch_norm_relu_max_pool2d.h"
#include "pool.cuh"

namespace fastcnn::cuda::general {

// What is per channel is in the compute type. `sums` are rows, in backward of Sums, otherwise of Moments; a.terms, null
// in evaluation, are C offsets and C slopes: dx = scale * (dz + offset + slope * (x - mean)).
struct NormArguments {
  Arguments a;
  bool relu_first;
  double eps, count;  // count: of a channel's pixels
  void *mean, *var;
  const void* weight;
  void *dweight, *dbias, *sums;
  int64_t rows;
};

inline NormArguments norm_arguments(const BatchNormTask& task, int run) {
  NormArguments n{};
  n.a = arguments(task, run);
  n.relu_first = task.relu_first, n.eps = task.eps;
  n.count = static_cast<double>(task.shape.N * task.shape.pixels());
  n.mean = task.mean, n.var = task.var, n.weight = task.weight;
  n.dweight = task.dweight, n.dbias = task.dbias, n.sums = task.sums;
  return n;
}

// Of some pixels of a channel their number, mean and sum of squared differences from it.
struct Moments {
  double count, mean, squares;

  // As Chan, Golub and LeVeque (1979) join two.
  FASTCNN_DEVICE void operator+=(const Moments& other) {
    if (other.count == 0) return;
    const double all = count + other.count, difference = other.mean - mean, share = other.count / all;
    mean += difference * share;
    squares += other.squares + difference * (difference * (count * share));
    count = all;
  }
};

// Of some pixels of a channel the sums of dz and of dz * (x - mean).
struct Sums {
  double gradient, product;

  FASTCNN_DEVICE void operator+=(const Sums& other) { gradient += other.gradient, product += other.product; }
};

template <typename A>
FASTCNN_DEVICE A of_channel(const void* values, int c, A otherwise) {
  return values ? static_cast<const A*>(values)[c] : otherwise;
}

// The input of a run, rectified if that comes first; 0 where the run has no such channel.
template <typename T, bool channels_last>
FASTCNN_DEVICE void load_input(const Arguments& a, const Run& run, const T* x, bool relu, Compute<T> (&v)[kRun<T>]) {
#pragma unroll
  for (int i = 0; i < kRun<T>; ++i) v[i] = 0;
  load_run<channels_last, kRun<T>>(a, x, a.pixels, run, [&](int i, T element) {
    v[i] = widen(element);
    if (relu && v[i] < 0) v[i] = 0;
  });
}

template <typename T, bool channels_last>
struct BatchNorm {
  using A = Compute<T>;
  static constexpr int kLength = kRun<T>;
  const NormArguments& n;
  const Run& run;
  A mean[kLength], scale[kLength], bias[kLength];

  FASTCNN_DEVICE BatchNorm(const NormArguments& n, const Run& run) : n(n), run(run) {
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      const int c = run.c + min(i, run.count - 1);
      mean[i] = static_cast<const A*>(n.mean)[c];
      scale[i] = inverse_sqrt(static_cast<const A*>(n.var)[c] + static_cast<A>(n.eps)) * of_channel<A>(n.weight, c, 1);
      bias[i] = of_channel<A>(n.a.bias, c, A(-0.0));  // -0 changes nothing
    }
  }
  FASTCNN_DEVICE A normalized(int i, A difference) const { return difference * scale[i] + bias[i]; }

  // What is pooled.
  FASTCNN_DEVICE void load(const T* x, A (&y)[kLength]) const {
    load_input<T, channels_last>(n.a, run, x, n.relu_first, y);
#pragma unroll
    for (int i = 0; i < kLength; ++i) {
      y[i] = normalized(i, y[i] - mean[i]);
      if (n.a.relu && y[i] < 0) y[i] = 0;
    }
  }

  // f(offset of channel 0, x, x - mean, dz) for each of the thread's pixels.
  template <bool pooled, typename F>
  FASTCNN_DEVICE void for_each_gradient(F f) const {
    const Arguments& a = n.a;
    for_each_pixel<channels_last>(a, a.pixels, [&](int64_t image, int64_t pixel) {
      const int64_t at = image * a.C * a.pixels + pixel * (channels_last ? a.C : 1);
      A x[kLength], difference[kLength], dz[kLength];
      load_input<T, channels_last>(a, run, static_cast<const T*>(a.x) + at, n.relu_first, x);
      const Gradient<T, channels_last, pooled> gradient(a, run, image, pixel);
      gradient.load(dz);
#pragma unroll
      for (int i = 0; i < kLength; ++i) {
        difference[i] = x[i] - mean[i];
        if (a.relu && normalized(i, difference[i]) <= 0) dz[i] = 0;
      }
      f(at, x, difference, dz);
    });
  }
};

// -- statistics -------------------------------------------------------------------------------------------------------

// Of each block. A thread takes differences from its first pixel, which is near the others, and of these the moments as
// Welford does (1962).
template <typename T, bool channels_last>
__global__ void __launch_bounds__(kThreads, 1) batch_norm_statistics(const NormArguments n) {
  using A = Compute<T>;
  const Arguments& a = n.a;
  const int index = run_of_thread<channels_last>(a);
  int count = 0;
  A first[kRun<T>] = {}, mean[kRun<T>] = {}, squares[kRun<T>] = {};
  if (index < a.runs) {
    const Run run(a, index, kRun<T>);
    for_each_pixel<channels_last>(a, a.pixels, [&](int64_t image, int64_t pixel) {
      const int64_t at = image * a.C * a.pixels + pixel * (channels_last ? a.C : 1);
      A x[kRun<T>];
      load_input<T, channels_last>(a, run, static_cast<const T*>(a.x) + at, n.relu_first, x);
      const A share = A(1) / static_cast<A>(++count);
#pragma unroll
      for (int i = 0; i < kRun<T>; ++i) {
        if (count == 1) first[i] = x[i];
        const A v = x[i] - first[i], difference = v - mean[i];
        mean[i] += difference * share;
        squares[i] += difference * (v - mean[i]);
      }
    });
  }
  add_up<channels_last, kRun<T>>(a, static_cast<Moments*>(n.sums), [&](int i) {
    return Moments{static_cast<double>(count), static_cast<double>(first[i]) + mean[i], squares[i]};
  });
}

template <typename A>
__global__ void __launch_bounds__(32 * kRowLanes) batch_norm_mean(const NormArguments n) {
  add_rows(static_cast<const Moments*>(n.sums), n.rows, n.a.C, [&](int c, const Moments& all) {
    static_cast<A*>(n.mean)[c] = static_cast<A>(all.mean);
    static_cast<A*>(n.var)[c] = static_cast<A>(all.count > 0 ? all.squares / all.count : 0);
  });
}

template <typename T, bool channels_last>
void launch_statistics(const BatchNormTask& task, Stream stream) {
  constexpr auto name = "batch_norm_statistics";
  NormArguments n = norm_arguments(task, kRun<T>);
  if (n.count > 0) {
    const Launch shape = share_out(n.a, channels_last, n.a.pixels, 0, kSumWaves);
    n.rows = shape.grid.x;
    launch<&batch_norm_statistics<T, channels_last>>(name, shape.grid, shape.block, bytes_to_add_up<T, Moments>(),
                                                     stream, n);
  }
  launch_add_rows<&batch_norm_mean<Compute<T>>, Moments>(name, n.a.C, stream, n);
}

// -- forward ----------------------------------------------------------------------------------------------------------

template <typename T, bool channels_last, bool pooled>
__global__ void __launch_bounds__(kThreads, 1) batch_norm(const NormArguments n) {
  const int index = run_of_thread<channels_last>(n.a);
  if (index >= n.a.runs) return;
  const Run run(n.a, index, kRun<T>);
  const BatchNorm<T, channels_last> norm(n, run);
  if constexpr (pooled) pool_runs<T, channels_last>(n.a, run, norm);
  else map_runs<T, channels_last>(n.a, run, norm);
}

template <typename T, bool channels_last, bool pooled>
void launch_norm(const char* name, const BatchNormTask& task, Stream stream) {
  NormArguments n = norm_arguments(task, kRun<T>);
  const Launch shape = share_out(n.a, channels_last, n.a.out_pixels, task.out_shape().W);
  launch<&batch_norm<T, channels_last, pooled>>(name, shape.grid, shape.block, 0, stream, n);
}

// -- backward ---------------------------------------------------------------------------------------------------------

template <typename T, bool channels_last, bool pooled>
__global__ void __launch_bounds__(kThreads, 1) batch_norm_sums(const NormArguments n) {
  using A = Compute<T>;
  const int index = run_of_thread<channels_last>(n.a);
  A gradients[kRun<T>] = {}, products[kRun<T>] = {};
  if (index < n.a.runs) {
    const Run run(n.a, index, kRun<T>);
    const BatchNorm<T, channels_last> norm(n, run);
    norm.template for_each_gradient<pooled>([&](int64_t, const auto&, const auto& difference, const auto& dz) {
#pragma unroll
      for (int i = 0; i < kRun<T>; ++i) gradients[i] += dz[i], products[i] += dz[i] * difference[i];
    });
  }
  add_up<channels_last, kRun<T>>(n.a, static_cast<Sums*>(n.sums),
                                 [&](int i) { return Sums{gradients[i], products[i]}; });
}

// The gradients of weight and bias, and the terms of dx.
template <typename A>
__global__ void __launch_bounds__(32 * kRowLanes) batch_norm_terms(const NormArguments n) {
  add_rows(static_cast<const Sums*>(n.sums), n.rows, n.a.C, [&](int c, const Sums& all) {
    const double inverse = inverse_sqrt(static_cast<double>(static_cast<const A*>(n.var)[c]) + n.eps);
    if (n.dweight) static_cast<A*>(n.dweight)[c] = static_cast<A>(all.product * inverse);
    if (n.dbias) static_cast<A*>(n.dbias)[c] = static_cast<A>(all.gradient);
    if (!n.a.terms) return;
    static_cast<A*>(n.a.terms)[c] = static_cast<A>(-all.gradient / n.count);
    static_cast<A*>(n.a.terms)[n.a.C + c] = static_cast<A>(-all.product * inverse * inverse / n.count);
  });
}

template <typename T, bool channels_last, bool pooled>
__global__ void __launch_bounds__(kThreads, 1) batch_norm_backward(const NormArguments n) {
  using A = Compute<T>;
  const Arguments& a = n.a;
  const int index = run_of_thread<channels_last>(a);
  if (index >= a.runs) return;
  const Run run(a, index, kRun<T>);
  const BatchNorm<T, channels_last> norm(n, run);
  A offset[kRun<T>], slope[kRun<T>];
#pragma unroll
  for (int i = 0; i < kRun<T>; ++i) {
    const int c = run.c + min(i, run.count - 1);
    offset[i] = of_channel<A>(a.terms, c, 0), slope[i] = of_channel<A>(a.terms, a.C + c, 0);
  }
  norm.template for_each_gradient<pooled>([&](int64_t at, const auto& x, const auto& difference, const auto& dz) {
    store_run<channels_last, kRun<T>>(a, static_cast<T*>(a.out) + at, a.pixels, run, [&](int i) {
      const A inner = a.terms ? dz[i] + (offset[i] + slope[i] * difference[i]) : dz[i];
      return narrow<T>(n.relu_first && x[i] <= 0 ? A(0) : norm.scale[i] * inner);
    });
  });
}

template <typename T, bool channels_last, bool pooled>
void launch_norm_backward(const char* name, const BatchNormTask& task, Stream stream) {
  NormArguments n = norm_arguments(task, kRun<T>);
  if (!task.training) n.a.terms = nullptr;
  if (task.training || task.dweight || task.dbias) {
    if (n.count > 0) {
      const Launch shape = share_out(n.a, channels_last, n.a.pixels, task.shape.W, kSumWaves);
      n.rows = shape.grid.x;
      launch<&batch_norm_sums<T, channels_last, pooled>>(name, shape.grid, shape.block, bytes_to_add_up<T, Sums>(),
                                                         stream, n);
    }
    launch_add_rows<&batch_norm_terms<Compute<T>>, Sums>(name, n.a.C, stream, n);
  }
  if (n.count == 0) return;
  const Launch shape = share_out(n.a, channels_last, n.a.pixels, task.shape.W);
  launch<&batch_norm_backward<T, channels_last, pooled>>(name, shape.grid, shape.block, 0, stream, n);
}

}  // namespace fastcnn::cuda::general
