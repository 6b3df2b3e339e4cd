// The private ops fastcnn_cpu::*, on the LibTorch stable ABI.
#include <bit>
#include <string>

#include "arguments.h"
#include "cpu/capability.h"
#include "cpu/kept_memory.h"
#include "cpu/kernels.h"
#include "cpu/memory.h"

namespace fastcnn {
namespace {

// An output, whose units are written image by image: `units` of them to an image.
struct Output {
  Output() = default;
  explicit Output(const Tensor& t, int64_t units = 1)
      : data(static_cast<char*>(t.mutable_data_ptr())), bytes(t.numel() * t.element_size()), units_per_image(units) {}
  char* data = nullptr;
  int64_t bytes = 0, units_per_image = 1;
};

// Share `units` of a kernel out among torch's threads; a thread gets at least `grain` of them. It does them in pieces of
// whole images whose output stays in cache between being mapped and being written.
template <typename Task>
void parallel(void (*kernel)(const Task&, int64_t, int64_t, void*), const Task& task, int64_t units, int64_t grain,
              int64_t scratch_bytes, const Output& out = {}) {
  constexpr int64_t kPiece = 1 << 20;
  const int64_t images = units / out.units_per_image, pieces = std::max<int64_t>(1, out.bytes / kPiece);
  const int64_t step = std::max<int64_t>(1, images / pieces) * out.units_per_image;
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    const ScratchBlock scratch(scratch_bytes);
    if (pieces == 1) return kernel(task, begin, end, scratch.get());
    const double unit_bytes = static_cast<double>(out.bytes) / units;
    for (int64_t next; begin < end; begin = next) {
      next = std::min((begin / step + 1) * step, end);
      map_for_writing(out.data + static_cast<int64_t>(begin * unit_bytes), out.data + static_cast<int64_t>(next * unit_bytes));
      kernel(task, begin, next, scratch.get());
    }
  });
}

// Units of this many elements are worth a thread from some number of them on (torch's own rule of thumb).
int64_t grain(int64_t elements_per_unit) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, elements_per_unit)); }

LRNTask lrn_task(const Tensor& x, bool channels_last, const LRN& lrn) {
  const auto sizes = x.sizes();
  int64_t pixels = 1;
  for (size_t i = 2; i < sizes.size(); ++i) pixels *= sizes[i];
  // In channels_last all pixels of all images follow each other.
  const Shape shape = channels_last ? Shape{1, sizes[1], 1, sizes[0] * pixels, true} : Shape{sizes[0], sizes[1], 1, pixels, false};
  return {dtype_of(x), shape, lrn, x.const_data_ptr(), nullptr, nullptr};
}

void run_lrn(LRNTask& task, const Tensor& out, bool backward) {
  expect("out", out, task.dtype, task.shape.N * task.shape.image_stride());
  if (task.shape.N * task.shape.image_stride() == 0) return;
  task.out = out.mutable_data_ptr();
  const auto& k = kernels();
  const int64_t units = k.lrn_units(task);
  parallel(backward ? k.lrn_backward : k.lrn, task, units, grain(task.shape.N * task.shape.image_stride() / units),
           k.lrn_scratch_bytes(task), Output(out, task.shape.channels_last ? 1 : units / task.shape.N));
}

void lrn(Tensor x, Tensor out, bool channels_last, int64_t size, double alpha, double beta, double k, int64_t groups) {
  LRNTask task = lrn_task(x, channels_last, {size, alpha, beta, k, groups});
  run_lrn(task, out, false);
}

void lrn_backward(Tensor dy, Tensor x, Tensor dx, bool channels_last, int64_t size, double alpha, double beta, double k,
                  int64_t groups) {
  LRNTask task = lrn_task(x, channels_last, {size, alpha, beta, k, groups});
  expect("grad", dy, task.dtype, x.numel());
  task.dy = dy.const_data_ptr();
  run_lrn(task, dx, true);
}

