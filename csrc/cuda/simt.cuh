// The device, behind one door: everything that is not plain C++ on CUDA's built-ins. Kernels include this and no CUDA
// header, so that they also compile as C++, for tests/simt/emulator.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
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

#include "device.h"

#define FASTCNN_DEVICE __device__ __forceinline__

namespace fastcnn::cuda {

// -- for the host -----------------------------------------------------------------------------------------------------

// What launch shapes are made from.
struct Device {
  int multiprocessors, threads_per_multiprocessor;
};

#if defined(FASTCNN_SIMT_EMULATOR)

inline constexpr int kThreads = 64;                   // of a block: few, that small inputs have several
inline constexpr unsigned kMostInY = simt::kMostInY;  // few, that grids are folded
inline Device device() { return {2, 2 * kThreads}; }  // smaller than most inputs, that threads go round

template <auto kernel, typename Arguments>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Stream, const Arguments& arguments) {
  simt::run(name, grid, block, shared_bytes, [&] { kernel(arguments); });
}

#else

inline constexpr int kThreads = 256;
inline constexpr unsigned kMostInY = 65535;  // blocks of a grid

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

// A kernel's machine code is loaded when it is first launched or asked about. While a graph is captured, by this thread
// or another, that may be among what a thread must not do, unless it says that it knows better.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const char* name) { check(name, cudaThreadExchangeStreamCaptureMode(&mode_)); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }  // fails only where the one before did

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the one to put back
};

inline void check_launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, cudaError_t error) {
  if (error == cudaSuccess) return;
  const auto text = [](dim3 d) {
    return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
  };
  const std::string what = std::string(name) + " (grid " + text(grid) + ", block " + text(block) + ", " +
                           std::to_string(shared_bytes) + " bytes of shared memory)";
  check(what.c_str(), error);
}

// Returns once the launch was checked; the kernel itself may still run.
template <auto kernel, typename Arguments>
void launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes, Stream stream, const Arguments& arguments) {
  static_cast<void>(known<kernel>);
  const void* const function = reinterpret_cast<const void*>(kernel);
  void* list[] = {const_cast<Arguments*>(&arguments)};
  const RelaxedCapture relaxed(name);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10) {  // more than a kernel gets unasked
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(function, grid, block, list, shared_bytes, static_cast<cudaStream_t>(stream));
  }
  check_launch(name, grid, block, shared_bytes, error);
}

#endif

struct Launch {
  dim3 grid, block;
};

// A grid of x by y blocks. Those that y has no room for go on along z, where there may be a few too many: a kernel asks
// block_y() where it is, and does nothing beyond the last.
inline dim3 folded_grid(int64_t x, int64_t y) {
  const int64_t z = (y + kMostInY - 1) / kMostInY;
  if (x > std::numeric_limits<int>::max() || z > 65535) {
    throw std::runtime_error("fastcnn: a CUDA grid cannot have " + std::to_string(x) + " x " + std::to_string(y) +
                             " blocks");
  }
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(std::min<int64_t>(y, kMostInY)),
              static_cast<unsigned>(z));
}

// -- for kernels ------------------------------------------------------------------------------------------------------

