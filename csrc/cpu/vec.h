// SIMD vectors of the width the file is compiled for, of the compiler's own types: + - * / < ?: work lane by lane.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Kernels are built of small functions that only make sense in registers.
#define FASTCNN_INLINE __attribute__((always_inline)) inline
#define FASTCNN_INLINE_LAMBDA __attribute__((always_inline))

namespace fastcnn::FASTCNN_CAPABILITY {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// 16-bit tensors are computed in float, others in themselves.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<T, int16_t>, T, float>;

template <typename A>
inline constexpr int64_t kLanes = kVectorBytes / sizeof(A);

template <typename T, int64_t lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * lanes)));
};
template <typename A>
using Vec = typename VectorOf<A, kLanes<A>>::type;
// Integers as wide as the lanes of Vec<A>: what comparing two Vec<A> gives.
template <typename A>
using Lane = std::conditional_t<sizeof(A) == 2, int16_t, std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>;
template <typename A>
using IntVec = typename VectorOf<Lane<A>, kLanes<A>>::type;
using UInt16 = VectorOf<uint16_t, kLanes<float>>::type;
using UInt32 = VectorOf<uint32_t, kLanes<float>>::type;

template <typename V, typename T>
FASTCNN_INLINE V load_as(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FASTCNN_INLINE Vec<float> load(const float* p) { return load_as<Vec<float>>(p); }
FASTCNN_INLINE Vec<double> load(const double* p) { return load_as<Vec<double>>(p); }
FASTCNN_INLINE Vec<int16_t> load(const int16_t* p) { return load_as<Vec<int16_t>>(p); }

FASTCNN_INLINE Vec<float> load(const BFloat16* p) {
#if defined(__AVX512F__)
  // Each element to the upper half of its lane, in one shuffle: widening and shifting takes two instructions.
  const __m512i upper = _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0,  //
                                         7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, upper, _mm512_castsi256_si512(load_as<__m256i>(p)));
#else
  return (Vec<float>)(__builtin_convertvector(load_as<UInt16>(p), UInt32) << 16);
#endif
}

FASTCNN_INLINE Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(load_as<__m256i>(p));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(load_as<__m128i>(p));
#else
  const UInt32 bits = __builtin_convertvector(load_as<UInt16>(p), UInt32);
  const UInt32 magnitude = (bits & 0x7fff) << 13;
  const UInt32 finite = (UInt32)((Vec<float>)magnitude * 0x1p112f);  // rebias; makes subnormals normal
  return (Vec<float>)(((bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite) | (bits & 0x8000) << 16);
#endif
}

// Numbers from 0 to 255.
template <typename A>
FASTCNN_INLINE Vec<A> load_bytes(const uint8_t* p) {
  using Bytes = typename VectorOf<uint8_t, kLanes<A>>::type;
  using Shorts = typename VectorOf<uint16_t, kLanes<A>>::type;
  using Ints = typename VectorOf<int32_t, kLanes<A>>::type;
  const Bytes bytes = load_as<Bytes>(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)bytes));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadu_si64(p)));
#endif
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(bytes, Shorts), Ints), Vec<A>);
}

template <typename A>
FASTCNN_INLINE void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

FASTCNN_INLINE void store(BFloat16* p, Vec<float> v) {
  const UInt32 bits = (UInt32)v;
  const UInt32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const UInt16 narrow = __builtin_convertvector(v == v ? rounded : UInt32{} + 0x7fc0, UInt16);
  std::memcpy(p, &narrow, sizeof narrow);
}

FASTCNN_INLINE void store(Half* p, Vec<float> v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &h, sizeof h);
#elif defined(__F16C__)
  const __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &h, sizeof h);
