// The CPU kernels as the library calls them. Each is compiled once per capability, into a namespace of that name.
//
// A kernel does a range of its units, so that the caller can share them out among threads, and gets scratch memory from
// the caller: one block of scratch_bytes() for each range. No torch header and no allocation in a kernel's file.
#pragma once

#include <atomic>

#include "../lrn.h"
#include "../max_pool2d.h"
#include "../tensor.h"

namespace fastcnn {

struct LRNTask {
  DType dtype;
  Shape shape;  // H == 1; images of a channels_last tensor may be given as one
  LRN lrn;
  const void *x, *dy;  // dy: backward only
  void* out;           // y or dx
};

// Units are rows: of the output in forward, of the input, in blocks of kRows, in backward.
struct TailTask {
  static constexpr int64_t kRows = 8;
  DType dtype;
  Shape shape;  // of x
  bool relu;
  LRN lrn;
  MaxPool2d pool;
  const void *x, *bias, *dy;  // bias: may be null; in the compute type. dy: backward only
  void *out, *argmax;         // y or dx; argmax may be null in forward
  void* dbias;                // backward: a row of C partial sums a unit, in the compute type; null without bias
  int64_t blocks() const { return (shape.H + kRows - 1) / kRows; }  // a backward unit is n * blocks() + block
};

// Elements in the order of memory, one bit each: whether ReLU passes the gradient. Units are kElements of them.
struct MaskTask {
  static constexpr int64_t kElements = 4096;
  DType dtype;
  int64_t count;
  const void* x;  // y in forward, dy in backward
  uint8_t* mask;
  void* out;  // backward only
};

// The hash of each kBytes of memory, which are a unit; all of them together tell whether it changed.
struct FingerprintTask {
  static constexpr int64_t kBytes = 1 << 16;
  const void* x;
  int64_t bytes;
  uint64_t* out;
};

// A convolution with 3x3 windows in steps of 1, float32, channels_last; channels and outputs of a group are multiples of
// 16. Units are kTiles tiles of 2x2 outputs.
struct WinogradTask {
  static constexpr int kTiles = 6;
  Shape shape;  // of x
  int64_t out_h, out_w, outputs, groups, padding[2];
  bool relu, pool;  // pool: the maximum of each whole tile
  const float *x, *weight, *bias;  // weight: transformed; bias: may be null
  const uint8_t* x_mask;           // null, or a bit for each element of x: whether it counts
  float* out;
  uint8_t* out_mask;               // null, or a bit for each element before pooling: whether ReLU passes the gradient
  std::atomic<uint32_t>* largest;  // the bits of the largest magnitude before ReLU; NaN is larger than inf
  int64_t tiles_down() const { return (out_h + 1) / 2; }
  int64_t tiles_across() const { return (out_w + 1) / 2; }
  int64_t tiles() const { return shape.N * tiles_down() * tiles_across(); }
};

// Its weights, transformed: for each group and each panel of its outputs, 16 matrices of channels x outputs. Units are
// groups * panels * channels.
struct WinogradWeightTask {
  int64_t channels, outputs, groups;  // channels and outputs of one group
  int64_t stride[5];                  // of a group, an output, a channel, a row and a column
  const float* weight;
  float* out;
};

// A group's outputs are cut into panels of at most 64, all multiples of 16: how many, and where each begins.
inline int64_t panels(int64_t outputs) { return (outputs + 63) / 64; }
inline int64_t panel_begin(int64_t outputs, int64_t panel) { return outputs / 16 * panel / panels(outputs) * 16; }

// A fully connected layer of 1 to kVectors vectors, perhaps rectified, times a factor. Units are kOutputs outputs.
struct LinearTask {
  static constexpr int kVectors = 4, kOutputs = 4;
  DType dtype;
  int64_t vectors, in, outputs;
  bool relu;
  double factor;
  const void *x, *weight, *bias;  // weight: a row an output; bias: may be null
  void* out;
};

#define FASTCNN_DECLARE_KERNELS(capability)                                                      \
  namespace capability {                                                                         \
  int64_t lrn_units(const LRNTask&);                                                             \
  int64_t lrn_scratch_bytes(const LRNTask&);                                                     \
  void lrn(const LRNTask&, int64_t begin, int64_t end, void* scratch);                           \
  void lrn_backward(const LRNTask&, int64_t begin, int64_t end, void* scratch);                  \
  void fingerprint(const FingerprintTask&, int64_t begin, int64_t end, void* scratch);           \
  int64_t winograd_scratch_bytes(const WinogradTask&);                                            \
  void winograd(const WinogradTask&, int64_t begin, int64_t end, void* scratch);                 \
  void winograd_weight(const WinogradWeightTask&, int64_t begin, int64_t end, void* scratch);    \
  void linear(const LinearTask&, int64_t begin, int64_t end, void* scratch);                     \
  void relu_mask(const MaskTask&, int64_t begin, int64_t end, void* scratch);                    \
  void relu_mask_backward(const MaskTask&, int64_t begin, int64_t end, void* scratch);           \
  int64_t relu_lrn_max_pool2d_scratch_bytes(const TailTask&);                                    \
  void relu_lrn_max_pool2d(const TailTask&, int64_t begin, int64_t end, void* scratch);          \
  void relu_lrn_max_pool2d_backward(const TailTask&, int64_t begin, int64_t end, void* scratch); \
  }

FASTCNN_DECLARE_KERNELS(baseline)
FASTCNN_DECLARE_KERNELS(avx2)
FASTCNN_DECLARE_KERNELS(avx512)

}  // namespace fastcnn
