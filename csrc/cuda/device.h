// Device and driver, as the library and the Python module ask for them.
#pragma once

#include <string>
#include <vector>

namespace fastcnn::cuda {

using Stream = void*;  // a cudaStream_t

// Make this device the current one of the CUDA runtime that the kernels are launched by.
void use_device(int index);

// As 1000 * major + 10 * minor; 0 where there is no driver.
int driver_version();
int runtime_version();

struct KernelAttributes {
  std::string name;
  int registers, static_shared_bytes, local_bytes, threads, blocks_per_multiprocessor;
  double occupancy;  // of a multiprocessor's threads, without dynamic shared memory
};

// Of every kernel, on the current device.
std::vector<KernelAttributes> kernel_attributes();

}  // namespace fastcnn::cuda
