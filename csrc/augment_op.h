// The private op augment of both libraries.
#pragma once

#include "arguments.h"
#include "augment.h"

namespace fastcnn {

#define FASTCNN_AUGMENT_OP                                                                                         \
  "(Tensor input, Tensor offsets, Tensor mirror, Tensor mean, Tensor? sizes, Tensor(a!) out, bool channels_last, " \
  "float red, float green, float blue) -> ()"

// In which red, green and blue are the factors of the channels.
inline AugmentTask augment_task(const Tensor& x, const Tensor& offsets, const Tensor& mirror, const Tensor& mean,
                                const std::optional<Tensor>& sizes, const Tensor& out, bool channels_last, double red,
                                double green, double blue) {
  const int64_t n = x.size(0);
  AugmentTask task{};
  task.dtype = dtype_of(out), task.channels_last = channels_last;
  task.N = n, task.H = x.size(1), task.W = x.size(2), task.crop_h = out.size(2), task.crop_w = out.size(3);
  task.scale[0] = red, task.scale[1] = green, task.scale[2] = blue;
  expect_bytes("input", x, n * task.H * task.W * 3, 1);
  expect_bytes("offsets", offsets, 2 * n, 8);
  expect_bytes("mirror", mirror, n, 1);
  expect("mean", mean, wide(task.dtype), 3 * n);
  if (sizes) expect_bytes("sizes", *sizes, 2 * n, 8);
  expect("out", out, task.dtype, n * 3 * task.crop_h * task.crop_w);
  task.x = static_cast<const uint8_t*>(x.const_data_ptr());
  task.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  task.mirror = static_cast<const bool*>(mirror.const_data_ptr());
  task.mean = mean.const_data_ptr(), task.sizes = data_or_null<const int64_t>(sizes);
  task.out = out.mutable_data_ptr();
  return task;
}

}  // namespace fastcnn
