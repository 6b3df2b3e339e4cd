#include "../batch_norm_relu_max_pool2d_op.h"

#include <cmath>

#include "parallel.h"

namespace fastcnn {

struct batch_norm_statistics;
struct batch_norm_relu_max_pool2d;
struct batch_norm_sums;
struct batch_norm_relu_max_pool2d_backward;

// f gets a value of the compute type.
template <typename F>
static void with_compute_type(const BatchNormTask& task, F f) {
  if (task.dtype == DType::float64) f(0.0);
  else f(0.0f);
}

// Numbers for each channel that the kernels read, in memory that they may read for a vector beyond the end.
template <typename A>
class Channels {
 public:
  explicit Channels(BatchNormTask& task)
      : task_(task), stride_(task.shape.C + 64), block_(allocate_scratch(5 * stride_ * sizeof(A))) {
    A *const mean = piece(0), *const scale = piece(1), *const bias = piece(2);
    for (int64_t c = 0; c < task.shape.C; ++c) {
      mean[c] = static_cast<const A*>(task.mean)[c];
      scale[c] = static_cast<A>(inverse(c) * (task.weight ? static_cast<const A*>(task.weight)[c] : A(1)));
      bias[c] = task.bias ? static_cast<const A*>(task.bias)[c] : A(-0.0);
    }
    task.mean = mean, task.scale = scale, task.bias = bias;
  }
  A* piece(int64_t i) const { return static_cast<A*>(block_.get()) + i * stride_; }
  double inverse(int64_t c) const { return 1 / std::sqrt(static_cast<const A*>(task_.var)[c] + task_.eps); }

 private:
  const BatchNormTask& task_;
  const int64_t stride_;
  const decltype(allocate_scratch(0)) block_;
};

static auto allocate_sums(BatchNormTask& task, int64_t rows) {
  auto block = allocate_scratch(2 * rows * task.shape.C * sizeof(double));
  task.sums = static_cast<double*>(block.get()), task.sum_rows = rows;
  return block;
}

// From means and squared differences of parts to those of all (Chan, Golub and LeVeque, 1979), in the order of the
// parts, whatever the number of threads.
static void statistics(BatchNormTask& task, const Tensor&) {
  const int64_t channels = task.shape.C, parts = task.shape.elements() ? task.parts() : 0;
  const auto sums = allocate_sums(task, parts);
  parallel<batch_norm_statistics>(task, task.shape.elements());
  double *const mean = task.sums, *const squares = mean + parts * channels;
  double count = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const double more = task.part_pixels(part), all = count + more;
    const double *const means = mean + part * channels, *const others = squares + part * channels;
    for (int64_t c = 0; part && c < channels; ++c) {
      const double difference = means[c] - mean[c];
      mean[c] += difference * (more / all);
      squares[c] += others[c] + difference * difference * (count * more / all);
    }
    count = all;
  }
  with_compute_type(task, [&](auto a) {
    using A = decltype(a);
    for (int64_t c = 0; c < channels; ++c) {
      static_cast<A*>(task.mean)[c] = static_cast<A>(parts ? mean[c] : 0);
      static_cast<A*>(task.var)[c] = static_cast<A>(parts ? squares[c] / count : 0);
    }
  });
}

// With a pool in NCHW channel by channel: what is done with a piece of it then stays in cache.
template <typename Name>
static void parallel_by_planes(const BatchNormTask& task, const Tensor& out) {
  BatchNormTask planes = task;
  if (task.pool && !task.shape.channels_last) planes.shape = task.shape.as_planes(), planes.planes = task.shape.C;
  parallel<Name>(planes, task.shape.elements(), Output(out, task.pool ? planes.shape.N : 0));
}

static void forward(BatchNormTask& task, const Tensor& out) {
  with_compute_type(task, [&](auto a) {
    const Channels<decltype(a)> channels(task);
    parallel_by_planes<batch_norm_relu_max_pool2d>(task, out);
  });
}

// The sums, in the order of their rows, and what follows from them: gradients of weight and bias, and of x.
template <typename A>
static void backward_of(BatchNormTask& task, const Tensor& dx) {
  const Channels<A> channels(task);
  const int64_t elements = task.shape.elements(), C = task.shape.C;
  if (task.training || task.dweight || task.dbias) {
    const int64_t units = elements ? kernel<batch_norm_sums, BatchNormTask>().units(task) : 0;
    const auto block = allocate_sums(task, task.pool || !elements ? units : task.parts());
    parallel<batch_norm_sums>(task, elements);
    const double count = static_cast<double>(elements) / std::max<int64_t>(C, 1);
    A *const offset = channels.piece(3), *const slope = channels.piece(4);
    for (int64_t c = 0; c < C; ++c) {
      double dz = 0, product = 0;
      for (int64_t row = 0; row < task.sum_rows; ++row) {
        dz += task.sums[row * C + c], product += task.sums[(task.sum_rows + row) * C + c];
      }
      const double inverse = channels.inverse(c), scale = static_cast<const A*>(task.scale)[c];
      if (task.dweight) static_cast<A*>(task.dweight)[c] = static_cast<A>(product * inverse);
      if (task.dbias) static_cast<A*>(task.dbias)[c] = static_cast<A>(dz);
      offset[c] = static_cast<A>(-scale * dz / count);
      slope[c] = static_cast<A>(-scale * inverse * inverse * product / count);
    }
    task.offset = offset, task.slope = slope;
  }
  parallel_by_planes<batch_norm_relu_max_pool2d_backward>(task, dx);
}

static void backward(BatchNormTask& task, const Tensor& dx) {
  with_compute_type(task, [&](auto a) { backward_of<decltype(a)>(task, dx); });
}

FASTCNN_OP(fastcnn_cpu, CPU, batch_norm_statistics, FASTCNN_BATCH_NORM_STATISTICS_OP,
           batch_norm_statistics_op<statistics>)
FASTCNN_OP(fastcnn_cpu, CPU, batch_norm_relu_max_pool2d, FASTCNN_BATCH_NORM_RELU_MAX_POOL2D_OP,
           batch_norm_relu_max_pool2d_op<forward>)
FASTCNN_OP(fastcnn_cpu, CPU, batch_norm_relu_max_pool2d_backward, FASTCNN_BATCH_NORM_RELU_MAX_POOL2D_BACKWARD_OP,
           batch_norm_relu_max_pool2d_backward_op<backward>)

}  // namespace fastcnn