// The task of pooling, or none of it, a map of this tensor's shape.
TailTask pool_task(const Tensor& map, bool channels_last, const Ints& kernel, const Ints& stride, const Ints& padding,
                   const Ints& dilation, bool ceil_mode) {
  TailTask task{};
  task.dtype = dtype_of(map);
  task.shape = {map.size(0), map.size(1), map.size(2), map.size(3), channels_last};
  task.pool = pool_of(map, kernel, stride, padding, dilation, ceil_mode);
  return task;
}

// Elements of the pooled map.
int64_t out_elements(const TailTask& task) {
  return task.pool ? task.shape.N * task.shape.C * task.pool.h.out * task.pool.w.out
                   : task.shape.N * task.shape.image_stride();
}

void run_tail(TailTask& task, const Tensor& out, const std::optional<Tensor>& argmax) {
  const int64_t rows = task.shape.N * (task.pool ? task.pool.h.out : task.shape.H);
  const int64_t elements = task.shape.N * task.shape.image_stride();
  expect("out", out, task.dtype, out_elements(task));
  if (argmax) expect_bytes("argmax", *argmax, out_elements(task), task.pool.wide_argmax() ? 4 : 1);
  if (elements == 0) return;
  task.out = out.mutable_data_ptr();
  task.argmax = argmax ? argmax->mutable_data_ptr() : nullptr;
  parallel(kernels().relu_lrn_max_pool2d, task, rows, grain(elements / rows),
           kernels().relu_lrn_max_pool2d_scratch_bytes(task), Output(out, rows / task.shape.N));
}

void run_tail_backward(TailTask& task, const Tensor& dy, const std::optional<Tensor>& argmax, const Tensor& dx) {
  const int64_t units = task.shape.N * task.blocks(), elements = task.shape.N * task.shape.image_stride();
  expect("grad", dy, task.dtype, out_elements(task));
  expect("out", dx, task.dtype, elements);
  STD_TORCH_CHECK(argmax || !task.pool, "argmax must be given for a pool");
  if (argmax) expect_bytes("argmax", *argmax, out_elements(task), task.pool.wide_argmax() ? 4 : 1);
  if (elements == 0) return;
  task.dy = dy.const_data_ptr();
  task.argmax = argmax ? const_cast<void*>(argmax->const_data_ptr()) : nullptr;
  task.out = dx.mutable_data_ptr();
  parallel(kernels().relu_lrn_max_pool2d_backward, task, units, grain(elements / units),
           kernels().relu_lrn_max_pool2d_scratch_bytes(task), Output(dx, task.blocks()));
}

void max_pool2d(Tensor x, Tensor out, std::optional<Tensor> argmax, bool channels_last, Ints kernel, Ints stride,
                Ints padding, Ints dilation, bool ceil_mode) {
  TailTask task = pool_task(x, channels_last, kernel, stride, padding, dilation, ceil_mode);
  task.x = x.const_data_ptr();
  run_tail(task, out, argmax);
}

void max_pool2d_backward(Tensor dy, Tensor argmax, Tensor dx, bool channels_last, Ints kernel, Ints stride, Ints padding,
                         Ints dilation, bool ceil_mode) {
  TailTask task = pool_task(dx, channels_last, kernel, stride, padding, dilation, ceil_mode);
  run_tail_backward(task, dy, argmax, dx);
}

void relu_lrn_max_pool2d(Tensor x, std::optional<Tensor> bias, Tensor out, std::optional<Tensor> argmax,
                         bool channels_last, bool relu, int64_t size, double alpha, double beta, double k, int64_t groups,
                         Ints kernel, Ints stride, Ints padding, Ints dilation, bool ceil_mode) {
  TailTask task = pool_task(x, channels_last, kernel, stride, padding, dilation, ceil_mode);
  task.relu = relu;
  task.lrn = {size, alpha, beta, k, groups};
  task.x = x.const_data_ptr();
  if (bias) expect("bias", *bias, wide(task.dtype), task.shape.C);
  task.bias = bias ? bias->const_data_ptr() : nullptr;
  run_tail(task, out, argmax);
}

