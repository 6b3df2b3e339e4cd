// The products of a fully connected layer in training, with few vectors: each takes hardly longer than reading or
// writing the weight does, which is far larger than all else.
//
// Memory: the weight is read once, or its gradient written once. Of the vectors, what a unit needs again and again is
// copied side by side first: their rows, which often are a multiple of a page apart, would share few lines of a cache.
// The order of summation does not depend on the number of threads.
#include "kernel.h"
#include "linear.h"
#include "product.h"
#include "scratch.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

using Task = LinearTrainingTask;
constexpr int64_t kPanel = kColumns * kLane;      // columns of the weight that a unit of the gradients has
constexpr int64_t kPanels = 256 / kPanel;         // that are done at once: they are 1 KB of each row
constexpr int64_t kDepth = 128;                   // summed up by themselves
constexpr int64_t kAhead = 16;                    // rows to be prefetched: the hardware sees too little of each
constexpr int64_t kInputs = 1024, kVectors = 64;  // of which the forward sums up at once

// -- forward: y = x W' + bias -----------------------------------------------------------------------------------------

// Of two vectors that hold some sums each, spread over as many lanes, one that holds all of them over half as many.
template <int spread>
FASTCNN_INLINE Floats fold(Floats a, Floats b) {
#if FASTCNN_SHUFFLE
  constexpr int half = spread / 2;
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (i / half * spread + i % half)...) +
           __builtin_shufflevector(a, b, (i / half * spread + half + i % half)...);
  }(std::make_integer_sequence<int, kLane>{});
#else
  constexpr int64_t half = spread / 2;
  float both[2 * kLane], sums[kLane];
  store(both, a), store(both + kLane, b);
  for (int64_t i = 0; i < kLane; ++i) {
    const float* const from = both + i / half * spread + i % half;
    sums[i] = from[0] + from[half];
  }
  return load(sums);
#endif
}

// The sum of each vector's lanes, in the first lanes.
template <int vectors, int spread = kLane>
FASTCNN_INLINE Floats sums_of(const Floats* v) {
  if constexpr (spread == 1) {
    return v[0];
  } else {
    constexpr int left = (vectors + 1) / 2;
    Floats folded[left];
    for (int i = 0; i < left; ++i) folded[i] = fold<spread>(v[2 * i], v[std::min(2 * i + 1, vectors - 1)]);
    return sums_of<left, spread / 2>(folded);
  }
}

// Of `rows` vectors, whose elements lie in `x` vector by vector, and `outputs` rows of the weight.
template <int rows, int outputs>
FASTCNN_INLINE void multiply_transposed(const float* x, const float* weight, int64_t weight_row, int64_t depth,
                                        const float* bias, float* y, int64_t y_row, bool add) {
  Floats sum[rows][outputs];
  for (int r = 0; r < rows; ++r)
    for (int o = 0; o < outputs; ++o) sum[r][o] = Floats{};
  for (int64_t k = 0; k < depth; k += kLane, x += rows * kLane) {
    Floats w[outputs];
    for (int o = 0; o < outputs; ++o) w[o] = load(weight + o * weight_row + k);
    for (int r = 0; r < rows; ++r) {
      const Floats value = load(x + r * kLane);
      for (int o = 0; o < outputs; ++o) sum[r][o] += value * w[o];
    }
  }
  const Floats offset = bias && !add ? load_first(bias, outputs) : Floats{};
  for (int r = 0; r < rows; ++r) {
    float* const to = y + r * y_row;
    store_first(to, sums_of<outputs>(sum[r]) + (add ? load_first(to, outputs) : offset), outputs);
  }
}

int64_t output_units(const Task& task) { return (task.outputs + kColumns - 1) / kColumns; }

int64_t output_scratch(const Task& task) { return std::min(task.vectors, kVectors) * kInputs * sizeof(float); }

