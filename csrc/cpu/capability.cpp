#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastcnn {
namespace {

#define FASTCNN_KERNELS(capability, runs_here)                                                             \
  {#capability,                                                                                            \
   runs_here,                                                                                              \
   capability::lrn_units, capability::lrn_scratch_bytes, capability::lrn, capability::lrn_backward,        \
   capability::fingerprint,                                                                                \
   capability::winograd_scratch_bytes, capability::winograd, capability::winograd_weight,                  \
   capability::linear, capability::relu_mask, capability::relu_mask_backward,                              \
   capability::relu_lrn_max_pool2d_scratch_bytes, capability::relu_lrn_max_pool2d,                         \
   capability::relu_lrn_max_pool2d_backward}

// Best last.
const CPUKernels kCompiled[] = {
    FASTCNN_KERNELS(baseline, [] { return true; }),
#if defined(FASTCNN_X86)
    FASTCNN_KERNELS(avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }),
    FASTCNN_KERNELS(avx512,
                    [] {
                      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
                    }),
#endif
};

const CPUKernels& find(const std::string& name) {
  for (const CPUKernels& k : kCompiled) {
    if (name == k.name && k.runs_here()) return k;
  }
  std::string usable;
  for (const std::string& n : capabilities()) usable += (usable.empty() ? "" : ", ") + n;
  throw std::invalid_argument("CPU capability '" + name + "' is not available; allowed here are " + usable);
}

std::atomic<const CPUKernels*>& chosen() {
  static std::atomic<const CPUKernels*> kernels = [] {
    const char* wanted = std::getenv("FASTCNN_CPU_CAPABILITY");
    return &find(wanted && *wanted ? wanted : capabilities().back());
  }();
  return kernels;
}

}  // namespace

const CPUKernels& kernels() { return *chosen(); }

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const CPUKernels& k : kCompiled) {
    if (k.runs_here()) names.push_back(k.name);
  }
  return names;
}

std::string capability() { return kernels().name; }

void set_capability(const std::string& name) { chosen() = &find(name); }

}  // namespace fastcnn
