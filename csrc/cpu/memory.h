// The memory a thread's range of units works in, and that which it writes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
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

// Have the system map these bytes, which are about to be written. Large new tensors are not mapped yet, and one request is
// cheaper than a fault for each page: twice as fast where a kernel hops from channel to channel. Only a hint, which costs
// next to nothing where they are mapped: one page in the middle tells.
inline void map_for_writing(char* begin, char* end) {
#if defined(MADV_POPULATE_WRITE)
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  const auto page_of = [](char* p) { return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(p) / page * page); };
  unsigned char mapped = 0;
  if (begin >= end || (mincore(page_of(begin + (end - begin) / 2), 1, &mapped) == 0 && (mapped & 1))) return;
  madvise(page_of(begin), end - page_of(begin), MADV_POPULATE_WRITE);
#else
  (void)begin, (void)end;
#endif
}

}  // namespace fastcnn
