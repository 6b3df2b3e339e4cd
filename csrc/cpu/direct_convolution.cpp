// Direct convolution, with all that follows it on the way out: products of a few pixels with a panel of weights. It is
// for maps so small that what a library does before it begins takes as long as the convolution.
//
// The sums of up to kRows pixels of an output row and one panel stay in registers while the window's taps go by; where
// a tap reaches beyond the map, its pixels are copied beside zeros first. Memory: a panel's weights stay in the L2
// cache for all pixels of a thread; the output is written once.
#include "direct_convolution.h"

#include <algorithm>
#include <array>
#include <utility>

#include "kernel.h"
#include "scratch.h"
#include "vec.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

using Floats = Vec<float>;
constexpr int64_t kLane = kLanes<float>;
// Pixels and vectors of outputs whose sums, with a row of weights, fit into the registers.
constexpr int kRows = kVectorBytes == 64 ? 7 : 6, kColumns = kVectorBytes == 64 ? 4 : 2;

constexpr int64_t kPiece = 4 * kRows;  // pixels of an output row that a unit computes

// What the pixels read, run by run. Without groups and dilation a row of the window is one run of the input.
struct Input {
  const DirectConvolutionTask& task;
  const int64_t channels, taps, run;  // of a group; of the window in a run; elements of a run
  float* const copied;

  Input(const DirectConvolutionTask& t, Scratch& scratch)
      : task(t),
        channels(t.shape.C / t.groups),
        taps(t.groups == 1 && t.dilation[1] == 1 ? t.kernel[1] : 1),
        run(taps * channels),
        copied(scratch.take<float>(kRows * run)) {}

  // The run of the first of `rows` pixels, from (n, h, w) on, and the distance to the next; null: only zeros.
  FASTCNN_INLINE const float* at(int64_t n, int64_t h, int64_t w, int rows, int64_t g, int64_t kh, int64_t kw,
                                 int64_t& distance) const {
    const Shape& s = task.shape;
    const int64_t y = h * task.stride[0] + kh * task.dilation[0] - task.padding[0];
    const int64_t x = w * task.stride[1] + kw * task.dilation[1] - task.padding[1];
    if (y < 0 || y >= s.H) return nullptr;
    const float* const row = task.x + (n * s.H + y) * s.W * s.C + g * channels;
    distance = task.stride[1] * s.C;
    if (x >= 0 && x + (rows - 1) * task.stride[1] + taps <= s.W) return row + x * s.C;
    for (int r = 0; r < rows; ++r)
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t column = x + r * task.stride[1] + tap;
        float* const to = copied + r * run + tap * channels;
        if (column >= 0 && column < s.W) std::copy_n(row + column * s.C, channels, to);
        else std::fill_n(to, channels, 0.0f);
      }
    distance = run;
    return copied;
  }
};

