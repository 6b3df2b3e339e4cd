// Local response normalization: s = k + alpha/size * sum(x^2), y = x * s^-beta, and its gradient.
// Memory: forward reads x and writes y once; backward reads x and dy and writes dx.
#include "lrn.h"

#include "dispatch.h"
#include "kernels.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

// In NCHW a tile's runs should be long, and a ring of them stay in cache.
int64_t tiles_per_image(const LRNTask& task) {
  const int64_t most = task.shape.channels_last ? 32 : 1024;
  return (task.shape.W + most - 1) / most;
}

int64_t tile_pixels(const LRNTask& task) { return (task.shape.W + tiles_per_image(task) - 1) / tiles_per_image(task); }

Tile tile_of(const LRNTask& task, int64_t pixels) {
  return {task.shape.channels_last, task.shape.C, task.lrn.groups, pixels};
}

template <typename T, bool backward>
void run(const LRNTask& task, int64_t begin, int64_t end, void* block) {
  using A = Compute<T>;
  const Shape& shape = task.shape;
  const int64_t pixels = tile_pixels(task), per_image = tiles_per_image(task), stride = shape.channel_stride();
  const int64_t ahead = shape.channels_last ? 2048 : (1024 / pixels + 1) * stride;
  Scratch scratch(block);
  const TileLRN<A> lrn(task.lrn, tile_of(task, pixels), scratch, !backward && sizeof(T) == 2);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t start = unit % per_image * pixels;
    const int64_t at = unit / per_image * shape.image_stride() + start * shape.pixel_stride();
    const Tile tile = tile_of(task, std::min(pixels, shape.W - start));
    const TensorSource<T> x{tile, static_cast<const T*>(task.x) + at, stride, ahead};
    const TensorSink<T> out{tile, static_cast<T*>(task.out) + at, stride};
    if constexpr (backward) {
      const TensorSource<T> dy{tile, static_cast<const T*>(task.dy) + at, stride, ahead};
      lrn.backward(tile, x, dy, [&](int64_t r) FASTCNN_INLINE_LAMBDA {
        return [to = out(r)](int64_t i, Vec<A> dx, Vec<A>) FASTCNN_INLINE_LAMBDA { to(i, dx); };
      });
    } else {
      lrn.forward(tile, x, out);
    }
  }
}

}  // namespace

int64_t lrn_units(const LRNTask& task) { return task.shape.N * tiles_per_image(task); }

int64_t lrn_scratch_bytes(const LRNTask& task) {
  Scratch scratch(nullptr);
  with_dtype(task.dtype, [&](auto t) {
    TileLRN<Compute<decltype(t)>>(task.lrn, tile_of(task, tile_pixels(task)), scratch);
  });
  return scratch.used();
}

void lrn(const LRNTask& task, int64_t begin, int64_t end, void* scratch) {
  with_dtype(task.dtype, [&](auto t) { run<decltype(t), false>(task, begin, end, scratch); });
}

void lrn_backward(const LRNTask& task, int64_t begin, int64_t end, void* scratch) {
  with_dtype(task.dtype, [&](auto t) { run<decltype(t), true>(task, begin, end, scratch); });
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
