// The memory a thread's range of units works in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

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

}  // namespace fastcnn
