// Which compilation of the CPU kernels runs: the best this machine can, unless FASTCNN_CPU_CAPABILITY names another.
#pragma once

#include <string>
#include <vector>

namespace fastcnn {

enum class Capability { baseline, avx2, avx512 };

Capability capability();
std::string capability_name();
void set_capability(const std::string& name);  // throws std::invalid_argument
// Names of those that were compiled and that this machine can run, best last.
std::vector<std::string> capabilities();

}  // namespace fastcnn
