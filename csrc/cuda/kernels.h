// The CUDA operators as the library calls them: raw pointers and a stream. No torch header, no allocation in their
// files.
#pragma once

#include "../conv2d_relu.h"
#include "../lrn.h"
#include "../max_pool2d.h"
#include "../tensor.h"

namespace fastcnn::cuda {

using Stream = void*;  // a cudaStream_t

// What lrn, max_pool2d and relu_lrn_max_pool2d are told; the first two leave relu, bias and what is not theirs absent.
struct Task {
  DType dtype;
  Shape shape;  // of x
  bool relu;
  LRN lrn;
  MaxPool2d pool;
  const void *x, *bias, *dy;  // bias: may be null; in the compute type. dy: backward only
  void *out, *argmax;         // y or dx; argmax may be null in forward
  void *partials, *dbias;     // backward: null without bias; partials: bias_partials() rows of C sums; compute type
  void* terms;                // backward: lrn_terms() elements of the compute type
};

struct ConvTask {
  DType dtype;  // float32 is multiplied as TF32; there is no float64
  Shape shape;  // of x
  Conv2d conv;
  int64_t row;  // elements of a row of weights, a multiple of 8
  const void *x, *weight, *bias;  // weight: for each output a row in the order kh, kw, c, then zeros; bias: may be null
  void* out;
};

// Each returns once its launches were checked, or throws std::runtime_error with the kernel's name and CUDA's error.
void lrn(const Task&, Stream);
void lrn_backward(const Task&, Stream);
void max_pool2d(const Task&, Stream);
void max_pool2d_backward(const Task&, Stream);
void relu_lrn_max_pool2d(const Task&, Stream);
void relu_lrn_max_pool2d_backward(const Task&, Stream);
int64_t bias_partials(const Task&);
int64_t lrn_terms(const Task&);
void conv2d_relu(const ConvTask&, Stream);

}  // namespace fastcnn::cuda
