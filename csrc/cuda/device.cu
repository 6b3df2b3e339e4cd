#include "device.h"

#include "simt.cuh"

namespace fastcnn::cuda {

void use_device(int index) {
  const RelaxedCapture relaxed("launch");  // the first call may load what is linked to this runtime
  check("launch", cudaSetDevice(index));
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() {
  int version = 0;
  check("runtime", cudaRuntimeGetVersion(&version));
  return version;
}

std::vector<KernelAttributes> kernel_attributes() {
  const int threads = device().threads_per_multiprocessor;
  std::vector<KernelAttributes> list;
  for (const auto& [name, kernel] : known_kernels()) {
    cudaFuncAttributes f;
    int blocks = 0;
    check(name.c_str(), cudaFuncGetAttributes(&f, kernel));
    check(name.c_str(), cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
    list.push_back({name, f.numRegs, static_cast<int>(f.sharedSizeBytes), static_cast<int>(f.localSizeBytes), kThreads,
                    blocks, static_cast<double>(blocks) * kThreads / threads});
  }
  return list;
}

}  // namespace fastcnn::cuda
