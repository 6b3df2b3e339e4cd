#include "../augment_op.h"

#include "run.h"

namespace fastcnn::cuda {

// Its caller has checked that the crops are within the pictures.
static void augment_op(Tensor x, Tensor offsets, Tensor mirror, Tensor mean, std::optional<Tensor> sizes, Tensor out,
                       bool channels_last, double red, double green, double blue) {
  const AugmentTask task = augment_task(x, offsets, mirror, mean, sizes, out, channels_last, red, green, blue);
  augment(task, OnDevice(out).stream());
}

FASTCNN_OP(fastcnn_cuda, CUDA, augment, FASTCNN_AUGMENT_OP, augment_op)

}  // namespace fastcnn::cuda
