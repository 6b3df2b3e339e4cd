// Kernels with known bugs, which the emulator must find, each beside what it should have been; and one kernel for each
// built-in that the operators may use.
#include "../../csrc/cuda/simt.cuh"
#include "planted.h"

namespace {

using fastcnn::cuda::dynamic_shared;

struct Arguments {
  float *x, *y;
  int n;
};

template <bool out_of_bounds>
__global__ void scale(const Arguments a) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < a.n + out_of_bounds) a.y[i] = 2 * a.x[i];
}

template <bool missing, bool dynamic>
__global__ void reverse_block(const Arguments a) {
  __shared__ float fixed[64];
  float* shared = dynamic ? dynamic_shared<float>() : fixed;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < a.n) shared[threadIdx.x] = a.x[i];
  if (!missing) __syncthreads();
  if (i < a.n) a.y[i] = shared[blockDim.x - 1 - threadIdx.x];
}

template <bool divergent>
__global__ void sum_block(const Arguments a) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = a.x[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned step = blockDim.x / 2; step > 0; step /= 2) {
    if (divergent && threadIdx.x >= step) return;
    __syncthreads();
    if (threadIdx.x < step) shared[threadIdx.x] += shared[threadIdx.x + step];
  }
  if (threadIdx.x == 0) a.y[blockIdx.x] = shared[0];
}

// Half of the threads wait at one barrier, half at another.
__global__ void two_barriers(const Arguments a) {
  if (threadIdx.x % 2) __syncthreads();
  else __syncthreads();
  a.y[threadIdx.x] = a.x[threadIdx.x];
}

__global__ void shared_overrun(const Arguments a) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x + 1] = a.x[threadIdx.x];
  __syncthreads();
  a.y[threadIdx.x] = shared[threadIdx.x + 1];
}

__global__ void misaligned(const Arguments a) { *reinterpret_cast<float4*>(a.y) = *reinterpret_cast<float4*>(a.x + 1); }

template <bool missing>
__global__ void exchange_in_warp(const Arguments a) {
  float* shared = dynamic_shared<float>();
  shared[threadIdx.x] = a.x[threadIdx.x];
  if (!missing) __syncwarp();
  a.y[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void shuffle_without_partner(const Arguments a) {
  if (threadIdx.x % 32 < 31) a.y[threadIdx.x] = __shfl_xor_sync(~0u, a.x[threadIdx.x], 1);
}

// y = sums over warps, with every kind of shuffle and vote taking part.
__global__ void warp_functions(const Arguments a) {
  const int lane = threadIdx.x % 32;
  float sum = a.x[threadIdx.x];
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  const float left = __shfl_up_sync(~0u, a.x[threadIdx.x], 1), right = __shfl_down_sync(~0u, a.x[threadIdx.x], 1);
  const float first = __shfl_sync(~0u, a.x[threadIdx.x], 0, 8);
  const unsigned even = __ballot_sync(~0u, lane % 2 == 0);
  bool right_answer = even == 0x55555555u && __any_sync(~0u, lane == 3) && !__all_sync(~0u, lane == 3);
  right_answer &= left == a.x[threadIdx.x - (lane > 0)] && right == a.x[threadIdx.x + (lane < 31)];
  right_answer &= first == a.x[threadIdx.x / 8 * 8];
  if (lane < 16) right_answer &= __shfl_xor_sync(0xffffu, lane, 1) == (lane ^ 1);  // half a warp takes one step more
  right_answer &= __shfl_xor_sync(~0u, lane, 1) == (lane ^ 1);
  a.y[threadIdx.x] = right_answer ? sum : NAN;
}

// y = x + 1, of one element by each block of a folded grid with two in x.
__global__ void count_blocks(const Arguments a) {
  const int i = 2 * fastcnn::cuda::block_y() + blockIdx.x;
  if (i < a.n) a.y[i] = a.x[i] + 1;
}

}  // namespace

void planted(const std::string& name, float* x, float* y, int n) {
  using namespace fastcnn::cuda;
  const Arguments a{x, y, n};
  const dim3 grid((n + 63) / 64), block(64);
  const size_t shared = 64 * sizeof(float);
  if (name == "scale") launch<&scale<false>>("scale", grid, block, 0, nullptr, a);
  else if (name == "out_of_bounds") launch<&scale<true>>("scale", grid, block, 0, nullptr, a);
  else if (name == "reverse") launch<&reverse_block<false, true>>("reverse", grid, block, shared, nullptr, a);
  else if (name == "reverse_static") launch<&reverse_block<false, false>>("reverse", grid, block, 0, nullptr, a);
  else if (name == "missing_barrier") launch<&reverse_block<true, true>>("reverse", grid, block, shared, nullptr, a);
  else if (name == "missing_barrier_static") launch<&reverse_block<true, false>>("reverse", grid, block, 0, nullptr, a);
  else if (name == "sum") launch<&sum_block<false>>("sum", grid, block, shared, nullptr, a);
  else if (name == "divergent_barrier") launch<&sum_block<true>>("sum", grid, block, shared, nullptr, a);
  else if (name == "two_barriers") launch<&two_barriers>("two_barriers", grid, block, 0, nullptr, a);
  else if (name == "shared_overrun") launch<&shared_overrun>("shared_overrun", grid, block, shared, nullptr, a);
  else if (name == "misaligned") launch<&misaligned>("misaligned", dim3(1), dim3(1), 0, nullptr, a);
  else if (name == "warp_exchange") launch<&exchange_in_warp<false>>("exchange", dim3(1), block, shared, nullptr, a);
  else if (name == "missing_syncwarp") launch<&exchange_in_warp<true>>("exchange", dim3(1), block, shared, nullptr, a);
  else if (name == "divergent_shuffle") launch<&shuffle_without_partner>("shuffle", dim3(1), block, 0, nullptr, a);
  else if (name == "warp_functions") launch<&warp_functions>("warp", dim3(1), block, 0, nullptr, a);
  else if (name == "grid_too_high") launch<&scale<false>>("scale", dim3(1, kMostInY + 1), block, 0, nullptr, a);
  else if (name == "grid_too_deep") launch<&scale<false>>("scale", dim3(1, 1, 65536), block, 0, nullptr, a);
  else if (name == "block_too_big") launch<&scale<false>>("scale", grid, dim3(512, 3), 0, nullptr, a);
  else if (name == "block_too_deep") launch<&scale<false>>("scale", grid, dim3(1, 1, 65), 0, nullptr, a);
  else if (name == "too_much_shared") launch<&scale<false>>("scale", grid, block, (227 << 10) + 1, nullptr, a);
  else if (name == "empty_grid") launch<&scale<false>>("scale", dim3(0), block, 0, nullptr, a);
  else if (name == "folded") launch<&count_blocks>("count", folded_grid(2, n / 2), dim3(1), 0, nullptr, a);
  else throw std::invalid_argument(name);
}
