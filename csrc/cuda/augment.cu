// Augmentation: y = (crop(resize(pixels)) - mean) * scale, of bytes, some crops mirrored.
// Memory: reads the crops once and writes them once. A thread has one element of a row, so that what depends on column
// and channel is found once, and goes through kRows rows, of which it loads kAtOnce before it writes. Rows of a crop
// begin at any byte: all accesses are of single elements, which warps have next to each other.
#include "../augment.h"
#include "dispatch.cuh"
#include "divisor.cuh"
#include "operators.h"

namespace fastcnn::cuda {
namespace {

constexpr int kRows = 32, kAtOnce = 8;

struct Arguments {
  const uint8_t* x;
  const int64_t *offsets, *sizes;
  const bool* mirror;
  const void* mean;
  void* out;
  int64_t N;
  int H, W, crop_h, crop_w;
  double scale[3];
  int blocks;  // for a row
  Divisor by_blocks;
};

// Of an axis, the pixels that make a new one: their first, and its distance from the new one's centre.
struct Taps {
  int length, step, reach, first, distance;

  FASTCNN_DEVICE Taps(ResizedAxis<int> axis, int place)
      : length(axis.length),
        step(2 * axis.size),
        reach(axis.reach()),
        first(axis.first(place)),
        distance((2 * first + 1) * axis.size - (2 * place + 1) * length) {}

  // f(weight) for each pixel.
  template <typename A, typename F>
  FASTCNN_DEVICE void each(F f) const {
    const int end = min(reach, distance + step * (length - first));
    for (int d = distance; d < end; d += step) f(static_cast<A>(reach - abs(d)));
  }

  // On to the next new one.
  FASTCNN_DEVICE void advance() {
    for (distance -= 2 * length; distance <= -reach; distance += step) ++first;
  }
};

// The next element of a column of a resized picture, whose columns' weights have this sum.
template <typename A>
FASTCNN_DEVICE A resized(const uint8_t* picture, int64_t stride, const Taps& rows, const Taps& columns,
                         A columns_total) {
  A total = 0, rows_total = 0;
  const uint8_t* line = picture + rows.first * stride + 3 * columns.first;
  rows.each<A>([&](A row_weight) {
    const uint8_t* pixel = line;
    A sum = 0;
    columns.each<A>([&](A weight) { sum += weight * static_cast<A>(*pixel), pixel += 3; });
    total += row_weight * sum, rows_total += row_weight, line += stride;
  });
  return total / (rows_total * columns_total);
}

template <typename T, bool channels_last, bool resizes>
__global__ void __launch_bounds__(kThreads) augment_rows(const Arguments a) {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t image = block_y();
  const int block_of_rows = a.by_blocks.divide(blockIdx.x), first_row = block_of_rows * kRows;
  const int element =
      (static_cast<int>(blockIdx.x) - block_of_rows * a.blocks) * kThreads + static_cast<int>(threadIdx.x);
  if (image >= a.N || element >= 3 * a.crop_w) return;

  const int channel = channels_last ? element % 3 : (element >= a.crop_w) + (element >= 2 * a.crop_w);
  const int in_plane = channels_last ? element / 3 : element - channel * a.crop_w;
  const int column = a.mirror[image] ? a.crop_w - 1 - in_plane : in_plane;
  const A mean = static_cast<const A*>(a.mean)[3 * image + channel];
  const A scale = static_cast<A>(channel == 0 ? a.scale[0] : channel == 1 ? a.scale[1] : a.scale[2]);
  const int64_t top = a.offsets[2 * image] + first_row, left = a.offsets[2 * image + 1] + column;
  const int64_t stride = 3 * static_cast<int64_t>(a.W);
  const uint8_t* const picture = a.x + image * a.H * a.W * 3;

  const int rows = min(kRows, a.crop_h - first_row);
  const int64_t plane = static_cast<int64_t>(a.crop_h) * a.crop_w, out_row = (channels_last ? 3 : 1) * a.crop_w;
  T* to = static_cast<T*>(a.out) + image * 3 * plane + (channels_last ? element : channel * plane + in_plane) +
          first_row * out_row;
  const auto write = [&](A pixel) { *to = narrow<T>((pixel - mean) * scale), to = opaque(to + out_row); };
  if constexpr (resizes) {
    Taps height({a.H, static_cast<int>(a.sizes[2 * image])}, static_cast<int>(top));
    const Taps width({a.W, static_cast<int>(a.sizes[2 * image + 1])}, static_cast<int>(left));
    A total = 0;
    width.each<A>([&](A weight) { total += weight; });
    for (int row = 0; row < rows; ++row, height.advance()) {
      write(resized(picture + channel, stride, height, width, total));
    }
  } else {
    const uint8_t* from = picture + top * stride + 3 * left + channel;
    const auto go_through = [&](auto count) {
      uint8_t pixels[count];
#pragma unroll
      for (int i = 0; i < count; ++i) pixels[i] = *from, from += stride;
#pragma unroll
      for (int i = 0; i < count; ++i) write(static_cast<A>(pixels[i]));
    };
    int row = 0;
    for (; row + kAtOnce <= rows; row += kAtOnce) go_through(std::integral_constant<int, kAtOnce>());
#pragma unroll 1
    for (; row < rows; ++row) go_through(std::integral_constant<int, 1>());
  }
}

}  // namespace

void augment(const AugmentTask& task, Stream stream) {
  constexpr int64_t most = std::numeric_limits<int>::max() / 4;
  if (task.N == 0) return;
  if (task.H >= most || task.W >= most) {
    throw std::runtime_error("fastcnn: CUDA kernels augment pictures of fewer than 2**29 rows and columns");
  }
  Arguments a{task.x, task.offsets, task.sizes, task.mirror, task.mean, task.out, task.N};
  a.H = static_cast<int>(task.H), a.W = static_cast<int>(task.W);
  a.crop_h = static_cast<int>(task.crop_h), a.crop_w = static_cast<int>(task.crop_w);
  std::copy(task.scale, task.scale + 3, a.scale);
  a.blocks = (3 * a.crop_w + kThreads - 1) / kThreads, a.by_blocks = Divisor(a.blocks);
  const dim3 grid = folded_grid(int64_t{a.blocks} * ((a.crop_h + kRows - 1) / kRows), task.N);
  with_dtype_and_format(task.dtype, task.channels_last, [&](auto t, auto channels_last) {
    using T = decltype(t);
    if (task.sizes) launch<&augment_rows<T, channels_last, true>>("augment", grid, dim3(kThreads), 0, stream, a);
    else launch<&augment_rows<T, channels_last, false>>("augment", grid, dim3(kThreads), 0, stream, a);
  });
}

}  // namespace fastcnn::cuda
