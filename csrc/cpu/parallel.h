// Runs a kernel, in the compilation of the capability in use, on torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../capability.h"
#include "kernel.h"

namespace fastcnn {

template <typename Name, typename Task>
const Kernel<Task>& kernel() {
  switch (capability()) {
#if defined(__x86_64__)
    case Capability::avx512: return Dispatch<Name, Task>::avx512;
    case Capability::avx2: return Dispatch<Name, Task>::avx2;
#endif
    default: return Dispatch<Name, Task>::baseline;
  }
}

inline auto allocate_scratch(int64_t bytes) {
  std::unique_ptr<void, decltype(&std::free)> block(std::aligned_alloc(64, (bytes + 64) / 64 * 64), &std::free);
  if (!block) throw std::bad_alloc();
  return block;
}

// An output that is mapped before it is written. Without `images` each unit writes its own piece of it; otherwise only
// the units of an image together do.
struct Output {
  Output() = default;
  explicit Output(const torch::stable::Tensor& t, int64_t images = 0)
      : data(static_cast<char*>(t.mutable_data_ptr())), bytes(t.numel() * t.element_size()), images(images) {}
  char* data = nullptr;
  int64_t bytes = 0, images = 0;
};

// Pre-fault these pages, which are about to be written. Large new tensors are not mapped yet, and one request is
// cheaper than a fault for each page: twice as fast where a kernel hops from channel to channel. Only a hint, which
// costs next to nothing where they are mapped: one page in the middle tells.
inline void map_for_writing([[maybe_unused]] char* begin, [[maybe_unused]] char* end) {
#if defined(MADV_POPULATE_WRITE)
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  const auto page_of = [](char* p) { return reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(p) / page * page); };
  unsigned char mapped = 0;
  if (begin >= end || (mincore(page_of(begin + (end - begin) / 2), 1, &mapped) == 0 && (mapped & 1))) return;
  madvise(page_of(begin), end - page_of(begin), MADV_POPULATE_WRITE);
#endif
}

// Share a kernel's units, which have this many elements in all, out among torch's threads. A thread does its units in
// pieces whose output stays in cache between being mapped and being written.
template <typename Name, typename Task>
void parallel(const Task& task, int64_t elements, const Output& out = {}) {
  constexpr int64_t kGrain = 32768;    // elements worth a thread, as in torch
  constexpr int64_t kPiece = 1 << 20;  // bytes
  const Kernel<Task>& k = kernel<Name, Task>();
  const int64_t units = elements ? k.units(task) : 0;
  if (!units) return;
  const int64_t scratch_bytes = k.scratch_bytes ? k.scratch_bytes(task) : 0;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements / units));
  const int64_t images = out.images ? out.images : units, pieces = std::max<int64_t>(1, out.bytes / kPiece);
  const int64_t step = std::max<int64_t>(1, images / pieces) * (units / images);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    const auto scratch = allocate_scratch(scratch_bytes);
    if (pieces == 1) return k.run(task, begin, end, scratch.get());
    const double unit_bytes = static_cast<double>(out.bytes) / units;
    for (int64_t next; begin < end; begin = next) {
      next = std::min((begin / step + 1) * step, end);
      const auto at = [&](int64_t unit) { return out.data + static_cast<int64_t>(unit * unit_bytes); };
      map_for_writing(at(begin), at(next));
      k.run(task, begin, next, scratch.get());
    }
  });
}

}  // namespace fastcnn
