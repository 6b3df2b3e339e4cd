#include "../augment_op.h"

#include "parallel.h"

namespace fastcnn {

struct augment;

static void augment_op(Tensor x, Tensor offsets, Tensor mirror, Tensor mean, std::optional<Tensor> sizes, Tensor out,
                       bool channels_last, double red, double green, double blue) {
  AugmentTask task = augment_task(x, offsets, mirror, mean, sizes, out, channels_last, red, green, blue);
  for (int64_t i = 0; i < 2 * task.N; ++i) {
    const int64_t length = i % 2 ? task.W : task.H, crop = i % 2 ? task.crop_w : task.crop_h;
    const int64_t size = sizes ? task.sizes[i] : length;
    if (sizes) {
      STD_TORCH_CHECK(std::min(length, size) >= 1 && std::max(length, size) <= kMostResized,
                      "a picture cannot be resized");
      task.taps[i % 2] = std::max(task.taps[i % 2], ResizedAxis<int64_t>{length, size}.taps());
    }
    STD_TORCH_CHECK(task.offsets[i] >= 0 && task.offsets[i] <= size - crop, "a crop is not within its picture");
  }
  parallel<augment>(task, out.numel(), Output(out, channels_last ? 0 : task.N));
}

FASTCNN_OP(fastcnn_cpu, CPU, augment, FASTCNN_AUGMENT_OP, augment_op)

}  // namespace fastcnn
