// What conv2d_relu adds to oneDNN's convolution: the bit mask of a ReLU, and its use. Convolutions with 3x3 windows are
// in winograd.cpp. Memory: the mask has one bit per element; backward reads it and dy and writes dx.
#include "../conv2d_relu.h"

#include <algorithm>

#include "bits.h"
#include "dispatch.h"
#include "kernel.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

constexpr int64_t kElements = 4096;

int64_t units(const MaskTask& task) { return (task.count + kElements - 1) / kElements; }

// f(first, n, word) for every 32 elements, the last of which may be fewer.
template <typename F>
void for_each_word(const MaskTask& task, int64_t begin, int64_t end, F f) {
  const int64_t last = std::min(end * kElements, task.count);
  for (int64_t i = begin * kElements; i < last; i += 32) f(i, std::min<int64_t>(32, last - i));
}

void mask(const MaskTask& task, int64_t begin, int64_t end, void*) {
  with_dtype(task.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Compute<T>;
    const T* x = static_cast<const T*>(task.x);
    for_each_word(task, begin, end, [&](int64_t first, int64_t n) {
      uint32_t word = 0;
      for (int64_t i = 0; i < n; i += kLanes<A>) word |= passing<A>(load_some(x + first + i, n - i)) << i;
      std::memcpy(task.mask + first / 8, &word, (n + 7) / 8);
    });
  });
}

void mask_backward(const MaskTask& task, int64_t begin, int64_t end, void*) {
  with_dtype(task.dtype, [&](auto t) {
    using T = decltype(t);
    using A = Compute<T>;
    const T* dy = static_cast<const T*>(task.x);
    T* dx = static_cast<T*>(task.out);
    for_each_word(task, begin, end, [&](int64_t first, int64_t n) {
      uint32_t word = 0;
      std::memcpy(&word, task.mask + first / 8, (n + 7) / 8);
      for (int64_t i = 0; i < n; i += kLanes<A>) {
        const Vec<A> v = where_set<A>(word >> i, load_some(dy + first + i, n - i));
        store_some(dx + first + i, v, n - i);
      }
    });
  });
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(relu_mask, MaskTask, units, nullptr, mask)
FASTCNN_REGISTER_KERNEL(relu_mask_backward, MaskTask, units, nullptr, mask_backward)
