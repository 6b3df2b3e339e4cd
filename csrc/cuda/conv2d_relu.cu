// Convolution, bias and ReLU as one implicit matrix product on tensor cores: y = relu(x_windows w + bias), of the
// windows' elements k = (kh, kw, c), for each group of channels. From sm_80 on. Memory: windows overlap in the L2
// cache, so that x and the weights are read about once; y is written once.
//
// A block computes kPixels pixels of kOutputs outputs. Elements of its windows and rows of its weights come to shared
// memory kStages - 1 steps of 64 bytes of k before they are multiplied.
#include <limits>

#include "divisor.cuh"
#include "operators.h"
#include "pack.cuh"

namespace fastcnn::cuda {
namespace {

constexpr int kBlock = 128;  // threads: 2 x 2 warps
constexpr int kPixels = 128, kOutputs = 64, kStages = 3;
constexpr int kWords = 16;   // of 4 bytes, a step of k
constexpr int kStride = 20;  // of the rows in shared memory: no two lanes of a fragment share a bank
constexpr int kStage = (kPixels + kOutputs) * kStride;
constexpr int kTileStride = kOutputs + 4;  // of the results, which take the place of the stages

struct Arguments {
  const void *x, *weight, *bias;
  void* out;
  int64_t pixels, area;   // of the output, in all and of an image
  int H, W, C, O, OW;     // C and O of a group
  int channels, outputs;  // of all groups
  int groups, kh, kw, sh, sw, ph, pw, dh, dw;
  int k, row;  // elements of a window, and of a row of weights
  int64_t output_tiles;
  bool vectors_out;
  Divisor by_channels, by_kw;
};

// Where the window of a row of the tile begins, and where its results go.
struct Row {
  int64_t image, out;
  int h, w;  // h is far outside where there is no such pixel
};

constexpr size_t kSharedBytes = kStages * kStage * 4 + kPixels * sizeof(Row);
static_assert(kPixels * kTileStride <= kStages * kStage && kSharedBytes <= 48 << 10);

// Element k of a window.
struct Element {
  int h, w, c;
  bool exists;

  FASTCNN_DEVICE Element(const Arguments& a, int k) : exists(k < a.k) {
    const int place = a.by_channels.divide(k), kh = a.by_kw.divide(place);
    c = k - place * a.C, h = kh * a.dh, w = (place - kh * a.kw) * a.dw;
  }
  // Its offset in the window of this row, or -1 where it is padding.
  template <bool channels_last>
  FASTCNN_DEVICE int64_t in(const Arguments& a, const Row& row) const {
    const int ih = row.h + h, iw = row.w + w;
    if (!exists || ih < 0 || ih >= a.H || iw < 0 || iw >= a.W) return -1;
    const int64_t pixel = static_cast<int64_t>(ih) * a.W + iw;
    return row.image + (channels_last ? pixel * a.channels + c : static_cast<int64_t>(c) * a.H * a.W + pixel);
  }
};

// `wide`: 16 bytes of k are 16 bytes of x, because C is a multiple of as many elements.
template <typename T, bool channels_last, bool wide>
__global__ void __launch_bounds__(kBlock, 2) conv2d_relu_kernel(const Arguments a) {
  constexpr int in_word = 4 / sizeof(T), in_vector = 16 / sizeof(T), step_length = kWords * in_word;
  constexpr int rows_at_once = kBlock / kWords, fetched = kPixels / rows_at_once;
  uint32_t* const shared = dynamic_shared<uint32_t>();
  Row* const rows = reinterpret_cast<Row*>(shared + kStages * kStage);
  const T* const x = static_cast<const T*>(a.x);
  const T* const weight = static_cast<const T*>(a.weight);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t first_pixel = blockIdx.x / a.output_tiles * kPixels;
  const int first_output = static_cast<int>(blockIdx.x % a.output_tiles) * kOutputs, group = block_y();
  if (group >= a.groups) return;

  for (int i = thread; i < kPixels; i += kBlock) {
    const int64_t pixel = first_pixel + i, n = pixel / a.area, p = pixel - n * a.area;
    const int oh = static_cast<int>(p / a.OW), ow = static_cast<int>(p - static_cast<int64_t>(oh) * a.OW);
    const int64_t first_channel = static_cast<int64_t>(group) * a.C, first = static_cast<int64_t>(group) * a.O;
    const int64_t map = static_cast<int64_t>(a.H) * a.W;
    rows[i].image = n * a.channels * map + first_channel * (channels_last ? 1 : map);
    rows[i].out = channels_last ? pixel * a.outputs + first : n * a.outputs * a.area + first * a.area + p;
    rows[i].h = pixel < a.pixels ? oh * a.sh - a.ph : std::numeric_limits<int>::min() / 2;
    rows[i].w = ow * a.sw - a.pw;
  }
  __syncthreads();

  uint32_t words[wide ? 1 : fetched];  // on their way to shared memory, where 16 bytes at a time cannot be

  const auto fetch = [&](int step) {
    uint32_t* const stage = shared + step % kStages * kStage;
    const int k = step * step_length + thread % 4 * in_vector;
    if constexpr (wide) {
      const Element element(a, k);
#pragma unroll
      for (int i = thread / 4; i < kPixels; i += kBlock / 4) {
        const int64_t at = element.in<channels_last>(a, rows[i]);
        copy_async_16(stage + i * kStride + thread % 4 * 4, x + (at < 0 ? 0 : at), at >= 0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < fetched; ++i) words[i] = 0;
#pragma unroll
      for (int e = 0; e < in_word; ++e) {
        const Element element(a, step * step_length + thread % kWords * in_word + e);
#pragma unroll
        for (int i = 0; i < fetched; ++i) {
          const int64_t at = element.in<channels_last>(a, rows[thread / kWords + i * rows_at_once]);
          if (at >= 0) words[i] |= bits(x[at]) << (8 * sizeof(T) * e) % 32;
        }
      }
    }
#pragma unroll
    for (int i = thread / 4; i < kOutputs; i += kBlock / 4) {
      const int o = first_output + i;
      const bool exists = o < a.O && k < a.row;
      const int64_t at = (static_cast<int64_t>(group) * a.O + o) * a.row + k;
      copy_async_16(stage + (kPixels + i) * kStride + thread % 4 * 4, weight + (exists ? at : 0), exists);
    }
    commit_copies();
  };
  const auto deposit = [&](int step) {
    if constexpr (!wide) {
#pragma unroll
      for (int i = 0; i < fetched; ++i) {
        shared[step % kStages * kStage + (thread / kWords + i * rows_at_once) * kStride + thread % kWords] = words[i];
      }
    }
  };

  float sums[4][4][4] = {};  // of 16 x 8 pixels and outputs each
  const int warp_pixel = warp % 2 * 64, warp_output = warp / 2 * 32;
  const auto word = [](uint32_t w) { return std::is_same_v<T, float> ? round_to_tf32(w) : w; };
  const int steps = (a.k + step_length - 1) / step_length;
  for (int step = 0; step < kStages - 1; ++step) {
    fetch(step);
    deposit(step);
  }
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);
    const uint32_t* const stage = shared + step % kStages * kStage + lane / 4 * kStride + lane % 4;
#pragma unroll
    for (int k = 0; k < kWords; k += 8) {
      uint32_t weights[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t* from = stage + (kPixels + warp_output + 8 * j) * kStride + k;
        weights[j][0] = word(from[0]), weights[j][1] = word(from[4]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t* from = stage + (warp_pixel + 16 * i) * kStride + k;
        const uint32_t window[4] = {word(from[0]), word(from[8 * kStride]), word(from[4]), word(from[8 * kStride + 4])};
#pragma unroll
        for (int j = 0; j < 4; ++j) mma<T>(sums[i][j], window, weights[j]);
      }
    }
    deposit(step + kStages - 1);
  }
  wait_for_copies<0>();
  __syncthreads();

  // Through shared memory, so that neighbouring threads write neighbouring elements.
  float* const tile = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int pixel = warp_pixel + 16 * i + lane / 4 + e / 2 * 8;
        const int output = warp_output + 8 * j + lane % 4 * 2 + e % 2;
        tile[pixel * kTileStride + output] = sums[i][j][e];
      }
    }
  }
  __syncthreads();
  const auto rectified = [&](int pixel, int output) {
    const int64_t o = static_cast<int64_t>(group) * a.O + first_output + output;
    const float v = tile[pixel * kTileStride + output] + (a.bias ? widen(static_cast<const T*>(a.bias)[o]) : 0.0f);
    return narrow<T>(v < 0 ? 0.0f : v);  // NaN stays
  };
  const int64_t left = a.pixels - first_pixel;
  const int pixels = static_cast<int>(left < kPixels ? left : kPixels), outputs = min(kOutputs, a.O - first_output);
  T* const out = static_cast<T*>(a.out);
  if (channels_last && a.vectors_out) {
    for (int i = thread; i < pixels * (kOutputs / in_vector); i += kBlock) {
      const int pixel = i / (kOutputs / in_vector), output = i % (kOutputs / in_vector) * in_vector;
      if (output >= outputs) continue;
      Pack<T, in_vector> pack;
#pragma unroll
      for (int e = 0; e < in_vector; ++e) pack.element[e] = rectified(pixel, output + e);
      pack.store(out + rows[pixel].out + first_output + output);
    }
  } else {
    for (int i = thread; i < kPixels * kOutputs; i += kBlock) {
      const int pixel = channels_last ? i / kOutputs : i % kPixels, output = channels_last ? i % kOutputs : i / kPixels;
      if (pixel >= pixels || output >= outputs) continue;
      const int64_t o = first_output + output;
      out[rows[pixel].out + (channels_last ? o : o * a.area)] = rectified(pixel, output);
    }
  }
}

