// A CUDA device on the CPU, as far as the kernels of csrc/cuda need one.
//
// Blocks run one after the other, the threads of a block as fibers that give way only where CUDA threads wait for each
// other. Global memory is what malloc gives, so that AddressSanitizer sees its bounds; shared memory is allocated anew
// for each block. For ThreadSanitizer fibers are threads that only barriers order: a race shows whatever order they ran
// in.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint3 {
  unsigned x, y, z;
};
template <typename T, int n>
struct VectorType;
#define FASTCNN_VECTOR_TYPES(name, T)                \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; }; \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };
FASTCNN_VECTOR_TYPES(float, float)
FASTCNN_VECTOR_TYPES(uint, unsigned)

// Rounded to nearest, ties to even, as on the device.
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
float __half2float(__half);
__half __float2half_rn(float);
float __bfloat162float(__nv_bfloat16);
__nv_bfloat16 __float2bfloat16_rn(float);

using std::max, std::min;
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }

namespace simt {

inline constexpr int kWarp = 32;
inline constexpr unsigned kMostInY = 3;  // blocks of a grid; a device has room for 65,535
using Location = std::source_location;

// Of the fiber that runs.
extern uint3 thread_index, block_index;
extern dim3 block_dim, grid_dim;

// Run `kernel` as each thread of the grid. Throws std::runtime_error for a launch that a device would refuse, and for a
// barrier that not all threads reach, after which the threads of that block are abandoned.
void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

void* dynamic_shared();

// Wait until all threads of the block, or all lanes of the mask, have arrived at this very place.
void sync_block(Location);
void sync_warp(unsigned mask, Location);

// What the other lanes hold: all of the mask store `size` bytes at `value`; afterwards lane(i) is what lane i stored,
// until the lane waits again.
void exchange(unsigned mask, const void* value, size_t size, Location);
const void* lane(int i);
int lane_id();

template <typename T>
T shuffle(unsigned mask, T value, int from, Location at) {
  exchange(mask, &value, sizeof value, at);
  T result = value;
  if (from >= 0 && from < kWarp && (mask >> from & 1)) std::memcpy(&result, lane(from), sizeof result);
  return result;
}

// Copies that have begun and are complete, as cp.async's, only when waited for.
void copy_async(void* to, const void* from, size_t bytes, size_t zeros);
void commit_copies();
void wait_for_copies(size_t groups_left);

}  // namespace simt

#define threadIdx simt::thread_index
#define blockIdx simt::block_index
#define blockDim simt::block_dim
#define gridDim simt::grid_dim

inline void __syncthreads(simt::Location at = simt::Location::current()) { simt::sync_block(at); }
inline void __syncwarp(unsigned mask = ~0u, simt::Location at = simt::Location::current()) {
  simt::sync_warp(mask, at);
}

template <typename T>
T __shfl_sync(unsigned mask, T v, int from, int width = 32, simt::Location at = simt::Location::current()) {
  const int lane = simt::lane_id();
  return simt::shuffle(mask, v, lane / width * width + from % width, at);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, simt::Location at = simt::Location::current()) {
  const int lane = simt::lane_id(), from = lane - static_cast<int>(by);
  return simt::shuffle(mask, v, from < lane / width * width ? lane : from, at);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, simt::Location at = simt::Location::current()) {
  const int lane = simt::lane_id(), from = lane + static_cast<int>(by);
  return simt::shuffle(mask, v, from >= (lane / width + 1) * width ? lane : from, at);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32, simt::Location at = simt::Location::current()) {
  const int lane = simt::lane_id(), from = lane ^ with;
  return simt::shuffle(mask, v, from >= (lane / width + 1) * width ? lane : from, at);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Location at = simt::Location::current()) {
  simt::exchange(mask, &predicate, sizeof predicate, at);
  unsigned votes = 0;
  for (int i = 0; i < simt::kWarp; ++i) {
    int vote;
    if (!(mask >> i & 1)) continue;
    std::memcpy(&vote, simt::lane(i), sizeof vote);
    votes |= static_cast<unsigned>(vote != 0) << i;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, simt::Location at = simt::Location::current()) {
  return __ballot_sync(mask, predicate, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Location at = simt::Location::current()) {
  return __ballot_sync(mask, predicate, at) == mask;
}
