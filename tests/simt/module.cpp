// What tests/simt/emulator.py loads, once for each sanitizer: the CUDA operators on buffers of their own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "../../tools/machine_code/cuda_task.h"
#include "planted.h"

namespace {

namespace py = pybind11;
using fastcnn::AugmentTask;
using fastcnn::BatchNormTask;
using fastcnn::ConvTask;
using fastcnn::DType;
using fastcnn::TailTask;
using fastcnn::cuda::Ints;

// Memory of exactly this size, at `offset` from an address every alignment divides. Outputs start as 0xff: NaN, or no
// place.
struct Buffer {
  int64_t size, offset;
  std::unique_ptr<unsigned char[]> memory;

  explicit Buffer(int64_t size, int64_t offset = 0)
      : size(size), offset(offset), memory(new unsigned char[offset + size]) {
    std::memset(data(), 0xff, size);
  }
  explicit Buffer(const std::string& bytes, int64_t offset = 0) : Buffer(static_cast<int64_t>(bytes.size()), offset) {
    std::memcpy(data(), bytes.data(), bytes.size());
  }
  unsigned char* data() const { return memory.get() + offset; }
};

void* data(const Buffer* buffer) { return buffer ? buffer->data() : nullptr; }

template <void (*op)(const TailTask&, fastcnn::cuda::Stream)>
void forward(TailTask t, const Buffer& x, const Buffer* bias, const Buffer& y, const Buffer* argmax) {
  t.x = x.data(), t.bias = data(bias), t.out = y.data(), t.argmax = data(argmax);
  op(t, nullptr);
}

template <void (*op)(const TailTask&, fastcnn::cuda::Stream)>
void backward(TailTask t, const Buffer& dy, const Buffer* x, const Buffer* bias, const Buffer* argmax, const Buffer& dx,
              const Buffer* dbias) {
  t.dy = dy.data(), t.x = data(x), t.bias = data(bias), t.argmax = data(argmax);
  t.out = dx.data(), t.dbias = data(dbias);
  std::optional<Buffer> partials;
  if (dbias) partials.emplace(fastcnn::cuda::bias_partials(t) * t.shape.C * (t.dtype == DType::float64 ? 8 : 4));
  t.partials = partials ? partials->data() : nullptr;
  const Buffer terms(fastcnn::cuda::lrn_terms(t) * (t.dtype == DType::float64 ? 8 : 4));
  t.terms = terms.data();
  op(t, nullptr);
}

// Memory for the sums of a task, and for the terms that follow from them.
struct NormSums {
  const Buffer sums, terms;

