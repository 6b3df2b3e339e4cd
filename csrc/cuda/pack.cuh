// Accesses to memory of up to 16 bytes.
#pragma once

#include "simt.cuh"

namespace fastcnn::cuda {

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <int bytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// n elements moved in accesses of 16 bytes, or in one where they are fewer. p must be aligned to that.
template <typename T, int n>
struct Pack {
  static constexpr int kBytes = sizeof(T) * n, kAccess = kBytes < 16 ? kBytes : 16;
  using Access = typename Word<kAccess>::type;
  union {
    T element[n];
    Access word[kBytes / kAccess];
  };
  FASTCNN_DEVICE Pack() {}
  FASTCNN_DEVICE explicit Pack(const T* p) {
#pragma unroll
    for (int i = 0; i < kBytes / kAccess; ++i) word[i] = reinterpret_cast<const Access*>(p)[i];
  }
  FASTCNN_DEVICE void store(T* p) const {
#pragma unroll
    for (int i = 0; i < kBytes / kAccess; ++i) reinterpret_cast<Access*>(p)[i] = word[i];
  }
};

// The bits of an element, as the lowest of a word.
template <typename T>
FASTCNN_DEVICE uint32_t bits(T x) {
  typename Word<sizeof(T)>::type b;
  memcpy(&b, &x, sizeof b);
  return b;
}

}  // namespace fastcnn::cuda
