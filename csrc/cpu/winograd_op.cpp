#include <bit>

#include "../arguments.h"
#include "parallel.h"
#include "winograd.h"

namespace fastcnn {

struct winograd;
struct winograd_weight;
struct winograd_gradient;

static void check_window(int64_t window) {
  STD_TORCH_CHECK(window == 3 || window == 5, "windows must be 3x3 or 5x5, but are ", window, "x", window);
}

static void winograd_weight_op(Tensor weight, Tensor out, int64_t groups, bool turned) {
  const int64_t of_out = weight.size(0) / groups, of_in = weight.size(1);
  const int64_t rows = weight.stride(2), columns = weight.stride(3);
  const int64_t window = weight.size(2);
  check_window(window);
  STD_TORCH_CHECK(weight.size(3) == window && of_out % 16 == 0 && of_in % 16 == 0,
                  "windows must be square, and the weight's inputs and outputs in a group multiples of 16");
  expect("weight", weight, DType::float32, weight.numel());
  expect("out", out, DType::float32, weight.numel() / (window * window) * winograd_products(window));
  WinogradWeightTask task{};
  task.window = window, task.channels = of_in, task.outputs = of_out, task.groups = groups;
  task.weight = static_cast<const float*>(weight.const_data_ptr());
  task.out = static_cast<float*>(out.mutable_data_ptr());
  task.stride[0] = of_out * weight.stride(0), task.stride[1] = weight.stride(0), task.stride[2] = weight.stride(1);
  task.stride[3] = rows, task.stride[4] = columns;
  if (turned) {  // transposed, and each window rotated by 180 degrees
    std::swap(task.channels, task.outputs);
    std::swap(task.stride[1], task.stride[2]);
    task.stride[3] = -rows, task.stride[4] = -columns, task.weight += (window - 1) * (rows + columns);
  }
  parallel<winograd_weight>(task, out.numel());
}

static void set_maps(WinogradMaps& maps, const Tensor& x, int64_t window, int64_t outputs, const Ints& padding,
                     int64_t groups) {
  check_window(window);
  STD_TORCH_CHECK(padding.size() == 2, "padding must have 2 elements, but has ", padding.size());
  STD_TORCH_CHECK(x.size(1) > 0 && groups > 0, "there must be channels and groups");
  STD_TORCH_CHECK(x.size(1) % (16 * groups) == 0 && outputs % (16 * groups) == 0,
                  "channels of a group must be multiples of 16");
  expect("input", x, DType::float32, x.numel());
  maps.shape = {x.size(0), x.size(1), x.size(2), x.size(3), true};
  maps.window = window, maps.outputs = outputs, maps.groups = groups, maps.padding[0] = padding[0],
  maps.padding[1] = padding[1];
  maps.out_h = maps.shape.H + 2 * padding[0] - window + 1, maps.out_w = maps.shape.W + 2 * padding[1] - window + 1;
  maps.x = static_cast<const float*>(x.const_data_ptr());
}

// Returns the largest magnitude before ReLU. Non-finite: the caller must fall back to another algorithm.
static double winograd_op(Tensor x, std::optional<Tensor> x_mask, Tensor weight, std::optional<Tensor> bias,
                          std::optional<Tensor> addend, Tensor out, int64_t first, std::optional<Tensor> out_mask,
                          int64_t window, Ints padding, int64_t groups, bool relu, bool pool) {
  WinogradTask task{};
  const int64_t products = winograd_products(window), channels = out.size(1);
  const int64_t K = x.size(1) ? weight.numel() / products * groups / x.size(1) : 0;
  set_maps(task, x, window, K, padding, groups);
  const int64_t N = x.size(0), C = x.size(1), elements = N * K * task.out_h * task.out_w;
  expect("weight", weight, DType::float32, C / groups * K * products);
  STD_TORCH_CHECK(first >= 0 && first + K <= channels, "out has ", channels, " channels, too few");
  STD_TORCH_CHECK(!addend || !pool, "no pool takes an addend");
  STD_TORCH_CHECK(!out_mask || channels == K, "a mask is of the whole output");
  const int64_t divisor = pool ? 2 : 1;
  expect("out", out, DType::float32, N * channels * (task.out_h / divisor) * (task.out_w / divisor));
  if (addend) expect("addend", *addend, DType::float32, elements);
  if (bias) expect("bias", *bias, DType::float32, K);
  if (x_mask) expect_bytes("mask", *x_mask, x.numel() / 8, 1);
  if (out_mask) expect_bytes("mask", *out_mask, elements / 8, 1);
  task.relu = relu, task.pool = pool;
  task.x_mask = data_or_null<const uint8_t>(x_mask);
  task.weight = static_cast<const float*>(weight.const_data_ptr());
  task.bias = data_or_null<const float>(bias);
  task.addend = data_or_null<const float>(addend);
  task.out = static_cast<float*>(out.mutable_data_ptr()) + first, task.out_stride = channels;
  task.out_mask = data_or_null<uint8_t>(out_mask);
  std::atomic<uint32_t> largest = 0;
  task.largest = &largest;
  parallel<winograd>(task, elements * products / 4 * (C / groups));
  return std::bit_cast<float>(largest.load());
}

// Returns the largest magnitude. Non-finite: the caller must fall back to another algorithm.
static double winograd_gradient_op(Tensor x, Tensor dy, std::optional<Tensor> dy_mask, Tensor dw,
                                   std::optional<Tensor> db, Ints padding, int64_t groups) {
  WinogradGradientTask task{};
  STD_TORCH_CHECK(dw.dim() == 5, "the weight's gradient must have 5 dimensions: parts and those of the weight");
  const int64_t C = x.size(1), K = dw.size(1), window = dw.size(3);
  set_maps(task, x, window, K, padding, groups);
  task.parts = dw.size(0);
  expect("grad", dy, DType::float32, x.size(0) * K * task.out_h * task.out_w);
  STD_TORCH_CHECK(task.parts > 0 && dw.size(2) == C / groups && dw.size(4) == window,
                  "the weight's gradient must have parts of the shape of the weight");
  expect("the weight's gradient", dw, DType::float32, task.parts * K * C / groups * window * window);
  if (dy_mask) expect_bytes("mask", *dy_mask, dy.numel() / 8, 1);
  if (db) expect("the bias's gradient", *db, DType::float32, task.parts * K);
  task.dy = static_cast<const float*>(dy.const_data_ptr());
  task.dy_mask = data_or_null<const uint8_t>(dy_mask);
  task.dw = static_cast<float*>(dw.mutable_data_ptr());
  for (int i = 0; i < 5; ++i) task.stride[i] = dw.stride(i);
  task.db = data_or_null<float>(db);
  std::atomic<uint32_t> largest = 0;
  task.largest = &largest;
  parallel<winograd_gradient>(task, dy.numel() * winograd_products(window) / 4 * (C / groups));
  return std::bit_cast<float>(largest.load());
}

FASTCNN_OP(fastcnn_cpu, CPU, winograd,
           "(Tensor input, Tensor? input_mask, Tensor weight, Tensor? bias, Tensor? addend, Tensor(a!) out, int first, "
           "Tensor(b!)? out_mask, int window, int[] padding, int groups, bool relu, bool pool) -> float",
           winograd_op)
FASTCNN_OP(fastcnn_cpu, CPU, winograd_weight, "(Tensor weight, Tensor(a!) out, int groups, bool turned) -> ()",
           winograd_weight_op)
FASTCNN_OP(fastcnn_cpu, CPU, winograd_gradient,
           "(Tensor input, Tensor grad, Tensor? grad_mask, Tensor(a!) weight_grad, Tensor(b!)? bias_grad, "
           "int[] padding, int groups) -> float",
           winograd_gradient_op)

}  // namespace fastcnn
