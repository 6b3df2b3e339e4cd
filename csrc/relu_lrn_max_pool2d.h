// What kernels of lrn, max_pool2d and relu_lrn_max_pool2d get, on CPU and CUDA: y = max_pool2d(lrn(relu(x + bias))).
// The first two operators are tails without the other parts. Knows nothing of torch.
#pragma once

#include "lrn.h"
#include "max_pool2d.h"
#include "tensor.h"

namespace fastcnn {

struct TailTask {
  DType dtype;
  Shape shape;  // of x; in lrn, H is 1 and W counts all pixels
  bool relu;
  LRN lrn;
  MaxPool2d pool;
  const void *x, *bias, *dy;  // bias: in the compute type, may be null. dy: backward only
  void *out, *argmax;         // out: y or dx. argmax: may be null in forward
  void *dbias, *partials;  // backward, in the compute type, null without bias. partials: rows of C sums, to be added up
  void* terms;             // backward on CUDA: lrn_terms() elements of the compute type

  Shape out_shape() const {
    return pool ? Shape{shape.N, shape.C, pool.h.out, pool.w.out, shape.channels_last} : shape;
  }
};

}  // namespace fastcnn
