// Typed, aligned pieces cut from a thread's block of scratch memory.
#pragma once

#include <cstdint>

namespace fastcnn::FASTCNN_CAPABILITY {

class Scratch {
 public:
  explicit Scratch(void* block) : block_(static_cast<char*>(block)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(block_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }
  // Without a block there is no memory in the pieces: they are only counted.
  bool only_counts() const { return !block_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

}  // namespace fastcnn::FASTCNN_CAPABILITY
