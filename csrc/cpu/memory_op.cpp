#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "../arguments.h"
#include "memory.h"

namespace fastcnn {
namespace {

// Cached bytes are limited so that cached + in use <= peak in use, or to kAlwaysCached if that is more; and they never
// exceed kMostCached.
constexpr int64_t kAlwaysCached = int64_t{32} << 20, kMostCached = int64_t{512} << 20;

struct Block {
  void* begin = nullptr;
  int64_t bytes = 0;
};

class CachingAllocator {
 public:
  // A block of this many bytes, at most twice as many, or an empty one where the system has none left. A larger one is
  // taken if mapping a new one would evict it and the peak does not rise. One saved for backward, while others are
  // computed, wastes less: it is at most a quarter larger.
  Block take(int64_t bytes, bool saved) {
    const std::lock_guard lock(mutex_);
    auto best = cached_.end();
    const bool is_full = cached_bytes_ > std::max(kAlwaysCached, peak_bytes_ - used_bytes_ - bytes);
    for (auto it = cached_.begin(); it != cached_.end(); ++it) {
      const bool is_close = it->bytes - bytes <= (saved ? bytes / 4 : bytes);
      const bool fits = is_close || (!saved && is_full && used_bytes_ + it->bytes <= peak_bytes_);
      if (it->bytes >= bytes && fits && (best == cached_.end() || it->bytes <= best->bytes)) best = it;
    }
    if (best != cached_.end()) {
      use(best->bytes);
      return remove(best);
    }
    use(bytes);
    cache_at_most(std::max(kAlwaysCached, peak_bytes_ - used_bytes_));
    void* const begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED) {
      used_bytes_ -= bytes;
      return {};
    }
#if defined(MADV_HUGEPAGE)
    madvise(begin, bytes, MADV_HUGEPAGE);  // one page fault for 2 MB instead of 512, and fewer misses of the TLB
#endif
    return {begin, bytes};
  }

  void give_back(Block block) {
    const std::lock_guard lock(mutex_);
    used_bytes_ -= block.bytes;
    cached_bytes_ += block.bytes;
    cached_.push_back(block);
    cache_at_most(kMostCached);
  }

  void release() {
    const std::lock_guard lock(mutex_);
    cache_at_most(0);
    peak_bytes_ = used_bytes_;
  }

 private:
  Block remove(std::vector<Block>::iterator it) {
    const Block block = *it;
    cached_.erase(it);
    cached_bytes_ -= block.bytes;
    return block;
  }

  void use(int64_t bytes) {
    used_bytes_ += bytes;
    peak_bytes_ = std::max(peak_bytes_, used_bytes_);
  }

  void cache_at_most(int64_t bytes) {
    while (cached_bytes_ > bytes) {
      const Block oldest = remove(cached_.begin());
      munmap(oldest.begin, oldest.bytes);
    }
  }

  std::mutex mutex_;
  std::vector<Block> cached_;  // oldest first
  int64_t cached_bytes_ = 0, used_bytes_ = 0, peak_bytes_ = 0;
};

// Never destroyed: tensors may outlive every static.
CachingAllocator& allocator() {
  static CachingAllocator* const allocator = new CachingAllocator;
  return *allocator;
}

// An uninitialized tensor of this one's form; `lasting`: it will be saved for backward.
Tensor kept_like(Tensor x, bool lasting) {
  const int64_t bytes = x.numel() * x.element_size();
  const Block block = allocator().take(bytes, lasting);
  STD_TORCH_CHECK(block.begin, "out of memory: a tensor of ", bytes, " bytes");
  return torch::stable::from_blob(block.begin, x.sizes(), x.strides(), x.device(), x.scalar_type(),
                                  [block](void*) { allocator().give_back(block); });
}

FASTCNN_OP(fastcnn_cpu, CPU, kept_like, "(Tensor input, bool lasting) -> Tensor", kept_like)

}  // namespace

void release_memory() { allocator().release(); }

}  // namespace fastcnn
