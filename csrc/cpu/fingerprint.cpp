// A hash of memory, by which it is noticed that a weight changed. Memory: it is read once.
#include "fingerprint.h"

#include <algorithm>
#include <cstring>

#include "kernel.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

constexpr int64_t kBytes = 1 << 16;

int64_t units(const FingerprintTask& task) { return std::max<int64_t>(1, (task.bytes + kBytes - 1) / kBytes); }

// Each step is a bijection of the hash and of the word, so that no change of a single word goes unseen.
void run(const FingerprintTask& task, int64_t begin, int64_t end, void*) {
  constexpr int kWords = 32;  // hashed side by side
  constexpr uint64_t kFactor = 0x9e3779b97f4a7c15;
  const auto mix = [](uint64_t& hash, uint64_t word) {
    hash = (hash ^ word) * kFactor;
    hash ^= hash >> 32;
  };
  for (int64_t unit = begin; unit < end; ++unit) {
    const char* p = static_cast<const char*>(task.x) + unit * kBytes;
    int64_t left = std::min(kBytes, task.bytes - unit * kBytes);
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

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(fingerprint, FingerprintTask, units, nullptr, run)
