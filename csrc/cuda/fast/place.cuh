// Which channels and which pixels a thread has, and how the threads of a block add up the bias gradient.
#pragma once

#include "span.cuh"

namespace fastcnn::cuda::fast {

inline constexpr int kNarrow = kThreads / 2;  // threads of a block, three of which leave each 168 registers
// Threads that a multiprocessor has registers for, in blocks of kThreads and of kNarrow.
inline constexpr int kResident = 2 * kThreads, kResidentNarrow = 3 * kNarrow;

// Which channels and which unit a thread has.
template <bool channels_last>
struct Place {
  int run, unit;
  bool exists;
  Neighbours neighbours;

  FASTCNN_DEVICE explicit Place(const Arguments& a) {
    run = channels_last ? block_y() * a.runs_per_block + threadIdx.x : block_y();
    unit = blockIdx.x * a.pixels_per_block + (channels_last ? threadIdx.y : threadIdx.x);
    exists = run < a.runs && unit < a.units;
    neighbours = Neighbours(a, run);
  }
};

// Where in a tensor the first of a run's channels of a pixel is.
template <bool channels_last, int length>
FASTCNN_DEVICE int64_t offset_of(const Arguments& a, int pixels, int unit, int run) {
  if (channels_last) return static_cast<int64_t>(unit) * a.C + run * length;
  const int n = a.by_pixels.divide(unit);
  return (static_cast<int64_t>(n) * a.C + run * length) * pixels + (unit - n * pixels);
}

// The sums of dx of the block's threads, for the bias gradient, in a fixed order.
template <bool channels_last, int length>
FASTCNN_DEVICE void store_sums(const Arguments& a, int run, float (&sums)[length]) {
  float* const shared = dynamic_shared<float>();
  float* const partials = static_cast<float*>(a.partials) + static_cast<int64_t>(blockIdx.x) * a.C;
  if constexpr (channels_last) {  // [channel of a run][pixel][run]
    const int runs = a.runs_per_block, threads = runs * a.pixels_per_block, thread = threadIdx.y * runs + threadIdx.x;
#pragma unroll
    for (int i = 0; i < length; ++i) shared[i * threads + thread] = sums[i];
    __syncthreads();
    for (int c = thread; c < length * runs; c += threads) {
      const int i = c / runs, in_block = c - i * runs, of_all = block_y() * runs + in_block;
      if (of_all >= a.runs) continue;
      float sum = 0;
      for (int p = 0; p < a.pixels_per_block; ++p) sum += shared[i * threads + p * runs + in_block];
      partials[of_all * length + i] = sum;
    }
  } else {  // [warp][channel]
#pragma unroll
    for (int i = 0; i < length; ++i) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], step);
      if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32 * length + i] = sums[i];
    }
    __syncthreads();
    if (run < a.runs && threadIdx.x < length) {
      float sum = 0;
      for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += shared[warp * length + threadIdx.x];
      partials[run * length + threadIdx.x] = sum;
    }
  }
}

}  // namespace fastcnn::cuda::fast
