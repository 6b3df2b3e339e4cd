// A fully connected layer of a few vectors, y = factor * relu(W x + bias), which takes as long as reading W does.
// Memory: W is read once, kOutputs of its rows side by side; x stays in cache.
#include "linear.h"

#include <algorithm>

#include "dispatch.h"
#include "kernel.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

constexpr int kOutputs = 4;

int64_t units(const LinearTask& task) { return (task.outputs + kOutputs - 1) / kOutputs; }

template <typename A>
FASTCNN_INLINE A sum_of(Vec<A> v) {
  A lanes[kLanes<A>];
  store(lanes, v);
  for (int64_t n = kLanes<A> / 2; n > 0; n /= 2)
    for (int64_t i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

// Computes outputs first ... first + outputs - 1 of every vector: the products of rows of W and of x, side by side.
template <int outputs, int vectors, typename T>
FASTCNN_INLINE void multiply(const LinearTask& task, int64_t first) {
  using A = Compute<T>;
  const int64_t K = task.in;
  const T* const w = static_cast<const T*>(task.weight) + first * K;
  const T* const x = static_cast<const T*>(task.x);
  Vec<A> sum[outputs][vectors] = {};
  const auto add = [&](int64_t k, auto load_from) FASTCNN_INLINE_LAMBDA {
    Vec<A> in[vectors];
    for (int v = 0; v < vectors; ++v) in[v] = load_from(x + v * K + k);
    for (int o = 0; o < outputs; ++o) {
      const Vec<A> row = load_from(w + o * K + k);
      for (int v = 0; v < vectors; ++v) sum[o][v] += row * in[v];
    }
  };
  int64_t k = 0;
  for (; k + kLanes<A> <= K; k += kLanes<A>) add(k, [](const T* p) FASTCNN_INLINE_LAMBDA { return load(p); });
  if (k < K) add(k, [&](const T* p) FASTCNN_INLINE_LAMBDA { return load_first(p, K - k); });

  const T* const bias = static_cast<const T*>(task.bias);
  for (int o = 0; o < outputs; ++o) {
    const A offset = bias ? load_first(bias + first + o, 1)[0] : A{};
    for (int v = 0; v < vectors; ++v) {
      A y = sum_of<A>(sum[o][v]) + offset;
      if (task.relu && y <= 0) y = 0;  // NaN stays
      y *= static_cast<A>(task.factor);
      store_first(static_cast<T*>(task.out) + v * task.outputs + first + o, broadcast(y), 1);
    }
  }
}

void run(const LinearTask& task, int64_t begin, int64_t end, void*) {
  with_dtype(task.dtype, [&](auto t) {
    using T = decltype(t);
    const auto run_vectors = [&]<int vectors>(std::integral_constant<int, vectors>) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit * kOutputs, last = std::min(first + kOutputs, task.outputs);
        if (last - first == kOutputs) multiply<kOutputs, vectors, T>(task, first);
        else
          for (int64_t o = first; o < last; ++o) multiply<1, vectors, T>(task, o);
      }
    };
    static_assert(LinearTask::kVectors == 4);
    switch (task.vectors) {
      case 1: return run_vectors(std::integral_constant<int, 1>{});
      case 2: return run_vectors(std::integral_constant<int, 2>{});
      case 3: return run_vectors(std::integral_constant<int, 3>{});
      default: return run_vectors(std::integral_constant<int, 4>{});
    }
  });
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(linear, LinearTask, units, nullptr, run)