#else
  const UInt32 bits = (UInt32)v, magnitude = bits & 0x7fffffff;
  // Adding a power of two as large as the last kept bit's worth lets the float adder round, subnormals included.
  const UInt32 exponent = magnitude & 0x7f800000;
  const UInt32 least = exponent < 0x38800000 ? UInt32{} + 0x38800000 : exponent;
  const Vec<float> rounder = (Vec<float>)(least + (13 << 23));
  const UInt32 rounded = (UInt32)((Vec<float>)magnitude + rounder) - (UInt32)rounder;
  const UInt32 finite = rounded + ((least - 0x38800000) >> 13);
  const UInt32 large = magnitude > 0x7f800000 ? UInt32{} + 0x7e00 : UInt32{} + 0x7c00;
  const UInt32 half = (magnitude >= 0x477ff000 ? large : finite) | ((bits >> 16) & 0x8000);
  const UInt16 narrow = __builtin_convertvector(half, UInt16);
  std::memcpy(p, &narrow, sizeof narrow);
#endif
}

template <typename T>
FASTCNN_INLINE Compute<T> to_compute(const T& x) {
  if constexpr (sizeof(T) == 2) return load_first(&x, 1)[0];
  else return x;
}

// Whether any lane of a comparison's result is true.
template <typename V>
FASTCNN_INLINE bool any(V mask) {
  uint64_t words[sizeof(V) / sizeof(uint64_t)], all = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (const uint64_t word : words) all |= word;
  return all;
}

template <typename A>
FASTCNN_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // exact also for -0
}

FASTCNN_INLINE Vec<float> sqrt(Vec<float> v) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_sqrt_ps((__m128)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

FASTCNN_INLINE Vec<double> sqrt(Vec<double> v) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_sqrt_pd((__m512d)v);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_sqrt_pd((__m256d)v);
#elif defined(__SSE2__)
  return (Vec<double>)_mm_sqrt_pd((__m128d)v);
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// s^-1/2, s^-3/4 and s^-1, to one or two ulp.
template <typename V>
class InverseRoot {
 public:
  explicit FASTCNN_INLINE InverseRoot(V s) : r_(1 / sqrt(s)) {}
  FASTCNN_INLINE V root() const { return r_; }
  FASTCNN_INLINE V three_quarters() const { return r_ * sqrt(r_); }
  FASTCNN_INLINE V reciprocal() const { return r_ * r_; }

 private:
  V r_;
};

#if defined(__AVX512F__)
// From an estimate r of 14 bits, which is cheaper than a root and a division: s = (1 - d) / r^2, so that s^-p is
// r^2p * (1 + p * d + ...). For 0 and inf the estimate is right, and d is NaN.
template <>
class InverseRoot<Vec<float>> {
 public:
  explicit FASTCNN_INLINE InverseRoot(Vec<float> s)
      : r_(_mm512_rsqrt14_ps((__m512)s)),
        d_(_mm512_fnmadd_ps(_mm512_mul_ps((__m512)s, r_), r_, _mm512_set1_ps(1))),
        is_number_(_mm512_cmp_ps_mask(d_, d_, _CMP_ORD_Q)) {}
  FASTCNN_INLINE Vec<float> root() const { return corrected(r_, 0.5f); }
  FASTCNN_INLINE Vec<float> three_quarters() const { return corrected(_mm512_mul_ps(r_, _mm512_sqrt_ps(r_)), 0.75f); }
  FASTCNN_INLINE Vec<float> reciprocal() const { return corrected(_mm512_mul_ps(r_, r_), 1); }

 private:
  FASTCNN_INLINE Vec<float> corrected(__m512 t, float power) const {
    const __m512 change = power == 1 ? t : _mm512_mul_ps(t, _mm512_set1_ps(power));
    return (Vec<float>)_mm512_mask3_fmadd_ps(change, d_, t, is_number_);
  }
  __m512 r_, d_;
  __mmask16 is_number_;
};
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define FASTCNN_SHUFFLE 1
#endif
#endif
#if !defined(FASTCNN_SHUFFLE)
#define FASTCNN_SHUFFLE 0
#endif

// Every other one of the lanes of a and then b, from `first` on.
template <int first, typename V>
FASTCNN_INLINE V every_other(V a, V b) {
  constexpr int kCount = sizeof a / sizeof a[0];
#if FASTCNN_SHUFFLE
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(a, b, (2 * i + first)...);
  }(std::make_integer_sequence<int, kCount>{});
#else
  V v;
  for (int i = 0; i < kCount; ++i) v[i] = 2 * i + first < kCount ? a[2 * i + first] : b[2 * i + first - kCount];
  return v;
#endif
}