// `columns` vectors of outputs, from `first` of the group's on, of `rows` pixels. `width` is the panel's.
template <int rows, int columns>
FASTCNN_INLINE void convolve(const Input& input, int64_t n, int64_t h, int64_t w, int64_t g, int64_t first,
                             const float* weight, int64_t width) {
  const DirectConvolutionTask& task = input.task;
  const int64_t pixel = (n * task.out_h + h) * task.out_w + w, output = g * task.group_outputs() + first;
  Floats sum[rows][columns];
  for (int j = 0; j < columns; ++j) {
    const int64_t at = output + j * kLane, rest = task.outputs - at;
    Floats bias{};
    if (task.bias && rest > 0) bias = rest < kLane ? load_first(task.bias + at, rest) : load(task.bias + at);
    for (int r = 0; r < rows; ++r) sum[r][j] = bias;
  }
  for (int64_t kh = 0; kh < task.kernel[0]; ++kh)
    for (int64_t kw = 0; kw < task.kernel[1]; kw += input.taps) {
      int64_t distance = 0;
      const float* const x = input.at(n, h, w, rows, g, kh, kw, distance);
      if (!x) continue;
      const float* b = weight + (kh * task.kernel[1] + kw) * input.channels * width;
      for (int64_t c = 0; c < input.run; ++c, b += width) {
        Floats row[columns];
        for (int j = 0; j < columns; ++j) row[j] = load(b + j * kLane);
        for (int r = 0; r < rows; ++r) {
          const Floats value = broadcast(x[r * distance + c]);
          for (int j = 0; j < columns; ++j) sum[r][j] += value * row[j];
        }
      }
    }
  for (int j = 0; j < columns; ++j) {
    const int64_t rest = task.group_outputs() - first - j * kLane;
    if (rest <= 0) continue;
    for (int r = 0; r < rows; ++r) {
      float* const to = task.out + (pixel + r) * task.out_stride + output + j * kLane;
      Floats y = sum[r][j];
      if (task.addend) {
        const float* const other = task.addend + (pixel + r) * task.addend_stride + output + j * kLane;
        y += rest < kLane ? load_first(other, rest) : load(other);
      }
      if (task.relu) y = y < 0 ? Floats{} : y;  // NaN stays
      if (rest < kLane) store_first(to, y, rest);
      else store(to, y);
    }
  }
}

using Convolve = void (*)(const Input&, int64_t, int64_t, int64_t, int64_t, int64_t, const float*, int64_t);

// A whole panel, of `rows` pixels.
template <int rows>
void convolve_panel(const Input& input, int64_t n, int64_t h, int64_t w, int64_t g, int64_t first, const float* weight,
                    int64_t width) {
  for (int64_t j = 0; j < width; j += kColumns * kLane) {
    const auto run = [&](auto columns) FASTCNN_INLINE_LAMBDA {
      convolve<rows, columns.value>(input, n, h, w, g, first + j, weight + j, width);
    };
    switch (std::min<int64_t>(kColumns, (width - j) / kLane)) {
      case 1: run(std::integral_constant<int, 1>{}); break;
      case 3: run(std::integral_constant<int, std::min(kColumns, 3)>{}); break;
      case 4: run(std::integral_constant<int, kColumns>{}); break;
      default: run(std::integral_constant<int, 2>{});
    }
  }
}

int64_t pieces(const DirectConvolutionTask& task) { return (task.out_w + kPiece - 1) / kPiece; }

int64_t units(const DirectConvolutionTask& task) {
  return task.groups * task.panels() * task.shape.N * task.out_h * pieces(task);
}

int64_t scratch_bytes(const DirectConvolutionTask& task) {
  Scratch scratch(nullptr);
  Input(task, scratch);
  return scratch.used();
}

void run(const DirectConvolutionTask& task, int64_t begin, int64_t end, void* block) {
  static constexpr auto kConvolve = []<int... r>(std::integer_sequence<int, r...>) {
    return std::array<Convolve, sizeof...(r)>{convolve_panel<r + 1>...};
  }(std::make_integer_sequence<int, kRows>{});
  Scratch scratch(block);
  const Input input(task, scratch);
  const int64_t taps = task.kernel[0] * task.kernel[1], across = pieces(task);
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t rest = unit;
    const auto next = [&](int64_t count) { return std::exchange(rest, rest / count) % count; };
    const int64_t piece = next(across), h = next(task.out_h), n = next(task.shape.N), panel = next(task.panels());
    const int64_t first = task.panel_begin(panel), width = task.panel_begin(panel + 1) - first;
    const float* const weight = task.weight + (rest * task.padded_outputs() + first) * taps * input.channels;
    const int64_t begin_w = task.out_w * piece / across, pixels = task.out_w * (piece + 1) / across - begin_w;
    const int64_t blocks = (pixels + kRows - 1) / kRows;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t w = pixels * i / blocks, rows = pixels * (i + 1) / blocks - w;
      kConvolve[rows - 1](input, n, h, begin_w + w, rest, first, weight, width);
    }
  }
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(direct_convolution, DirectConvolutionTask, units, scratch_bytes, run)
