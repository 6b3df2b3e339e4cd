// How the ops of this library run a task: on the tensor's device, in torch's current stream, with memory from torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../arguments.h"
#include "operators.h"

namespace fastcnn::cuda {

// Makes the tensor's device the current one, of torch and of our own CUDA runtime, and finds torch's current stream
// there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    use_device(t.get_device_index());
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }
  Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
};

using Op = void (*)(const TailTask&, Stream);

template <Op op>
void run(TailTask& task, const Tensor& out) {
  const OnDevice on(out);
  std::optional<Tensor> partials, terms;
  const auto allocate = [&](std::optional<Tensor>& t, int64_t elements) {
    using torch::headeronly::ScalarType;
    const auto dtype = task.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
    t = torch::stable::new_empty(out, {elements}, dtype);
    return t->mutable_data_ptr();
  };
  if (task.dbias) task.partials = allocate(partials, bias_partials(task) * task.shape.C);
  if (task.dy && lrn_terms(task)) task.terms = allocate(terms, lrn_terms(task));
  op(task, on.stream());
}

}  // namespace fastcnn::cuda