// The lanes of v without the first, followed by the last of `other`.
template <typename V>
FASTCNN_INLINE V followed_by_last(V v, V other) {
  constexpr int kCount = sizeof v / sizeof v[0];
#if FASTCNN_SHUFFLE
  return [&]<int... i>(std::integer_sequence<int, i...>) {
    return __builtin_shufflevector(v, other, (i + 1)..., 2 * kCount - 1);
  }(std::make_integer_sequence<int, kCount - 1>{});
#else
  for (int i = 0; i < kCount - 1; ++i) v[i] = v[i + 1];
  v[kCount - 1] = other[kCount - 1];
  return v;
#endif
}

// s^-3/4 of which 13 bits are right.
FASTCNN_INLINE Vec<float> coarse_inverse_power(Vec<float> s) {
#if defined(__AVX512F__)
  const __m512 r = _mm512_rsqrt14_ps((__m512)s);
  const __mmask16 regular = ~_mm512_fpclass_ps_mask(r, 0x02 | 0x04 | 0x08);  // the root of 0 and inf is itself
  const __m512 root = _mm512_mask_mul_ps(r, regular, r, _mm512_rsqrt14_ps(r));
  return (Vec<float>)_mm512_mul_ps(r, root);
#else
  return InverseRoot<Vec<float>>(s).three_quarters();
#endif
}

// A vector of which only the first n elements are in memory; the others are 0.
template <typename T>
FASTCNN_INLINE Vec<Compute<T>> load_first(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return (Vec<float>)_mm512_maskz_loadu_ps((1 << n) - 1, p);
  if constexpr (std::is_same_v<T, int16_t>) return (Vec<int16_t>)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
#endif
  T padded[kLanes<Compute<T>>] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <typename T>
FASTCNN_INLINE void store_first(T* p, Vec<Compute<T>> v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, (1 << n) - 1, (__m512)v);
  if constexpr (std::is_same_v<T, int16_t>) return _mm512_mask_storeu_epi16(p, (1u << n) - 1, (__m512i)v);
#endif
  T all[kLanes<Compute<T>>];
  store(all, v);
  std::memcpy(p, all, n * sizeof(T));
}

// From the bits of 16-bit floats to integers in the same order, and back: NaN lies beyond the infinity of its sign.
FASTCNN_INLINE Vec<int16_t> ordered(Vec<int16_t> bits) { return bits ^ ((bits >> 15) & 0x7fff); }

// A vector of which n elements are in memory, which may be more than it has, or negative: none.
template <typename T>
FASTCNN_INLINE Vec<Compute<T>> load_some(const T* p, int64_t n) {
  return n >= kLanes<Compute<T>> ? load(p) : load_first(p, n < 0 ? 0 : n);
}

template <typename T>
FASTCNN_INLINE void store_some(T* p, Vec<Compute<T>> v, int64_t n) {
  if (n >= kLanes<Compute<T>>) store(p, v);
  else store_first(p, v, n);
}

// The number of elements of a piece that is a vector.
template <typename A>
using WholeVector = std::integral_constant<int64_t, kLanes<A>>;

template <typename T, typename Count>
FASTCNN_INLINE Vec<Compute<T>> load_piece(const T* p, Count n) {
  if constexpr (std::is_same_v<Count, WholeVector<Compute<T>>>) return load(p);
  else return load_first(p, n);
}

template <typename T, typename Count>
FASTCNN_INLINE void store_piece(T* p, Vec<Compute<T>> v, Count n) {
  if constexpr (std::is_same_v<Count, WholeVector<Compute<T>>>) store(p, v);
  else store_first(p, v, n);
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
