#include "capability.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace fastcnn {
namespace {

struct Compilation {
  Capability capability;
  const char* name;
  bool (*runs_here)();
};

// Best last.
const Compilation kCompiled[] = {
    {Capability::baseline, "baseline", [] { return true; }},
#if defined(__x86_64__)
    {Capability::avx2, "avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {Capability::avx512, "avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
#endif
};

const Compilation& find(const std::string& name) {
  for (const Compilation& c : kCompiled) {
    if (name == c.name && c.runs_here()) return c;
  }
  std::string usable;
  for (const std::string& n : capabilities()) usable += (usable.empty() ? "" : ", ") + n;
  throw std::invalid_argument("CPU capability '" + name + "' is not available; allowed here are " + usable);
}

std::atomic<const Compilation*>& chosen() {
  static std::atomic<const Compilation*> compilation = [] {
    const char* wanted = std::getenv("FASTCNN_CPU_CAPABILITY");
    return &find(wanted && *wanted ? wanted : capabilities().back());
  }();
  return compilation;
}

}  // namespace

Capability capability() { return chosen().load()->capability; }

std::string capability_name() { return chosen().load()->name; }

void set_capability(const std::string& name) { chosen() = &find(name); }

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const Compilation& c : kCompiled) {
    if (c.runs_here()) names.push_back(c.name);
  }
  return names;
}

}  // namespace fastcnn