// The bias gradient: a partial sum for each block of rows, then those in order, whatever the number of threads.
template <typename A>
void sum_partials(const void* partials, int64_t units, int64_t channels, const Tensor& dbias) {
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t u = 0; u < units; ++u) sum += static_cast<const A*>(partials)[u * channels + c];
    static_cast<A*>(dbias.mutable_data_ptr())[c] = static_cast<A>(sum);
  }
}

void relu_lrn_max_pool2d_backward(Tensor dy, Tensor x, std::optional<Tensor> bias, std::optional<Tensor> argmax, Tensor dx,
                                  std::optional<Tensor> dbias, bool channels_last, bool relu, int64_t size, double alpha,
                                  double beta, double k, int64_t groups, Ints kernel, Ints stride, Ints padding,
                                  Ints dilation, bool ceil_mode) {
  TailTask task = pool_task(x, channels_last, kernel, stride, padding, dilation, ceil_mode);
  task.relu = relu;
  task.lrn = {size, alpha, beta, k, groups};
  task.x = x.const_data_ptr();
  if (bias) expect("bias", *bias, wide(task.dtype), task.shape.C);
  task.bias = bias ? bias->const_data_ptr() : nullptr;
  if (dbias) expect("the bias gradient", *dbias, wide(task.dtype), task.shape.C);
  const bool is_double = task.dtype == DType::float64;
  const int64_t units = x.numel() ? task.shape.N * task.blocks() : 0, C = task.shape.C;
  ScratchBlock partials(dbias ? units * C * (is_double ? sizeof(double) : sizeof(float)) : 0);
  task.dbias = dbias ? partials.get() : nullptr;
  run_tail_backward(task, dy, argmax, dx);
  if (dbias && is_double) sum_partials<double>(partials.get(), units, C, *dbias);
  else if (dbias) sum_partials<float>(partials.get(), units, C, *dbias);
}

void run_mask(void (*kernel)(const MaskTask&, int64_t, int64_t, void*), const MaskTask& task, const Tensor& out) {
  const int64_t units = (task.count + MaskTask::kElements - 1) / MaskTask::kElements;
  if (units) parallel(kernel, task, units, grain(MaskTask::kElements), 0, Output(out));
}

void relu_mask(Tensor y, Tensor mask) {
  expect_bytes("mask", mask, (y.numel() + 7) / 8, 1);
  uint8_t* bits = static_cast<uint8_t*>(mask.mutable_data_ptr());
  run_mask(kernels().relu_mask, {dtype_of(y), y.numel(), y.const_data_ptr(), bits, nullptr}, mask);
}

void relu_mask_backward(Tensor dy, Tensor mask, Tensor dx) {
  expect_bytes("mask", mask, (dy.numel() + 7) / 8, 1);
  expect("out", dx, dtype_of(dy), dy.numel());
  uint8_t* bits = static_cast<uint8_t*>(const_cast<void*>(mask.const_data_ptr()));
  run_mask(kernels().relu_mask_backward, {dtype_of(dy), dy.numel(), dy.const_data_ptr(), bits, dx.mutable_data_ptr()}, dx);
}

// A hash of the tensor's contents: of the hashes of its pieces, until there is one.
int64_t fingerprint(Tensor x) {
  STD_TORCH_CHECK(x.is_contiguous(), "the tensor must be contiguous");
  const void* from = x.const_data_ptr();
  int64_t bytes = x.numel() * x.element_size();
  for (std::vector<uint64_t> hashes, pieces;;) {
    pieces.resize(std::max<int64_t>(1, (bytes + FingerprintTask::kBytes - 1) / FingerprintTask::kBytes));
    const int64_t units = pieces.size();
    parallel(kernels().fingerprint, FingerprintTask{from, bytes, pieces.data()}, units, 4, 0);
    if (units == 1) return static_cast<int64_t>(pieces[0]);
    hashes.swap(pieces);
    from = hashes.data();
    bytes = units * sizeof(uint64_t);
  }
}

