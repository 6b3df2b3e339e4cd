// The device, behind one door: everything that is not plain C++ on CUDA's built-ins. Kernels include this and no CUDA
// header, so that they also compile as C++, for tests/simt/emulator.h.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(FASTCNN_SIMT_EMULATOR)
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "kernels.h"

#define FASTCNN_DEVICE __device__ __forceinline__

namespace fastcnn::cuda {

// -- for the host -----------------------------------------------------------------------------------------------------

// What launch shapes are made from.
struct Device {
  int multiprocessors, threads_per_multiprocessor;
};

#if defined(FASTCNN_SIMT_EMULATOR)

inline constexpr int kThreads = 64;  // of a block: few, that small inputs have several
inline Device device() { return {2, 2 * kThreads}; }  // smaller than most inputs, that threads go round

template <auto kernel, typename Arguments>
void launch(const char*, dim3 grid, dim3 block, size_t shared_bytes, Stream, const Arguments& arguments) {
  simt::run(grid, block, shared_bytes, [&] { kernel(arguments); });
}

#else

inline constexpr int kThreads = 256;

inline void check(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string("fastcnn: CUDA kernel ") + what + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

inline Device device() {
  const auto attribute = [](cudaDeviceAttr which) {
    int index, value;
    check("launch", cudaGetDevice(&index));
    check("launch", cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  return {attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxThreadsPerMultiProcessor)};
}

// Every kernel that launch() is compiled for, with its name: for their attributes.
inline std::map<std::string, const void*>& known_kernels() {
  static std::map<std::string, const void*> kernels;
  return kernels;
}
template <auto kernel>
bool make_known() {
  const std::string function = __PRETTY_FUNCTION__;  // "... [with auto kernel = NAME]"
  const size_t name = function.find("kernel = ") + 9;
  const void* const address = reinterpret_cast<const void*>(kernel);
  return known_kernels().emplace(function.substr(name, function.size() - name - 1), address).second;
}
template <auto kernel>
inline const bool known = make_known<kernel>();

// Returns once the launch was checked; the kernel itself may still run.
template <auto kernel, typename Arguments>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Stream stream, const Arguments& arguments) {
  static_cast<void>(known<kernel>);
  void* list[] = {const_cast<Arguments*>(&arguments)};
  check(name, cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, list, shared_bytes,
                               static_cast<cudaStream_t>(stream)));
}

#endif

// -- for kernels ------------------------------------------------------------------------------------------------------

#if defined(FASTCNN_SIMT_EMULATOR)
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared());
}
inline float approximate_sqrt(float x) { return std::sqrt(x); }
#else
template <typename T>
FASTCNN_DEVICE T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char fastcnn_dynamic_shared[];
  return reinterpret_cast<T*>(fastcnn_dynamic_shared);
}
// Within one unit in the last place.
FASTCNN_DEVICE float approximate_sqrt(float x) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
#endif
FASTCNN_DEVICE double approximate_sqrt(double x) { return sqrt(x); }
FASTCNN_DEVICE float inverse_sqrt(float x) { return rsqrtf(x); }
FASTCNN_DEVICE double inverse_sqrt(double x) { return rsqrt(x); }
FASTCNN_DEVICE float power(float x, float y) { return powf(x, y); }
FASTCNN_DEVICE double power(double x, double y) { return pow(x, y); }

using Half = __half;
using BFloat16 = __nv_bfloat16;

FASTCNN_DEVICE float widen(Half x) { return __half2float(x); }
FASTCNN_DEVICE float widen(BFloat16 x) { return __bfloat162float(x); }
FASTCNN_DEVICE float widen(float x) { return x; }
FASTCNN_DEVICE double widen(double x) { return x; }

template <typename T, typename A>
FASTCNN_DEVICE T narrow(A x) {
  if constexpr (std::is_same_v<T, Half>) return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, BFloat16>) return __float2bfloat16_rn(x);
  else return static_cast<T>(x);
}

}  // namespace fastcnn::cuda