#if defined(FASTCNN_SIMT_EMULATOR)
template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(simt::dynamic_shared());
}
inline float approximate_sqrt(float x) { return std::sqrt(x); }
inline float sqrt_of_normal(float x) { return std::sqrt(x); }
inline float inverse_sqrt_of_normal(float x) { return 1 / std::sqrt(x); }
template <typename T>
T opaque(T x) {
  return x;
}
inline unsigned computed_here(unsigned x) { return x; }
inline uint32_t anything() { return ~0u; }
template <typename T>
T load_if(bool exists, const T* p) {
  T x;
  if (exists) std::memcpy(&x, p, sizeof x);
  else std::memset(&x, 0xff, sizeof x);
  return x;
}
template <int bytes>
void load_if(bool exists, const void* p, uint32_t* words) {
  if (exists) std::memcpy(words, p, bytes);
}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
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
// As precise, of numbers that are not subnormal: one instruction.
FASTCNN_DEVICE float sqrt_of_normal(float x) {
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
FASTCNN_DEVICE float inverse_sqrt_of_normal(float x) {
  float root;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
// p, a pointer to global memory, with its computation hidden from the compiler: adding an offset then takes one
// instruction, where it would compute each address from scratch.
template <typename T>
FASTCNN_DEVICE T* opaque(T* p) {
  size_t address = __cvta_generic_to_global(p);
  asm("mov.b64 %0, %0;" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
}
// x, hidden so that what depends on it is recomputed here instead of being kept in a register.
FASTCNN_DEVICE unsigned computed_here(unsigned x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
  return x;
}
FASTCNN_DEVICE unsigned opaque(unsigned x) {
  asm("mov.b32 %0, %0;" : "+r"(x));
  return x;
}
// A value that is never used.
FASTCNN_DEVICE uint32_t anything() {
  uint32_t x;
  asm("" : "=r"(x));
  return x;
}
// Load 2 to 16 bytes if they exist, without a branch; otherwise the words keep their values.
template <int bytes>
FASTCNN_DEVICE void load_if(bool exists, const void* p, uint32_t* words) {
  const size_t address = __cvta_generic_to_global(p);
  const uint32_t e = exists;
  if constexpr (bytes == 2) {
    uint16_t low = static_cast<uint16_t>(words[0]);
    asm("{.reg .pred e; setp.ne.u32 e, %2, 0; @e ld.global.b16 %0, [%1];}" : "+h"(low) : "l"(address), "r"(e));
    words[0] = low;
  } else if constexpr (bytes == 4) {
    asm("{.reg .pred e; setp.ne.u32 e, %2, 0; @e ld.global.b32 %0, [%1];}" : "+r"(words[0]) : "l"(address), "r"(e));
  } else if constexpr (bytes == 8) {
    asm("{.reg .pred e; setp.ne.u32 e, %3, 0; @e ld.global.v2.b32 {%0, %1}, [%2];}"
        : "+r"(words[0]), "+r"(words[1])
        : "l"(address), "r"(e));
  } else {
    asm("{.reg .pred e; setp.ne.u32 e, %5, 0; @e ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
        : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3])
        : "l"(address), "r"(e));
  }
}
// The element at p if it exists, otherwise any value; without a branch.
template <typename T>
FASTCNN_DEVICE T load_if(bool exists, const T* p) {
  const size_t address = __cvta_generic_to_global(p);
  const uint32_t e = exists;
  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t> bits;
  if constexpr (sizeof(T) == 1) {
    asm("{.reg .pred e; setp.ne.u32 e, %2, 0; @e ld.global.u8 %0, [%1];}" : "=h"(bits) : "l"(address), "r"(e));
    return static_cast<T>(bits);
  } else {
    if constexpr (sizeof(T) == 2) {
      asm("{.reg .pred e; setp.ne.u32 e, %2, 0; @e ld.global.b16 %0, [%1];}" : "=h"(bits) : "l"(address), "r"(e));
    } else {
      asm("{.reg .pred e; setp.ne.u32 e, %2, 0; @e ld.global.b32 %0, [%1];}" : "=r"(bits) : "l"(address), "r"(e));
    }
    T x;
    memcpy(&x, &bits, sizeof x);
    return x;
  }
}
// Byte i of the result is the byte of b:a, from 0 to 7, that digit i of the selector names.
FASTCNN_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
#endif

// Of the block, in a grid that folded_grid() made.
FASTCNN_DEVICE int block_y() { return static_cast<int>(blockIdx.z * gridDim.y + blockIdx.y); }

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

// The larger; NaN if any is.
FASTCNN_DEVICE float max_or_nan(float a, float b) {
#if defined(FASTCNN_SIMT_EMULATOR) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800)
  return a > b || a != a ? a : b;
#else
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#endif
}

// -- words of two 16-bit floats, the lower half first -----------------------------------------------------------------

#if defined(FASTCNN_SIMT_EMULATOR)

template <typename T>
T half_of(uint32_t word, int i) {
  return T{static_cast<uint16_t>(word >> 16 * i)};
}
template <typename T>
float widen_low(uint32_t word) {
  return widen(half_of<T>(word, 0));
}
template <typename T>
float widen_high(uint32_t word) {
  return widen(half_of<T>(word, 1));
}
template <typename T>
uint32_t narrow_pair(float low, float high) {
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
}
template <typename T>
uint32_t max_or_nan_of_pairs(uint32_t a, uint32_t b) {
  return narrow_pair<T>(max_or_nan(widen_low<T>(a), widen_low<T>(b)), max_or_nan(widen_high<T>(a), widen_high<T>(b)));
}
template <typename T>
uint32_t equal_pairs(uint32_t a, uint32_t b) {
  return (widen_low<T>(a) == widen_low<T>(b) ? 0xffffu : 0) | (widen_high<T>(a) == widen_high<T>(b) ? 0xffff0000u : 0);
}

#else

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, Half>, __half2, __nv_bfloat162>;

template <typename T>
FASTCNN_DEVICE Pair<T> pair_of(uint32_t word) {
  return *reinterpret_cast<const Pair<T>*>(&word);
}
template <typename T>
FASTCNN_DEVICE uint32_t word_of(Pair<T> pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <typename T>
FASTCNN_DEVICE float widen_low(uint32_t word) {
  if constexpr (std::is_same_v<T, Half>) return __low2float(pair_of<T>(word));
  else return __uint_as_float(word << 16);
}
template <typename T>
FASTCNN_DEVICE float widen_high(uint32_t word) {
  if constexpr (std::is_same_v<T, Half>) return __high2float(pair_of<T>(word));
  else return __uint_as_float(word & 0xffff0000u);
}
template <typename T>
FASTCNN_DEVICE uint32_t narrow_pair(float low, float high) {
  if constexpr (std::is_same_v<T, Half>) return word_of<T>(__floats2half2_rn(low, high));
  else return word_of<T>(__floats2bfloat162_rn(low, high));
}
// Of each half.
template <typename T>
FASTCNN_DEVICE uint32_t max_or_nan_of_pairs(uint32_t a, uint32_t b) {
  return word_of<T>(__hmax2_nan(pair_of<T>(a), pair_of<T>(b)));
}
// All bits of the halves that are equal.
template <typename T>
FASTCNN_DEVICE uint32_t equal_pairs(uint32_t a, uint32_t b) {
  return __heq2_mask(pair_of<T>(a), pair_of<T>(b));
}

#endif

// -- tensor cores, from sm_80 on --------------------------------------------------------------------------------------

#if defined(FASTCNN_SIMT_EMULATOR)

inline void copy_async_16(void* shared, const void* global, bool exists) {
  simt::copy_async(shared, global, exists ? 16 : 0, exists ? 0 : 16);
}
inline void commit_copies() { simt::commit_copies(); }
template <int groups_left>
void wait_for_copies() {
  simt::wait_for_copies(groups_left);
}

inline uint32_t round_to_tf32(uint32_t x) { return (x & 0x7f800000) == 0x7f800000 ? x : (x + 0x1000) & ~0x1fffu; }

// What the words of two fragments, each with one or two elements of a row and a column, add to their product.
template <typename T>
float product(uint32_t a, uint32_t b) {
  if constexpr (std::is_same_v<T, float>) {
    return std::bit_cast<float>(a) * std::bit_cast<float>(b);
  } else {
    const auto element = [](uint32_t word, int i) { return widen(T{static_cast<uint16_t>(word >> 16 * i)}); };
    return element(a, 0) * element(b, 0) + element(a, 1) * element(b, 1);
  }
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Location at = simt::Location::current()) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  simt::exchange(~0u, &mine, sizeof mine, at);
  const int group = simt::lane_id() / 4, pair = simt::lane_id() % 4;
  const auto of = [](int lane) { return static_cast<const Fragments*>(simt::lane(lane)); };
  for (int i = 0; i < 4; ++i) {
    for (int word = 0; word < 8; ++word) {
      const int t = word % 4, half = word / 4, column = 2 * pair + i % 2;
      c[i] += product<T>(of(4 * group + t)->a[2 * half + i / 2], of(4 * column + t)->b[half]);
    }
  }
}

#else

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FASTCNN_SM80(...) asm volatile(__VA_ARGS__)
#else
#define FASTCNN_SM80(...) __trap()  // nothing below sm_80 launches a kernel that comes here
#endif

// 16 bytes from global to shared memory, or zeros where they do not exist; complete when waited for.
FASTCNN_DEVICE void copy_async_16(void* shared, const void* global, bool exists) {
  [[maybe_unused]] const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  [[maybe_unused]] const int bytes = exists ? 16 : 0;
  FASTCNN_SM80("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
FASTCNN_DEVICE void commit_copies() { FASTCNN_SM80("cp.async.commit_group;" :: : "memory"); }
// Until at most so many of this thread's groups of copies are under way.
template <int groups_left>
FASTCNN_DEVICE void wait_for_copies() {
  FASTCNN_SM80("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

FASTCNN_DEVICE uint32_t round_to_tf32(uint32_t x) {
  uint32_t rounded = 0;
  FASTCNN_SM80("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(x)));
  return rounded;
}

// c += a b by a warp, of 16 rows, 32 bytes of k and 8 columns. Lane 4 * g + t has, as 4-byte words of k, words t and t
// + 4 of rows g and g + 8 of a (in the order of rows, then words) and of column g of b, and of c rows g and g + 8 of
// columns 2 * t and 2 * t + 1.
template <typename T>
FASTCNN_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define FASTCNN_MMA(shape)                                                                                          \
  FASTCNN_SM80("mma.sync.aligned." shape ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), \
               "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, Half>) FASTCNN_MMA("m16n8k16.row.col.f32.f16.f16");
  else if constexpr (std::is_same_v<T, BFloat16>) FASTCNN_MMA("m16n8k16.row.col.f32.bf16.bf16");
  else FASTCNN_MMA("m16n8k8.row.col.f32.tf32.tf32");
#undef FASTCNN_MMA
}

#endif

}  // namespace fastcnn::cuda