// An uninitialized tensor of this one's form, in memory that is kept for the next.
Tensor kept_like(Tensor x, bool lasting) {
  const Block block = take_memory(x.numel() * x.element_size(), lasting);
  STD_TORCH_CHECK(block.begin, "out of memory: a tensor of ", x.numel() * x.element_size(), " bytes");
  return torch::stable::from_blob(block.begin, x.sizes(), x.strides(), x.device(), x.scalar_type(),
                                  [block](void*) { keep_memory(block); });
}

template <typename T>
T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(const_cast<void*>(t->const_data_ptr())) : nullptr;
}

void winograd_weight(Tensor weight, Tensor out, int64_t groups, bool turned) {
  const int64_t of_out = weight.size(0) / groups, of_in = weight.size(1);
  const int64_t rows = weight.stride(2), columns = weight.stride(3);
  STD_TORCH_CHECK(weight.size(2) == 3 && weight.size(3) == 3 && of_out % 16 == 0 && of_in % 16 == 0,
                  "weight must be 3x3, and its inputs and outputs in a group multiples of 16");
  expect("weight", weight, DType::float32, weight.numel());
  expect("out", out, DType::float32, weight.numel() / 9 * 16);
  const float* data = static_cast<const float*>(weight.const_data_ptr());
  WinogradWeightTask task{of_in,
                          of_out,
                          groups,
                          {of_out * weight.stride(0), weight.stride(0), weight.stride(1), rows, columns},
                          data,
                          static_cast<float*>(out.mutable_data_ptr())};
  if (turned) {  // inputs and outputs change places, and each window is turned round
    std::swap(task.channels, task.outputs);
    std::swap(task.stride[1], task.stride[2]);
    task.stride[3] = -rows, task.stride[4] = -columns, task.weight = data + 2 * (rows + columns);
  }
  parallel(kernels().winograd_weight, task, groups * panels(task.outputs) * task.channels, 16, 0);
}

// Returns the largest magnitude before ReLU; not a finite one where another algorithm has to find out what is right.
double winograd(Tensor x, std::optional<Tensor> x_mask, Tensor weight, std::optional<Tensor> bias, Tensor out,
                std::optional<Tensor> out_mask, Ints padding, int64_t groups, bool relu, bool pool) {
  WinogradTask task{};
  const int64_t N = x.size(0), C = x.size(1), K = out.size(1);
  task.shape = {N, C, x.size(2), x.size(3), true};
  task.outputs = K, task.groups = groups, task.padding[0] = padding[0], task.padding[1] = padding[1];
  task.out_h = task.shape.H + 2 * padding[0] - 2, task.out_w = task.shape.W + 2 * padding[1] - 2;
  const int64_t elements = N * K * task.out_h * task.out_w;
  STD_TORCH_CHECK(C % (16 * groups) == 0 && K % (16 * groups) == 0, "channels of a group must be multiples of 16");
  expect("input", x, DType::float32, x.numel());
  expect("weight", weight, DType::float32, C / groups * K * 16);
  expect("out", out, DType::float32, pool ? N * K * (task.out_h / 2) * (task.out_w / 2) : elements);
  if (bias) expect("bias", *bias, DType::float32, K);
  if (x_mask) expect_bytes("mask", *x_mask, x.numel() / 8, 1);
  if (out_mask) expect_bytes("mask", *out_mask, elements / 8, 1);
  task.relu = relu, task.pool = pool;
  task.x = static_cast<const float*>(x.const_data_ptr());
  task.x_mask = data_or_null<const uint8_t>(x_mask);
  task.weight = static_cast<const float*>(weight.const_data_ptr());
  task.bias = data_or_null<const float>(bias);
  task.out = static_cast<float*>(out.mutable_data_ptr());
  task.out_mask = data_or_null<uint8_t>(out_mask);
  std::atomic<uint32_t> largest = 0;
  task.largest = &largest;
  const int64_t units = (task.tiles() + WinogradTask::kTiles - 1) / WinogradTask::kTiles;
  parallel(kernels().winograd, task, units, 1, kernels().winograd_scratch_bytes(task));
  return std::bit_cast<float>(largest.load());
}

