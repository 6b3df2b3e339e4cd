#include "../augment_op.h"

#include "parallel.h"

namespace fastcnn {

struct augment;

static void augment_op(Tensor x, Tensor offsets, Tensor mirror, Tensor mean, std::optional<Tensor> sizes, Tensor out,
                       bool channels_last, double red, double green, double blue) {
  const AugmentTask task = augment_task(x, offsets, mirror, mean, sizes, out, channels_last, red, green, blue);
  for (int64_t i = 0; i < 2 * task.N; ++i) {
    const int64_t length = i % 2 ? task.W : task.H, crop = i % 2 ? task.crop_w : task.crop_h;
    const int64_t size = sizes ? task.sizes[i] : length;
    STD_TORCH_CHECK(task.offsets[i] >= 0 && task.offsets[i] <= size - crop, "a crop is not within its picture");
    STD_TORCH_CHECK(!sizes || std::max(length, size) <= kMostResized, "a picture is too large to be resized");
  }
  parallel<augment>(task, out.numel(), Output(out, channels_last ? 0 : task.N));
}

FASTCNN_OP(fastcnn_cpu, CPU, augment, FASTCNN_AUGMENT_OP, augment_op)

}  // namespace fastcnn
