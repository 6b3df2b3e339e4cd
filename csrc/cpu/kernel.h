// How a CPU kernel is found: its file is compiled once per capability, into a namespace of that name, and ends with
// FASTCNN_REGISTER_KERNEL, which defines the kernel of that capability. Nothing else lists it.
//
// A kernel's file includes no torch header and allocates nothing. Outside its namespace it may use only functions that
// are inlined: the linker keeps one copy of any other, which may be one that needs AVX-512.
#pragma once

#include <cstdint>

namespace fastcnn {

// A kernel does a range of its units, so that the caller can share them out among threads.
template <typename Task>
struct Kernel {
  int64_t (*units)(const Task&);
  int64_t (*scratch_bytes)(const Task&);  // of the memory that each range gets; may be null: none
  void (*run)(const Task&, int64_t begin, int64_t end, void* scratch);
};

// Name is a type that is only declared. It and Task are part of the kernel's symbol, so the linker notices where the
// kernel's file and its caller disagree.
template <typename Name, typename Task>
struct Dispatch {
  static const Kernel<Task> baseline;
#if defined(__x86_64__)
  static const Kernel<Task> avx2, avx512;
#endif
};

}  // namespace fastcnn

// The last line of a kernel's file: name, task, and what Kernel holds.
#define FASTCNN_REGISTER_KERNEL(name, Task, ...)                                                \
  namespace fastcnn {                                                                           \
  using namespace FASTCNN_CAPABILITY;                                                           \
  template <>                                                                                   \
  constinit const Kernel<Task> Dispatch<struct name, Task>::FASTCNN_CAPABILITY = {__VA_ARGS__}; \
  }