  explicit NormSums(BatchNormTask& t)
      : sums(8 * fastcnn::cuda::batch_norm_sums(t)), terms(2 * t.shape.C * (t.dtype == DType::float64 ? 8 : 4)) {
    t.sums = reinterpret_cast<double*>(sums.data()), t.terms = terms.data();
  }
};

void batch_norm_statistics(BatchNormTask t, const Buffer& x, const Buffer& mean, const Buffer& var) {
  const NormSums memory(t);
  t.x = x.data(), t.mean = mean.data(), t.var = var.data();
  fastcnn::cuda::batch_norm_statistics(t, nullptr);
}

void batch_norm_relu_max_pool2d(BatchNormTask t, const Buffer& x, const Buffer& mean, const Buffer& var,
                                const Buffer* weight, const Buffer* bias, const Buffer& y, const Buffer* argmax) {
  t.x = x.data(), t.mean = mean.data(), t.var = var.data(), t.weight = data(weight), t.bias = data(bias);
  t.out = y.data(), t.argmax = data(argmax);
  fastcnn::cuda::batch_norm_relu_max_pool2d(t, nullptr);
}

void batch_norm_relu_max_pool2d_backward(BatchNormTask t, const Buffer& dy, const Buffer& x, const Buffer& mean,
                                         const Buffer& var, const Buffer* weight, const Buffer* bias,
                                         const Buffer* argmax, const Buffer& dx, const Buffer* dweight,
                                         const Buffer* dbias) {
  const NormSums memory(t);
  t.dy = dy.data(), t.x = x.data(), t.mean = mean.data(), t.var = var.data();
  t.weight = data(weight), t.bias = data(bias), t.argmax = data(argmax);
  t.out = dx.data(), t.dweight = data(dweight), t.dbias = data(dbias);
  fastcnn::cuda::batch_norm_relu_max_pool2d_backward(t, nullptr);
}

using Pair = std::pair<int64_t, int64_t>;

ConvTask conv_task(int dtype, const Ints& shape, bool channels_last, int64_t groups, int64_t outputs, int64_t row,
                   const std::vector<Pair>& window, const Ints& out) {
  ConvTask t{};
  t.dtype = static_cast<DType>(dtype);
  t.shape = {shape[0], shape[1], shape[2], shape[3], channels_last};
  const auto axis = [&](auto part, int i) {
    const auto [kernel, stride, padding, dilation] =
        std::tuple{part(window[0]), part(window[1]), part(window[2]), part(window[3])};
    return fastcnn::ConvAxis{kernel, stride, padding, dilation, shape[2 + i], out[i]};
  };
  t.h = axis([](Pair p) { return p.first; }, 0), t.w = axis([](Pair p) { return p.second; }, 1);
  t.groups = groups, t.outputs = outputs, t.row = row;
  return t;
}

void conv2d_relu(ConvTask t, const Buffer& x, const Buffer& weight, const Buffer* bias, const Buffer& y) {
  t.x = x.data(), t.weight = weight.data(), t.bias = data(bias), t.out = y.data();
  fastcnn::cuda::conv2d_relu(t, nullptr);
}

AugmentTask augment_task(int dtype, const Ints& shape, std::pair<int64_t, int64_t> crop, bool channels_last,
                         std::array<double, 3> scale) {
  AugmentTask t{};
  t.dtype = static_cast<DType>(dtype), t.N = shape[0], t.H = shape[1], t.W = shape[2];
  t.crop_h = crop.first, t.crop_w = crop.second, t.channels_last = channels_last;
  std::copy(scale.begin(), scale.end(), t.scale);
  return t;
}

void augment(AugmentTask t, const Buffer& x, const Buffer& offsets, const Buffer& mirror, const Buffer& mean,
             const Buffer* sizes, const Buffer& y) {
  t.x = x.data(), t.mean = mean.data(), t.out = y.data();
  t.offsets = static_cast<const int64_t*>(data(&offsets)), t.sizes = static_cast<const int64_t*>(data(sizes));
  t.mirror = static_cast<const bool*>(data(&mirror));
  fastcnn::cuda::augment(t, nullptr);
}

}  // namespace

PYBIND11_MODULE(FASTCNN_MODULE, m) {
  py::class_<Buffer>(m, "Buffer")
      .def(py::init<const std::string&, int64_t>(), py::arg("bytes"), py::arg("offset") = 0)
      .def(py::init<int64_t, int64_t>(), py::arg("size"), py::arg("offset") = 0)
      .def("bytes", [](const Buffer& b) { return py::bytes(reinterpret_cast<char*>(b.data()), b.size); });
  py::class_<TailTask>(m, "Task").def(py::init(&fastcnn::cuda::make_task));
  py::class_<BatchNormTask>(m, "BatchNormTask").def(py::init(&fastcnn::cuda::make_batch_norm_task));
  py::class_<ConvTask>(m, "ConvTask").def(py::init(&conv_task));
  py::class_<AugmentTask>(m, "AugmentTask").def(py::init(&augment_task));
  m.def("batch_norm_statistics", &batch_norm_statistics);
  m.def("batch_norm_relu_max_pool2d", &batch_norm_relu_max_pool2d);
  m.def("batch_norm_relu_max_pool2d_backward", &batch_norm_relu_max_pool2d_backward);
  m.def("conv2d_relu", &conv2d_relu);
  m.def("augment", &augment);
#define FASTCNN_DEFINE(op)                 \
  m.def(#op, &forward<fastcnn::cuda::op>); \
  m.def(#op "_backward", &backward<fastcnn::cuda::op##_backward>);
  FASTCNN_TAIL_OPERATORS(FASTCNN_DEFINE)
  m.def("planted", [](const std::string& name, const Buffer& x, const Buffer& y) {
    planted(name, reinterpret_cast<float*>(x.data()), reinterpret_cast<float*>(y.data()),
            static_cast<int>(x.size / sizeof(float)));
  });
}