void linear(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor out, bool relu, double factor) {
  const DType dtype = dtype_of(x);
  const LinearTask task{dtype, x.size(0), x.size(1), weight.size(0), relu, factor, x.const_data_ptr(),
                        weight.const_data_ptr(), data_or_null<const void>(bias), out.mutable_data_ptr()};
  STD_TORCH_CHECK(task.vectors >= 1 && task.vectors <= LinearTask::kVectors, "input must have 1 to ",
                  LinearTask::kVectors, " rows, but has ", task.vectors);
  expect("weight", weight, dtype, task.outputs * task.in);
  expect("out", out, dtype, task.vectors * task.outputs);
  if (bias) expect("bias", *bias, dtype, task.outputs);
  const int64_t units = (task.outputs + LinearTask::kOutputs - 1) / LinearTask::kOutputs;
  parallel(kernels().linear, task, units, grain(task.in * LinearTask::kOutputs), 0);
}

STABLE_TORCH_LIBRARY(fastcnn_cpu, m) {
  m.def("lrn(Tensor input, Tensor(a!) out, bool channels_last, " FASTCNN_LRN ") -> ()");
  m.def("lrn_backward(Tensor grad, Tensor input, Tensor(a!) out, bool channels_last, " FASTCNN_LRN ") -> ()");
  m.def("max_pool2d(Tensor input, Tensor(a!) out, Tensor(b!)? argmax, bool channels_last, " FASTCNN_POOL ") -> ()");
  m.def("max_pool2d_backward(Tensor grad, Tensor argmax, Tensor(a!) out, bool channels_last, " FASTCNN_POOL ") -> ()");
  m.def("kept_like(Tensor input, bool lasting) -> Tensor");
  m.def("winograd(Tensor input, Tensor? input_mask, Tensor weight, Tensor? bias, Tensor(a!) out, Tensor(b!)? out_mask, "
        "int[] padding, int groups, bool relu, bool pool) -> float");
  m.def("winograd_weight(Tensor weight, Tensor(a!) out, int groups, bool turned) -> ()");
  m.def("linear(Tensor input, Tensor weight, Tensor? bias, Tensor(a!) out, bool relu, float factor) -> ()");
  m.def("relu_mask(Tensor output, Tensor(a!) mask) -> ()");
  m.def("relu_mask_backward(Tensor grad, Tensor mask, Tensor(a!) out) -> ()");
  m.def("fingerprint(Tensor input) -> int");
  m.def("relu_lrn_max_pool2d(Tensor input, Tensor? bias, Tensor(a!) out, Tensor(b!)? argmax, bool channels_last, "
        "bool relu, " FASTCNN_LRN ", " FASTCNN_POOL ") -> ()");
  m.def("relu_lrn_max_pool2d_backward(Tensor grad, Tensor input, Tensor? bias, Tensor? argmax, Tensor(a!) out, "
        "Tensor(b!)? dbias, bool channels_last, bool relu, " FASTCNN_LRN ", " FASTCNN_POOL ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastcnn_cpu, CPU, m) {
  m.impl("lrn", TORCH_BOX(&lrn));
  m.impl("lrn_backward", TORCH_BOX(&lrn_backward));
  m.impl("max_pool2d", TORCH_BOX(&max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&max_pool2d_backward));
  m.impl("kept_like", TORCH_BOX(&kept_like));
  m.impl("winograd", TORCH_BOX(&winograd));
  m.impl("winograd_weight", TORCH_BOX(&winograd_weight));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("relu_mask", TORCH_BOX(&relu_mask));
  m.impl("relu_mask_backward", TORCH_BOX(&relu_mask_backward));
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
  m.impl("relu_lrn_max_pool2d", TORCH_BOX(&relu_lrn_max_pool2d));
  m.impl("relu_lrn_max_pool2d_backward", TORCH_BOX(&relu_lrn_max_pool2d_backward));
}

}  // namespace
}  // namespace fastcnn