Arguments arguments_of(const ConvTask& task) {
  const auto narrow = [](int64_t value) {
    if (value > std::numeric_limits<int>::max() / 4) {
      throw std::runtime_error("fastcnn: the CUDA convolution takes maps, windows and padding of fewer than 2**29");
    }
    return static_cast<int>(value);
  };
  Arguments a{};
  a.x = task.x, a.weight = task.weight, a.bias = task.bias, a.out = task.out;
  a.area = task.h.out * task.w.out, a.pixels = task.shape.N * a.area;
  a.H = narrow(task.shape.H), a.W = narrow(task.shape.W), a.OW = narrow(task.w.out);
  a.channels = narrow(task.shape.C), a.outputs = narrow(task.outputs), a.groups = narrow(task.groups);
  a.C = narrow(task.shape.C / task.groups), a.O = narrow(task.outputs / task.groups);
  a.kh = narrow(task.h.kernel), a.kw = narrow(task.w.kernel);
  a.sh = narrow(task.h.stride), a.sw = narrow(task.w.stride);
  a.ph = narrow(task.h.padding), a.pw = narrow(task.w.padding);
  a.dh = narrow(task.h.dilation), a.dw = narrow(task.w.dilation);
  a.k = narrow(task.h.kernel * task.w.kernel * a.C), a.row = narrow(task.row);
  a.output_tiles = (a.O + kOutputs - 1) / kOutputs;
  a.by_channels = Divisor(a.C), a.by_kw = Divisor(a.kw);
  return a;
}

template <typename T, bool channels_last>
void launch_conv(const ConvTask& task, Stream stream) {
  Arguments a = arguments_of(task);
  constexpr int in_vector = 16 / sizeof(T);
  const int64_t tiles = (a.pixels + kPixels - 1) / kPixels * a.output_tiles;
  const dim3 grid = folded_grid(tiles, a.groups);
  a.vectors_out = channels_last && a.O % in_vector == 0 && aligned(a.out);
  if constexpr (channels_last) {
    if (a.C % in_vector == 0 && aligned(a.x)) {
      launch<&conv2d_relu_kernel<T, true, true>>("conv2d_relu", grid, dim3(kBlock), kSharedBytes, stream, a);
      return;
    }
  }
  launch<&conv2d_relu_kernel<T, channels_last, false>>("conv2d_relu", grid, dim3(kBlock), kSharedBytes, stream, a);
}

}  // namespace

void conv2d_relu(const ConvTask& task, Stream stream) {
  if (!task.shape.N || !task.h.out || !task.w.out) return;
  const auto with_format = [&](auto t) {
    if (task.shape.channels_last) launch_conv<decltype(t), true>(task, stream);
    else launch_conv<decltype(t), false>(task, stream);
  };
  switch (task.dtype) {
    case DType::float16: return with_format(Half());
    case DType::bfloat16: return with_format(BFloat16());
    case DType::float32: return with_format(float());
    case DType::float64: throw std::runtime_error("fastcnn: the CUDA convolution has no float64");
  }
}

}  // namespace fastcnn::cuda
