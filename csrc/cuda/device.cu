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
    const int block = std::min(kThreads, f.maxThreadsPerBlock);  // what its launch bounds say, if that is less
    check(name.c_str(), cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, block, 0));
    list.push_back({name, f.numRegs, static_cast<int>(f.sharedSizeBytes), static_cast<int>(f.localSizeBytes), block,
                    blocks, static_cast<double>(blocks) * block / threads});
  }
  return list;
}

}  // namespace fastcnn::cuda
