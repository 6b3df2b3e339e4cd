// What a GPU does per clock: how many lanes of one kind of instruction a multiprocessor finishes, and how long a load
// from global memory takes on an idle and on a busy device. Launched like the kernels of csrc/cuda.
#include "../../csrc/cuda/simt.cuh"

namespace fastcnn::cuda {
namespace {

constexpr int kBlock = 1024, kChains = 8, kUnrolled = 32;
constexpr size_t kShared = 64 << 10;  // more than the 48 KiB that need no permission

struct Calibration {
  int iterations;
  const uint4* data;  // of the loads
  int64_t vectors;    // of 16 bytes, in data: a power of two
  long long* cycles;  // one per block
  unsigned* sink;     // nothing is ever written to it
};

enum class Kind { ffma, imad, fmnmx, fsetp_sel, prmt, hmnmx2_bf16, vhmnmx_bf16, mufu, lds };

// One step of a chain: v depends on the v before, and no compiler can tell what it will be.
template <Kind kind>
__device__ __forceinline__ void step(unsigned& v, unsigned a, unsigned b) {
  if constexpr (kind == Kind::ffma) asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+r"(v) : "r"(a), "r"(b));
  if constexpr (kind == Kind::imad) asm volatile("mad.lo.s32 %0, %0, %1, %2;" : "+r"(v) : "r"(a), "r"(b));
  if constexpr (kind == Kind::fmnmx) asm volatile("max.f32 %0, %0, %1;" : "+r"(v) : "r"(a));
  if constexpr (kind == Kind::fsetp_sel) {
    asm volatile("{.reg .pred p; setp.gt.f32 p, %0, %1; selp.b32 %0, %2, %0, p;}" : "+r"(v) : "r"(a), "r"(b));
  }
  if constexpr (kind == Kind::prmt) asm volatile("prmt.b32 %0, %0, %1, %2;" : "+r"(v) : "r"(a), "r"(b));
  if constexpr (kind == Kind::hmnmx2_bf16) {  // two maxima in a row would become one instruction of three operands
    asm volatile("max.NaN.bf16x2 %0, %0, %1; min.NaN.bf16x2 %0, %0, %2;" : "+r"(v) : "r"(a), "r"(b));
  }
  if constexpr (kind == Kind::vhmnmx_bf16) asm volatile("max.NaN.bf16x2 %0, %0, %1;" : "+r"(v) : "r"(a));
  if constexpr (kind == Kind::mufu) asm volatile("rsqrt.approx.ftz.f32 %0, %0;" : "+r"(v));
  if constexpr (kind == Kind::lds) asm volatile("ld.volatile.shared.u32 %0, [%0];" : "+r"(v));
}

template <Kind kind>
__global__ void __launch_bounds__(kBlock, 2) issue(const Calibration c) {
  unsigned* const words = dynamic_shared<unsigned>();
  unsigned v[kChains];
  for (int i = 0; i < kChains; ++i) {
    const int word =
        i * kBlock + threadIdx.x;  // each lane has a bank of its own, and words that hold their own address
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(words + word));
    if constexpr (kind == Kind::lds) words[word] = address;
    v[i] = kind == Kind::lds ? address : __float_as_uint(1.0f + threadIdx.x + i);
  }
  const unsigned a = __float_as_uint(0.5f + blockIdx.x), b = __float_as_uint(1.5f + threadIdx.x);
  __syncthreads();
  const long long start = clock64();
#pragma unroll 1
  for (int n = 0; n < c.iterations; ++n) {
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
#pragma unroll
      for (int i = 0; i < kChains; ++i) step<kind>(v[i], a, b);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) c.cycles[blockIdx.x] = clock64() - start;
  unsigned all = 0;
  for (int i = 0; i < kChains; ++i) all ^= v[i];
  if (c.iterations < 0) *c.sink = all;
}

// All warps stream through data, but the first of each block, which times one load after the other.
__global__ void __launch_bounds__(kBlock, 2) loads(const Calibration c) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x, first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  unsigned all = 0;
  long long cycles = 0;
  if (threadIdx.x < 32) {
    int64_t at = first;
    for (int n = 0; n < c.iterations; ++n, at += 4 * stride) {
      const long long start = clock64();
      unsigned x, y, z, w;
      asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
                   : "l"(c.data + (at & (c.vectors - 1)))
                   : "memory");
      all ^= x ^ y ^ z ^ w;
      asm volatile("" ::"r"(all) : "memory");  // not before the load has arrived
      cycles += clock64() - start + (all & 0);
    }
    if (threadIdx.x == 0) c.cycles[blockIdx.x] = cycles;
  } else {
    for (int64_t n = 0, at = first; n < c.iterations; ++n, at += 4 * stride) {
      uint4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x[i].x), "=r"(x[i].y), "=r"(x[i].z), "=r"(x[i].w)
                     : "l"(c.data + ((at + i * stride) & (c.vectors - 1))));
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) all ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
    }
  }
  if (c.iterations < 0) *c.sink = all;
}

template <Kind kind>
void launch_issue(const char* name, int blocks, Stream stream, const Calibration& c) {
  launch<&issue<kind>>(name, dim3(blocks), dim3(kBlock), kShared, stream, c);
}

}  // namespace
}  // namespace fastcnn::cuda

// Starts the kernel of this name; the message of an error, or null.
extern "C" __attribute__((visibility("default"))) const char* calibrate(const char* name, int blocks, int threads,
                                                                        int iterations, const void* data,
                                                                        int64_t vectors, void* cycles, void* sink,
                                                                        void* stream) noexcept {
  using namespace fastcnn::cuda;
  static std::string message;
  const Calibration c{iterations, static_cast<const uint4*>(data), vectors, static_cast<long long*>(cycles),
                      static_cast<unsigned*>(sink)};
  const std::map<std::string, void (*)(const char*, int, Stream, const Calibration&)> kernels = {
      {"FFMA", launch_issue<Kind::ffma>},
      {"IMAD", launch_issue<Kind::imad>},
      {"FMNMX", launch_issue<Kind::fmnmx>},
      {"FSETP+SEL", launch_issue<Kind::fsetp_sel>},
      {"PRMT", launch_issue<Kind::prmt>},
      {"HMNMX2.BF16", launch_issue<Kind::hmnmx2_bf16>},
      {"VHMNMX.BF16", launch_issue<Kind::vhmnmx_bf16>},
      {"MUFU", launch_issue<Kind::mufu>},
      {"LDS", launch_issue<Kind::lds>},
  };
  try {
    if (std::string(name) == "loads") launch<&loads>(name, dim3(blocks), dim3(threads), 0, stream, c);
    else kernels.at(name)(name, blocks, stream, c);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
