// Memory the kernels work in: a thread's scratch, and large fresh outputs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastcnn {

class ScratchBlock {
 public:
  explicit ScratchBlock(int64_t bytes) : block_(std::aligned_alloc(64, (bytes + 64) / 64 * 64)) {
    if (!block_) throw std::bad_alloc();
  }
  ScratchBlock(const ScratchBlock&) = delete;
  ScratchBlock& operator=(const ScratchBlock&) = delete;
  ~ScratchBlock() { std::free(block_); }
  void* get() const { return block_; }

 private:
  void* block_;
};

// The output's memory. Where it is large it is also fresh from the system, one page fault for each 4 KiB written: asking
// for huge pages makes those five hundred times fewer. Only a hint; errors do not matter.
inline void* prepare_output(const torch::stable::Tensor& out) {
  void* data = out.mutable_data_ptr();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + out.numel() * out.element_size()) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace fastcnn
