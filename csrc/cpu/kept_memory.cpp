#include "kept_memory.h"

#include <sys/mman.h>

#include <mutex>
#include <vector>


namespace fastcnn {
namespace {

constexpr int64_t kMostKept = int64_t{512} << 20;

// The blocks that are kept, oldest first. Never destroyed: tensors may outlive every static.
struct Kept {
  std::mutex mutex;
  std::vector<Block> blocks;
  int64_t bytes = 0;

  Block remove(std::vector<Block>::iterator it) {
    const Block block = *it;
    bytes -= block.bytes;
    blocks.erase(it);
    return block;
  }
};

Kept& kept() {
  static Kept* const kept = new Kept;
  return *kept;
}

}  // namespace

Block take_memory(int64_t bytes) {
  {
    Kept& k = kept();
    const std::lock_guard lock(k.mutex);
    auto best = k.blocks.end();
    for (auto it = k.blocks.begin(); it != k.blocks.end(); ++it) {
      const bool fits = it->bytes >= bytes && it->bytes - bytes <= bytes / 8;
      if (fits && (best == k.blocks.end() || it->bytes <= best->bytes)) best = it;
    }
    if (best != k.blocks.end()) return k.remove(best);
  }
  void* const begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return begin == MAP_FAILED ? Block{} : Block{begin, bytes};
}

void keep_memory(Block block) {
  Kept& k = kept();
  const std::lock_guard lock(k.mutex);
  k.blocks.push_back(block);
  for (k.bytes += block.bytes; k.bytes > kMostKept;) {
    const Block oldest = k.remove(k.blocks.begin());
    munmap(oldest.begin, oldest.bytes);
  }
}

}  // namespace fastcnn

