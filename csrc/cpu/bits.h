// A bit for each element of a vector: whether ReLU passes its gradient.
#pragma once

#include "vec.h"

namespace fastcnn::FASTCNN_CAPABILITY {

// Those of x not above 0 are off, those of NaN on.
template <typename A>
FASTCNN_INLINE uint32_t passing(Vec<A> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NLE_UQ);
  else return _mm512_cmp_pd_mask((__m512d)x, _mm512_setzero_pd(), _CMP_NLE_UQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_NLE_UQ));
  else return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)x, _mm256_setzero_pd(), _CMP_NLE_UQ));
#else
  uint32_t bits = 0;
  for (int l = 0; l < kLanes<A>; ++l) bits |= static_cast<uint32_t>(!(x[l] <= 0)) << l;
  return bits;
#endif
}

// x where its bit is on, else 0; the bits above those of the vector do not count.
template <typename A>
FASTCNN_INLINE Vec<A> where_set(uint32_t bits, Vec<A> x) {
  IntVec<A> lanes;
  for (int l = 0; l < kLanes<A>; ++l) lanes[l] = Lane<A>(1) << l;
  const IntVec<A> here = IntVec<A>{} + static_cast<Lane<A>>(bits);
  return (here & lanes) != 0 ? x : Vec<A>{};
}

// The bits of one vector of floats, which are bits of memory from the i-th on; i is a multiple of the lanes.
FASTCNN_INLINE uint32_t load_bits(const uint8_t* bits, int64_t i) {
  uint32_t loaded = 0;
  std::memcpy(&loaded, bits + i / 8, kLanes<float> == 16 ? 2 : 1);
  return loaded >> i % 8;
}

// The same bits, written one vector after the other.
FASTCNN_INLINE void store_bits(uint8_t* bits, int64_t i, uint32_t value) {
  if (kLanes<float> < 8 && i % 8) value = value << i % 8 | bits[i / 8];
  std::memcpy(bits + i / 8, &value, kLanes<float> == 16 ? 2 : 1);
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
