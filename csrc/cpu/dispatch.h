// From the dtype of a task to the type that a kernel is compiled for.
#pragma once

#include "../tensor.h"
#include "scratch.h"
#include "vec.h"

namespace fastcnn::FASTCNN_CAPABILITY {
// Unnamed, or g++ takes run<Forward> of two files for one function, though each has a Forward of its own.
namespace {

// f gets a value of the type.
template <typename F>
void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::float16: return f(Half{});
    case DType::bfloat16: return f(BFloat16{});
    case DType::float32: return f(0.0f);
    case DType::float64: return f(0.0);
  }
}

// What Kernel asks of a kernel that is a class: Units<T> takes its scratch memory when it is made, and does unit(u).
template <template <typename> class Units, typename Task>
int64_t scratch_bytes(const Task& task) {
  Scratch scratch(nullptr);
  with_dtype(task.dtype, [&](auto t) { Units<decltype(t)>(task, scratch); });
  return scratch.used();
}

template <template <typename> class Units, typename Task>
void run(const Task& task, int64_t begin, int64_t end, void* block) {
  with_dtype(task.dtype, [&](auto t) {
    Scratch scratch(block);
    Units<decltype(t)> units(task, scratch);
    for (int64_t u = begin; u < end; ++u) units.unit(u);
  });
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY
