#include "kept_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace fastcnn {
namespace {

// Together with what is in use no more is kept than was once in use, or, but for a lasting output, this little; and
// never more than that much.
constexpr int64_t kAlwaysKept = int64_t{32} << 20, kMostKept = int64_t{512} << 20;

// What is kept, oldest first, and how much is in use. Never destroyed: tensors may outlive every static.
struct Memory {
  std::mutex mutex;
  std::vector<Block> kept;
  int64_t kept_bytes = 0, used_bytes = 0, most_used_bytes = 0;

  Block take(std::vector<Block>::iterator it) {
    const Block block = *it;
    kept.erase(it);
    kept_bytes -= block.bytes;
    return block;
  }

  void use(int64_t bytes) {
    used_bytes += bytes;
    most_used_bytes = std::max(most_used_bytes, used_bytes);
  }

  void keep_at_most(int64_t bytes) {
    while (kept_bytes > bytes) {
      const Block oldest = take(kept.begin());
      munmap(oldest.begin, oldest.bytes);
    }
  }
};

Memory& memory() {
  static Memory* const memory = new Memory;
  return *memory;
}

}  // namespace

Block take_memory(int64_t bytes, bool lasting) {
  Memory& m = memory();
  const std::lock_guard lock(m.mutex);
  auto best = m.kept.end();
  for (auto it = m.kept.begin(); it != m.kept.end(); ++it) {
    const bool fits = it->bytes >= bytes && it->bytes - bytes <= (lasting ? bytes / 4 : bytes);
    if (fits && (best == m.kept.end() || it->bytes <= best->bytes)) best = it;
  }
  if (best != m.kept.end()) {
    m.use(best->bytes);
    return m.take(best);
  }
  m.use(bytes);
  m.keep_at_most(std::max(lasting ? 0 : kAlwaysKept, m.most_used_bytes - m.used_bytes));
  void* const begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (begin != MAP_FAILED) return {begin, bytes};
  m.used_bytes -= bytes;
  return {};
}

void keep_memory(Block block) {
  Memory& m = memory();
  const std::lock_guard lock(m.mutex);
  m.used_bytes -= block.bytes;
  m.kept_bytes += block.bytes;
  m.kept.push_back(block);
  m.keep_at_most(kMostKept);
}

void release_memory() {
  Memory& m = memory();
  const std::lock_guard lock(m.mutex);
  m.keep_at_most(0);
  m.most_used_bytes = m.used_bytes;
}

}  // namespace fastcnn