void run_outputs(const Task& task, int64_t begin, int64_t end, void* scratch) {
  float* const packed = static_cast<float*>(scratch);
  for (int64_t first = 0; first < task.vectors; first += kVectors)
    for (int64_t k = 0; k < task.in; k += kInputs) {
      const int64_t depth = std::min(kInputs, task.in - k), vectors = std::min(kVectors, task.vectors - first);
      const float* const x = task.x + first * task.in + k;
      in_rows(vectors, [&](auto rows, int64_t r) FASTCNN_INLINE_LAMBDA {
        float* to = packed + r * depth;
        for (int64_t i = 0; i < depth; i += kLane)
          for (int l = 0; l < rows.value; ++l, to += kLane) store(to, load(x + (r + l) * task.in + i));
      });
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t o = unit * kColumns, outputs = std::min<int64_t>(kColumns, task.outputs - o);
        in_rows(vectors, [&](auto rows, int64_t r) FASTCNN_INLINE_LAMBDA {
          const auto multiply = [&](auto number, int64_t at) FASTCNN_INLINE_LAMBDA {
            multiply_transposed<rows.value, number.value>(
                packed + r * depth, task.weight + at * task.in + k, task.in, depth,
                task.bias ? task.bias + at : nullptr, task.out + (first + r) * task.outputs + at, task.outputs, k > 0);
          };
          if (outputs == kColumns) multiply(std::integral_constant<int, kColumns>{}, o);
          else
            for (int64_t i = 0; i < outputs; ++i) multiply(std::integral_constant<int, 1>{}, o + i);
        });
      }
    }
}

// -- gradients: dx = dy W, dW = dy' x ---------------------------------------------------------------------------------

int64_t gradient_units(const Task& task) { return (task.in + kPanel - 1) / kPanel; }

int64_t gradient_scratch(const Task&) { return kDepth * kPanels * kPanel * sizeof(float); }

// out[rows x in] = a[rows x depth] * b[depth x in], the columns of these units.
FASTCNN_INLINE void multiply(const Task& task, int64_t begin, int64_t end, const float* a, int64_t rows, int64_t a_row,
                             int64_t a_depth, const float* b, int64_t depth, float* packed) {
  for (int64_t unit = begin; unit < end; unit += kPanels) {
    const int64_t first = unit * kPanel, columns = std::min(std::min(unit + kPanels, end) * kPanel, task.in) - first;
    const int64_t ahead = kAhead * task.in * sizeof(float);
    for (int64_t d = 0; d < depth; d += kDepth) {
      const int64_t some = std::min(kDepth, depth - d);
      for (int64_t i = 0; i < some; ++i) {
        const float* const from = b + (d + i) * task.in + first;
        for (int64_t j = 0; j < columns; j += kLane) {
          __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(from + j) + ahead));
          store(packed + i * columns + j, load(from + j));
        }
      }
      in_rows(rows, [&](auto number, int64_t r) FASTCNN_INLINE_LAMBDA {
        in_columns(columns, [&](auto vectors, int64_t j) FASTCNN_INLINE_LAMBDA {
          multiply_rows<number.value, vectors.value>(a + r * a_row + d * a_depth, a_row, a_depth, packed + j, columns,
                                                     some, task.out + r * task.in + first + j, task.in, d > 0);
        });
      });
    }
  }
}

void run_input_gradient(const Task& task, int64_t begin, int64_t end, void* scratch) {
  multiply(task, begin, end, task.dy, task.vectors, task.outputs, 1, task.weight, task.outputs,
           static_cast<float*>(scratch));
}

void run_weight_gradient(const Task& task, int64_t begin, int64_t end, void* scratch) {
  multiply(task, begin, end, task.dy, task.outputs, 1, task.outputs, task.x, task.vectors,
           static_cast<float*>(scratch));
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(linear_forward, LinearTrainingTask, output_units, output_scratch, run_outputs)
FASTCNN_REGISTER_KERNEL(linear_input_gradient, LinearTrainingTask, gradient_units, gradient_scratch, run_input_gradient)
FASTCNN_REGISTER_KERNEL(linear_weight_gradient, LinearTrainingTask, gradient_units, gradient_scratch,
                        run_weight_gradient)
