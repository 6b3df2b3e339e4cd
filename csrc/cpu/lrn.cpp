// Local response normalization: s = k + alpha/size * sum(x^2), y = x * s^-beta, and its gradient.
// Memory: forward reads x and writes y once; backward reads x and dy and writes dx.
#include "lrn.h"

#include "dispatch.h"
#include "kernels.h"
#include "scratch.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

constexpr int64_t kTileLanes = 16384;  // a tile and its result stay in the second-level cache

int64_t tile_pixels(const LRNTask& task) {
  const int64_t fit = kTileLanes / (task.shape.C + task.lrn.groups * task.lrn.before(task.shape.C / task.lrn.groups));
  return std::min(std::max<int64_t>(fit / 16 * 16, 16), std::max<int64_t>(task.shape.W, 1));
}

int64_t tiles_per_image(const LRNTask& task) {
  const int64_t pixels = tile_pixels(task);
  return (task.shape.W + pixels - 1) / pixels;
}

template <typename A>
struct Buffers {
  A *x, *y, *q;
  Buffers(const Tile& tile, Scratch& scratch)
      : x(scratch.take<A>(tile.lanes())), y(scratch.take<A>(tile.lanes())), q(scratch.take<A>(tile.lanes())) {}
};

Tile tile_of(const LRNTask& task, int64_t pixels) {
  const int64_t group = task.shape.C / task.lrn.groups;
  return {task.shape.channels_last, task.shape.C, task.lrn.groups, pixels, task.lrn.before(group)};
}

template <typename T, bool backward>
void run(const LRNTask& task, int64_t begin, int64_t end, void* block) {
  using A = Compute<T>;
  const Shape& shape = task.shape;
  const int64_t pixels = tile_pixels(task), per_image = tiles_per_image(task), stride = shape.channel_stride();
  const A no_floor = -std::numeric_limits<A>::infinity();
  Scratch scratch(block);
  const Buffers<A> buffer(tile_of(task, pixels), scratch);
  int64_t cleared = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t start = unit % per_image * pixels;
    const Tile tile = tile_of(task, std::min(pixels, shape.W - start));
    if (tile.pixels != cleared) clear_pads(tile, buffer.x);
    cleared = tile.pixels;
    const int64_t at = unit / per_image * shape.image_stride() + start * shape.pixel_stride();
    load_tile<T, A>(tile, static_cast<const T*>(task.x) + at, stride, nullptr, no_floor, buffer.x);
    if constexpr (backward) {
      load_tile<T, A>(tile, static_cast<const T*>(task.dy) + at, stride, nullptr, no_floor, buffer.y);
      lrn_backward_tile(task.lrn, tile, buffer.x, buffer.y, buffer.q);
    } else {
      lrn_tile(task.lrn, tile, buffer.x, buffer.y);
    }
    store_tile(tile, buffer.y, static_cast<T*>(task.out) + at, stride);
  }
}

}  // namespace

int64_t lrn_units(const LRNTask& task) { return task.shape.N * tiles_per_image(task); }

int64_t lrn_scratch_bytes(const LRNTask& task) {
  Scratch scratch(nullptr);
  with_dtype(task.dtype, [&](auto t) { Buffers<Compute<decltype(t)>>(tile_of(task, tile_pixels(task)), scratch); });
  return scratch.used();
}

void lrn(const LRNTask& task, int64_t begin, int64_t end, void* scratch) {
  with_dtype(task.dtype, [&](auto t) { run<decltype(t), false>(task, begin, end, scratch); });
}

void lrn_backward(const LRNTask& task, int64_t begin, int64_t end, void* scratch) {
  with_dtype(task.dtype, [&](auto t) { run<decltype(t), true>(task, begin, end, scratch); });
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
