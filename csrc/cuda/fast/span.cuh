// The channels of a pixel that a thread has, and their neighbours on both sides. In channels_last they are a vector of
// 16 bytes, and the lanes of a warp have neighbouring vectors; in NCHW they are kPlanes channels, and the lanes have
// neighbouring pixels.
#pragma once

#include "arguments.cuh"

namespace fastcnn::cuda::fast {

inline constexpr int kPlanes = 8;

// Consecutive bytes, 2 to 16 of them, in one access.
template <int bytes>
struct Words {
  static constexpr int kCount = (bytes + 3) / 4;
  using Access = typename Word<bytes>::type;
  uint32_t word[kCount] = {};

  FASTCNN_DEVICE Words() {}
  FASTCNN_DEVICE Words(const void* p, bool exists, uint32_t otherwise) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) word[i] = otherwise;
    load_if<bytes>(exists, p, word);
  }
  FASTCNN_DEVICE explicit Words(const void* p) {
    const Access access = *static_cast<const Access*>(p);
    if constexpr (bytes < 4) word[0] = access;
    else memcpy(word, &access, bytes);
  }
  FASTCNN_DEVICE void store(void* p) const {
    Access access;
    if constexpr (bytes < 4) access = static_cast<Access>(word[0]);
    else memcpy(&access, word, bytes);
    *static_cast<Access*>(p) = access;
  }
};

template <typename T, int n>
FASTCNN_DEVICE void widen_words(const Words<static_cast<int>(sizeof(T)) * n>& words, float* v) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (sizeof(T) == 4) v[i] = std::bit_cast<float>(words.word[i]);
    else v[i] = i % 2 ? widen_high<T>(words.word[i / 2]) : widen_low<T>(words.word[i / 2]);
  }
}

// Whether a run's channels have neighbours in their group.
struct Neighbours {
  bool left = false, right = false;

  FASTCNN_DEVICE Neighbours() {}
  FASTCNN_DEVICE Neighbours(const Arguments& a, int run) {
    const int in_group = run - a.by_group.divide(run) * a.runs_per_group;
    left = in_group > 0, right = in_group < a.runs_per_group - 1;
  }
};

// In NCHW, elements from a thread's first plane to each of its others; all of them in registers, so that an address is
// one instruction.
template <bool channels_last, int count>
struct Planes {
  FASTCNN_DEVICE explicit Planes(int) {}
};
template <int count>
struct Planes<false, count> {
  unsigned offset[count];
  FASTCNN_DEVICE explicit Planes(int stride) {
#pragma unroll
    for (int j = 0; j < count; ++j) offset[j] = opaque(static_cast<unsigned>(j * stride));
  }
};

template <typename T, bool channels_last, int length, int around>
struct Span {
  static constexpr int kCount = length + 2 * around;
  float value[kCount];

  // p: the thread's first channel. Neighbours that do not exist are 0; without `here` nothing exists. In vectors, what
  // does not exist is `otherwise`, or `beside` where it is a neighbour.
  template <int count>
  FASTCNN_DEVICE Span(const T* p, const Planes<false, count>& planes, Neighbours exist, bool here = true, uint32_t = 0,
                      uint32_t = 0) {
    const T* const first = around ? opaque(p - planes.offset[around]) : p;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const bool exists = here && (j < around ? exist.left : j < around + length || exist.right);
      value[j] = exists ? static_cast<float>(cuda::widen(first[planes.offset[j]])) : 0;
    }
  }
  FASTCNN_DEVICE void widen(float (&v)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = value[j];
  }
};

// Bytes of planes.
template <int length>
struct Span<uint8_t, false, length, 0> {
  int value[length];

  template <int count>
  FASTCNN_DEVICE Span(const uint8_t* p, const Planes<false, count>& planes, Neighbours, bool here, uint32_t otherwise,
                      uint32_t) {
#pragma unroll
    for (int j = 0; j < length; ++j) value[j] = here ? p[planes.offset[j]] : otherwise;
  }
  FASTCNN_DEVICE int byte(int j) const { return value[j]; }
};

template <typename T, int length, int around>
struct Span<T, true, length, around> {
  static constexpr int kCount = length + 2 * around;
  static constexpr int kBytes = sizeof(T);
  Words<kBytes * length> own;
  Words<around ? kBytes * around : 4> left, right;

  template <int count>
  FASTCNN_DEVICE Span(const T* p, const Planes<true, count>&, Neighbours exist, bool here = true,
                      uint32_t otherwise = 0, uint32_t beside = 0)
      : own(p, here, otherwise) {
    if constexpr (around > 0) {
      left = Words<kBytes * around>(p - around, here && exist.left, beside);
      right = Words<kBytes * around>(p + length, here && exist.right, beside);
    }
  }
  FASTCNN_DEVICE int byte(int j) const {
    const auto in = [](const auto& words, int i) {
      return static_cast<int>(permute_bytes(words.word[i / 4], 0, 0x4440 + i % 4));
    };
    return j < around ? in(left, j) : j < around + length ? in(own, j - around) : in(right, j - around - length);
  }
  FASTCNN_DEVICE void widen(float (&v)[kCount]) const {
    if constexpr (around > 0) {
      widen_words<T, around>(left, v);
      widen_words<T, around>(right, v + around + length);
    }
    widen_words<T, length>(own, v + around);
  }
};

// Store the thread's own channels.
template <typename T, bool channels_last, int length>
FASTCNN_DEVICE void store(T* p, [[maybe_unused]] int stride, const float (&v)[length]) {
  if constexpr (channels_last) {
    Words<static_cast<int>(sizeof(T)) * length> words;
#pragma unroll
    for (int i = 0; i < words.kCount; ++i) {
      if constexpr (sizeof(T) == 4) words.word[i] = std::bit_cast<uint32_t>(v[i]);
      else words.word[i] = narrow_pair<T>(v[2 * i], v[2 * i + 1]);
    }
    words.store(p);
  } else {
#pragma unroll
    for (int i = 0; i < length; ++i) p[static_cast<int64_t>(i) * stride] = narrow<T>(v[i]);
  }
}

}  // namespace fastcnn::cuda::fast
