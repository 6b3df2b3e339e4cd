// Local response normalization and its gradient: shares the tensor out in tiles, which lrn.h computes.
// Memory: forward reads x and writes y once; backward reads x and dy and writes dx.
#include "lrn.h"

#include "../relu_lrn_max_pool2d.h"
#include "dispatch.h"
#include "kernel.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

// In NCHW a tile's runs should be long, and a ring of them stay in cache.
int64_t tiles_per_image(const TailTask& task) {
  const int64_t most = task.shape.channels_last ? 32 : 1024;
  return (task.shape.W + most - 1) / most;
}

int64_t units(const TailTask& task) { return task.shape.N * tiles_per_image(task); }

template <typename T, bool backward>
class Tiles {
 public:
  using A = Compute<T>;

  Tiles(const TailTask& task, Scratch& scratch)
      : task_(task), lrn_(task.lrn, tile(pixels_), scratch, !backward && sizeof(T) == 2) {}

  void unit(int64_t u) const {
    const Shape& shape = task_.shape;
    const int64_t start = u % per_image_ * pixels_, stride = shape.channel_stride();
    const int64_t at = u / per_image_ * shape.image_stride() + start * shape.pixel_stride();
    const Tile tile = this->tile(std::min(pixels_, shape.W - start));
    const int64_t ahead = lrn_.ahead(tile, stride);
    const TensorSource<T> x{tile, static_cast<const T*>(task_.x) + at, stride, ahead};
    const TensorSink<T> out{tile, static_cast<T*>(task_.out) + at, stride};
    if constexpr (backward) {
      const TensorSource<T> dy{tile, static_cast<const T*>(task_.dy) + at, stride, ahead};
      lrn_.backward(tile, x, dy, [&](int64_t r) FASTCNN_INLINE_LAMBDA {
        return [to = out(r)](int64_t i, Vec<A> dx, Vec<A>) FASTCNN_INLINE_LAMBDA { to(i, dx); };
      });
    } else {
      lrn_.forward(tile, x, out);
    }
  }

 private:
  Tile tile(int64_t pixels) const { return {task_.shape.channels_last, task_.shape.C, task_.lrn.groups, pixels}; }

  const TailTask& task_;
  const int64_t per_image_ = tiles_per_image(task_), pixels_ = (task_.shape.W + per_image_ - 1) / per_image_;
  const TileLRN<A> lrn_;
};

template <typename T>
using Forward = Tiles<T, false>;
template <typename T>
using Backward = Tiles<T, true>;

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(lrn, TailTask, units, scratch_bytes<Forward>, run<Forward>)
FASTCNN_REGISTER_KERNEL(lrn_backward, TailTask, units, scratch_bytes<Backward>, run<Backward>)
