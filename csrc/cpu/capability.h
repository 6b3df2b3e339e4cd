// Which compilation of the CPU kernels runs: the best this machine can, unless FASTCNN_CPU_CAPABILITY names another.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace fastcnn {

struct CPUKernels {
  const char* name;
  bool (*runs_here)();
  decltype(&baseline::lrn_units) lrn_units;
  decltype(&baseline::lrn_scratch_bytes) lrn_scratch_bytes;
  decltype(&baseline::lrn) lrn, lrn_backward;
  decltype(&baseline::fingerprint) fingerprint;
  decltype(&baseline::winograd_scratch_bytes) winograd_scratch_bytes;
  decltype(&baseline::winograd) winograd;
  decltype(&baseline::winograd_weight) winograd_weight;
  decltype(&baseline::linear) linear;
  decltype(&baseline::relu_mask) relu_mask, relu_mask_backward;
  decltype(&baseline::relu_lrn_max_pool2d_scratch_bytes) relu_lrn_max_pool2d_scratch_bytes;
  decltype(&baseline::relu_lrn_max_pool2d) relu_lrn_max_pool2d, relu_lrn_max_pool2d_backward;
};

const CPUKernels& kernels();
std::vector<std::string> capabilities();
std::string capability();
void set_capability(const std::string& name);  // throws std::invalid_argument

}  // namespace fastcnn
