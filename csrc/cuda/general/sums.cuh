// Sums of each channel over all pixels, in two stages, each in the order of its threads: of every block a row of sums,
// and then of the rows. A sum is a number, or anything else with a +=.
#pragma once

#include "channels.cuh"

namespace fastcnn::cuda::general {

inline constexpr int kSumWaves = 1;             // few rows for the second stage
inline constexpr int kRowLanes = kThreads / 8;  // threads of a channel there

// The first stage: the row of the block, from sum(i) of each of its threads, for channel i of the thread's run.
template <bool channels_last, int length, typename Sum, typename F>
FASTCNN_DEVICE void add_up(const Arguments& a, Sum* rows, F sum) {
  Sum* shared = dynamic_shared<Sum>();  // [pixel][run][channel of the run]
  const int run = channels_last ? threadIdx.x : threadIdx.y, pixel = channels_last ? threadIdx.y : threadIdx.x;
  const int row = a.runs_per_block * length;
#pragma unroll
  for (int i = 0; i < length; ++i) shared[pixel * row + run * length + i] = sum(i);
  __syncthreads();
  const int threads = a.runs_per_block * a.pixels_per_block;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < row; i += threads) {
    const int index = block_y() * a.runs_per_block + i / length;
    if (index >= a.runs) break;
    const Run mine(a, index, length);
    if (i % length >= mine.count) continue;
    Sum total{};
    for (int p = 0; p < a.pixels_per_block; ++p) total += shared[p * row + i];
    rows[static_cast<int64_t>(blockIdx.x) * a.C + mine.c + i % length] = total;
  }
}

template <typename T, typename Sum>
size_t bytes_to_add_up() {
  return kThreads * kRun<T> * sizeof(Sum);
}

// The second: f(c, sum) for each channel c, whose rows are added up by a few threads, each every so many of them.
template <typename Sum, typename F>
FASTCNN_DEVICE void add_rows(const Sum* rows, int64_t count, int C, F f) {
  Sum* shared = dynamic_shared<Sum>();
  const int c = blockIdx.x * 32 + threadIdx.x;
  Sum sum{};
  for (int64_t row = threadIdx.y; c < C && row < count; row += kRowLanes) sum += rows[row * C + c];
  shared[threadIdx.y * 32 + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || c >= C) return;
  for (int lane = 1; lane < kRowLanes; ++lane) sum += shared[lane * 32 + threadIdx.x];
  f(c, sum);
}

template <auto kernel, typename Sum, typename Arguments>
void launch_add_rows(const char* name, int C, Stream stream, const Arguments& arguments) {
  const size_t shared = 32 * kRowLanes * sizeof(Sum);
  launch<kernel>(name, dim3((C + 31) / 32), dim3(32, kRowLanes), shared, stream, arguments);
}

}  // namespace fastcnn::cuda::general
