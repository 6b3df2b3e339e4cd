// What conv2d_relu adds to oneDNN's convolution: the bit mask of a ReLU, and its use; and a hash of frozen weights.
// Convolutions with 3x3 windows are in winograd.cpp.
// Memory: the mask is one bit an element; backward reads it and dy and writes dx.
#include "bits.h"
#include "dispatch.h"
#include "kernels.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

// f(first, n, word) for every 32 elements, the last of which may be fewer.
template <typename F>
void for_each_word(const MaskTask& task, int64_t begin, int64_t end, F f) {
  const int64_t last = std::min(end * MaskTask::kElements, task.count);
  for (int64_t i = begin * MaskTask::kElements; i < last; i += 32) f(i, std::min<int64_t>(32, last - i));
}

template <typename T>
FASTCNN_INLINE Vec<Compute<T>> load_some(const T* p, int64_t n) {
  return n >= kLanes<Compute<T>> ? load(p) : load_first(p, std::max<int64_t>(n, 0));
}

}  // namespace

void relu_mask(const MaskTask& task, int64_t begin, int64_t end, void*) {
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

void relu_mask_backward(const MaskTask& task, int64_t begin, int64_t end, void*) {
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
        if (n - i >= kLanes<A>) store(dx + first + i, v);
        else store_first(dx + first + i, v, n - i);
      }
    });
  });
}

// Each step is a bijection of the hash and of the word, so that no change of a single word goes unseen.
void fingerprint(const FingerprintTask& task, int64_t begin, int64_t end, void*) {
  constexpr int kWords = 32;  // hashed side by side
  constexpr uint64_t kFactor = 0x9e3779b97f4a7c15;
  const auto mix = [](uint64_t& hash, uint64_t word) {
    hash = (hash ^ word) * kFactor;
    hash ^= hash >> 32;
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    const char* p = static_cast<const char*>(task.x) + unit * FingerprintTask::kBytes;
    int64_t left = std::min(FingerprintTask::kBytes, task.bytes - unit * FingerprintTask::kBytes);
    uint64_t hashes[kWords] = {}, words[kWords];
    for (; left > 0; left -= sizeof words, p += sizeof words) {
      if (left < static_cast<int64_t>(sizeof words)) std::memset(words, 0, sizeof words);
      std::memcpy(words, p, std::min<int64_t>(left, sizeof words));
      for (int i = 0; i < kWords; ++i) mix(hashes[i], words[i]);
    }
    uint64_t hash = 0;
    for (const uint64_t h : hashes) mix(hash, h);
    task.out[unit] = hash;
  }
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
