// Max pooling of K x K windows, K = 3 or 2, at stride 2, of relu(x + bias) or of x itself, and its gradient. Memory:
// forward reads x once (what windows share comes from the L1 cache) and writes y and one byte per output, the place of
// its maximum; backward reads dy and the byte (and x, where there is a ReLU) and writes dx.
//
// Of equal elements the first wins; a NaN always does, the last of several. That there is a NaN shows in the maximum,
// and is rare: then its place is looked for in another pass over the window.
#pragma once

#include "lrn.cuh"

namespace fastcnn::cuda::fast {

// One channel's running maximum, and the place where it was first.
struct Largest {
  float value;
  int place;

  FASTCNN_DEVICE void take(float v, int at) {
    place = v > value ? at : place;
    value = max_or_nan(value, v);
  }
};

// Whether a NaN is among these; or perhaps infinities of both signs, which is as rare.
template <int n>
FASTCNN_DEVICE bool any_nan(const float (&v)[n]) {
  float sum = v[0];
#pragma unroll
  for (int i = 1; i < n; ++i) sum += v[i];
  return sum != sum;
}

// y / factor of one channel at a pixel, read from memory.
template <typename T, bool channels_last, Beta beta>
FASTCNN_DEVICE float element(const Arguments& a, const T* image, int pixel, int c) {
  const auto at = [&](int channel) {
    const int64_t offset =
        channels_last ? static_cast<int64_t>(pixel) * a.C + channel : static_cast<int64_t>(channel) * a.H * a.W + pixel;
    const float v = cuda::widen(image[offset]) + (a.bias ? static_cast<const float*>(a.bias)[channel] : -0.0f);
    return max_or_nan(v, a.lowest);
  };
  const float v = at(c);
  if constexpr (beta == Beta::none) return v;
  const int channels = a.C / a.runs * a.runs_per_group, first = c / channels * channels;
  float s = a.start, r;
#pragma unroll 1
  for (int i = max(c - 2, first); i < min(c + 3, first + channels); ++i) s += at(i) * at(i);
  return v * power<beta>(s, r);
}

// Store the places of the last NaN in the window of output (oh, ow), for those of the run's channels that have one.
template <typename T, bool channels_last, int length, Beta beta, int K>
FASTCNN_DEVICE void find_nan(const Arguments& a, int n, int oh, int ow, int run) {
#pragma unroll 1
  for (int c = run * length; c < (run + 1) * length; ++c) {
    int place = -1;
#pragma unroll 1
    for (int i = 0; i < K * K; ++i) {
      const int h = 2 * oh + i / K, w = 2 * ow + i % K;
      if (h >= a.H || w >= a.W) continue;
      const float y = element<T, channels_last, beta>(a, static_cast<const T*>(a.x) + n * a.image, h * a.W + w, c);
      if (y != y) place = i;
    }
    const int64_t pixel = static_cast<int64_t>(oh) * a.OW + ow;
    const int64_t at = channels_last ? pixel * a.C + c : c * static_cast<int64_t>(a.OH) * a.OW + pixel;
    if (place >= 0) static_cast<uint8_t*>(a.argmax)[n * a.out_image + at] = static_cast<uint8_t>(place);
  }
}

// -- forward, channels_last -------------------------------------------------------------------------------------------

// The maxima of a window of vectors, and their places, a byte each; whether one may be NaN.
template <typename T, int K>
FASTCNN_DEVICE bool maxima(const Words<16> (&x)[K * K], Words<16>& value, Words<kVector<T>>& place) {
  constexpr int last = K * K - 1;
  if constexpr (sizeof(T) == 2) {
    uint32_t places[4], all = x[0].word[0];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      value.word[i] = x[0].word[i];
#pragma unroll
      for (int k = 1; k <= last; ++k) value.word[i] = max_or_nan_of_pairs<T>(value.word[i], x[k].word[i]);
      places[i] = last * 0x10001;
#pragma unroll
      for (int k = last - 1; k >= 0; --k) {
        const uint32_t equal = equal_pairs<T>(x[k].word[i], value.word[i]);
        places[i] = (places[i] & ~equal) | (k * 0x10001 & equal);
      }
      all = max_or_nan_of_pairs<T>(all, value.word[i]);
    }
    for (int i = 0; i < 2; ++i) place.word[i] = permute_bytes(places[2 * i], places[2 * i + 1], 0x6420);
    return equal_pairs<T>(all, all) != ~0u;
  } else {
    float found[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Largest largest{std::bit_cast<float>(x[0].word[i]), 0};
#pragma unroll
      for (int k = 1; k <= last; ++k) largest.take(std::bit_cast<float>(x[k].word[i]), k);
      found[i] = largest.value;
      value.word[i] = std::bit_cast<uint32_t>(largest.value);
      place.word[0] |= largest.place << 8 * i;
    }
    return any_nan(found);
  }
}

// Store the largest of a thread's channels at one output.
template <typename T, bool channels_last, int length>
FASTCNN_DEVICE void store_largest(const Arguments& a, int64_t at, int stride, const Largest (&largest)[length]) {
  float value[length];
#pragma unroll
  for (int i = 0; i < length; ++i) value[i] = a.factor * largest[i].value;
  store<T, channels_last>(static_cast<T*>(a.out) + at, stride, value);
  if (!a.argmax) return;
  uint8_t* const argmax = static_cast<uint8_t*>(a.argmax) + at;
  if constexpr (channels_last) {
    Words<length> place;
#pragma unroll
    for (int i = 0; i < length; ++i) place.word[i / 4] |= largest[i].place << i % 4 * 8;
    place.store(argmax);
  } else {
#pragma unroll
    for (int i = 0; i < length; ++i) argmax[static_cast<int64_t>(i) * stride] = static_cast<uint8_t>(largest[i].place);
  }
}

// Of 16-bit elements the largest is found first, and then relu(x + bias) of it: where that is 0, it is 0 in all of the
// window, and the first element counts. In float32 different x + bias may round to one number, so that they come first.
template <typename T, int K, bool rectified>
__global__ void __launch_bounds__(kThreads, 1) pool_vectors(const Arguments a) {
  constexpr int length = kVector<T>;
  const Place<true> place(a);
  if (!place.exists) return;
  const int row = a.by_columns.divide(place.unit), ow = place.unit - row * a.OW;
  const int n = a.by_rows.divide(row), oh = row - n * a.OH;
  const T* const x = static_cast<const T*>(a.x) + n * a.image + place.run * length;
  Words<16> window[K * K];
#pragma unroll
  for (int i = 0; i < K; ++i) {
    // A window may end beyond the map: the last element once more is never the first of the largest.
    const int h = min(2 * oh + i, a.H - 1) * a.W;
#pragma unroll
    for (int j = 0; j < K; ++j) window[i * K + j] = Words<16>(x + (h + min(2 * ow + j, a.W - 1)) * a.C);
  }
  const int64_t at = static_cast<int64_t>(place.unit) * a.C + place.run * length;
  bool nan;
  if constexpr (rectified && sizeof(T) == 4) {
    const Rectifier<length> rectify(a, place.run * length, length, {});
    Largest largest[length];
    float value[length];
#pragma unroll
    for (int k = 0; k < K * K; ++k) {
      float v[length];
      widen_words<T, length>(window[k], v);
      rectify.apply(v);
#pragma unroll
      for (int i = 0; i < length; ++i) {
        if (k == 0) largest[i] = {v[i], 0};
        else largest[i].take(v[i], k);
        value[i] = largest[i].value;
      }
    }
    store_largest<T, true>(a, at, 0, largest);
    nan = any_nan(value);
  } else {
    Words<16> value;
    Words<length> places;
    nan = maxima<T, K>(window, value, places);
    if constexpr (rectified) {
      const Rectifier<length> rectify(a, place.run * length, length, {});
      float v[length];
      widen_words<T, length>(value, v);
      rectify.apply(v);
#pragma unroll
      for (int i = 0; i < length; ++i) {
        if (!(v[i] > a.lowest)) places.word[i / 4] &= ~(0xffu << i % 4 * 8);
      }
      store<T, true>(static_cast<T*>(a.out) + at, 0, v);
    } else {
      value.store(static_cast<T*>(a.out) + at);
    }
    if (a.argmax) places.store(static_cast<uint8_t*>(a.argmax) + at);
  }
  if (nan && a.argmax) find_nan<T, true, length, Beta::none, K>(a, n, oh, ow, place.run);
}

// -- forward, NCHW ----------------------------------------------------------------------------------------------------

// The elements at, at + 1 and at + 2 of x, which is aligned to pairs of them, in accesses of pairs. With `clipped` only
// `count` of them exist, and the last that does takes the place of others.
template <typename T, int K, bool clipped>
FASTCNN_DEVICE void load_row(const T* x, unsigned at, int count, float (&v)[3]) {
  using Pair = Words<2 * static_cast<int>(sizeof(T))>;
  const bool odd = at & 1;
  const Pair* const pairs = reinterpret_cast<const Pair*>(x) + (at >> 1);
  const Pair first(pairs), second = (clipped ? count : K) + odd > 2 ? Pair(pairs + 1) : Pair();
  if constexpr (sizeof(T) == 4) {
    v[0] = std::bit_cast<float>(odd ? first.word[1] : first.word[0]);
    v[1] = std::bit_cast<float>(odd ? second.word[0] : first.word[1]);
    v[2] = std::bit_cast<float>(odd ? second.word[1] : second.word[0]);
  } else {
    const uint32_t selector = 0x3210 ^ (at & 1) * (0x3210 ^ 0x5432);  // from its half on
    const uint32_t pair = permute_bytes(first.word[0], second.word[0], selector);
    v[0] = widen_low<T>(pair);
    v[1] = widen_high<T>(pair);
    v[2] = widen_low<T>(permute_bytes(second.word[0], 0, selector));
  }
  if (clipped && count < 2) v[1] = v[0];
  if (clipped && count < 3) v[2] = v[1];
}

// A thread has `outputs` of a plane, one below the other.
template <typename T, int K, int outputs, bool rectified, bool clipped>
__global__ void __launch_bounds__(kThreads, 1) pool_planes(const Arguments a) {
  const int unit = blockIdx.x * kThreads + threadIdx.x, n = block_y();
  if (unit >= a.units || n >= a.N) return;
  constexpr int rows = 2 * outputs + K - 2;
  const int strip = a.by_columns.divide(unit), ow = unit - strip * a.OW;
  const int c = a.by_rows.divide(strip), oh = outputs * (strip - c * static_cast<int>(a.by_rows.by));
  const T* const image = opaque(static_cast<const T*>(a.x) + n * a.image);
  const unsigned plane = c * a.H * a.W + 2 * ow;
  const float bias = rectified && a.bias ? static_cast<const float*>(a.bias)[c] : -0.0f;
  const int last = (clipped ? a.H : min(2 * a.OH + K - 2, a.H)) - 1;
  Largest row[rows];
#pragma unroll
  for (int i = 0; i < rows; ++i) {
    float v[3];
    // Beyond the map the last row once more: it is never the first of the largest.
    const int h = clipped || i >= K ? min(2 * oh + i, last) : 2 * oh + i;
    load_row<T, K, clipped>(image, plane + h * a.W, a.W - 2 * ow, v);
#pragma unroll
    for (int j = 0; j < K; ++j) {
      if (rectified && sizeof(T) == 4) v[j] = max_or_nan(v[j] + bias, a.lowest);
      if (j == 0) row[i] = {v[0], 0};
      else row[i].take(v[j], j);
    }
  }
  const unsigned at = (c * a.OH + oh) * a.OW + ow;
  T* const out = opaque(static_cast<T*>(a.out) + n * a.out_image);
  uint8_t* const argmax = opaque(static_cast<uint8_t*>(a.argmax) + n * a.out_image);
#pragma unroll
  for (int o = 0; o < outputs; ++o) {
    if (oh + o == a.OH) break;
    Largest largest = row[2 * o];
#pragma unroll
    for (int i = 1; i < K; ++i) largest.take(row[2 * o + i].value, i * K + row[2 * o + i].place);
    if (rectified && sizeof(T) == 2) {
      largest.value = max_or_nan(largest.value + bias, a.lowest);
      if (!(largest.value > a.lowest)) largest.place = 0;
    }
    out[at + o * a.OW] = narrow<T>(largest.value);
    if (!a.argmax) continue;
    argmax[at + o * a.OW] = static_cast<uint8_t>(largest.place);
    if (largest.value != largest.value) find_nan<T, false, 1, Beta::none, K>(a, n, oh + o, ow, c);
  }
}

// -- backward ---------------------------------------------------------------------------------------------------------

// The gradients of an output, and the places of its maxima, of a thread's channels and their neighbours; without `here`
// no place is that of an element.
template <typename T, bool channels_last, int length, int around>
struct Window {
  static constexpr int kCount = length + 2 * around;
  Span<T, channels_last, length, around> dy;
  Span<uint8_t, channels_last, length, around> place;

  template <int count>
  FASTCNN_DEVICE Window(const T* dy, const uint8_t* argmax, unsigned at, const Planes<channels_last, count>& planes,
                        Neighbours exist, bool here)
      : dy(dy + at, planes, exist, here, anything(), anything()), place(argmax + at, planes, exist, here, ~0u, ~0u) {}

  // f(j, e, whether the maximum of channel j is element e of the block, its gradient), where the places `at` of the
  // window are the block's elements `element`.
  template <int elements, typename F>
  FASTCNN_DEVICE void for_each(const int (&element)[elements], const int (&at)[elements], F f) const {
    float d[kCount];
    dy.widen(d);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int mine = place.byte(j);
#pragma unroll
      for (int e = 0; e < elements; ++e) f(j, element[e], mine == at[e], d[j]);
    }
  }
};

template <bool channels_last, Beta beta>
inline constexpr int kBackward = channels_last && beta == Beta::none ? kThreads : kNarrow;

// A thread has blocks of 2 x 2 elements, each of which begins where a window does: elements at the same place of their
// blocks are at the same places of their windows. Each gradient is added where its place is, in the order of places.
template <typename T, bool channels_last, int length, int K, Beta beta, bool rectified>
__global__ void __launch_bounds__(kBackward<channels_last, beta>, kResidentNarrow / kBackward<channels_last, beta>)
    pool_backward(const Arguments a) {
  constexpr int around = beta == Beta::none ? 0 : 2, count = length + 2 * around;
  using X = Span<T, channels_last, length, 2 * around>;
  const Place<channels_last> place(a);
  const bool reads_x = rectified && a.x;  // without ReLU and LRN there may be none
  float sums[length] = {};
  if (place.run < a.runs) {
    const Rectifier<X::kCount> rectify(a, place.run * length, length, place.neighbours);
    const int columns = (a.W + 1) / 2, rows = (a.H + 1) / 2, stride = a.H * a.W;
    const int step = gridDim.x * a.pixels_per_block;
    const Planes<channels_last, X::kCount> planes(stride), out_planes(a.OH * a.OW);
    const unsigned pixel = channels_last ? a.C : 1, first = place.run * length;
    for (int unit = place.unit; unit < a.units; unit += step) {
      const int row = a.by_columns.divide(unit), ow = unit - row * columns;
      const int n = a.by_rows.divide(row), oh = row - n * rows;
      const T* const x = opaque(static_cast<const T*>(a.x) + n * a.image);
      T* const out = opaque(static_cast<T*>(a.out) + n * a.image);
      const T* const dy = opaque(static_cast<const T*>(a.dy) + n * a.out_image);
      const uint8_t* const argmax = opaque(static_cast<const uint8_t*>(a.argmax) + n * a.out_image);
      const unsigned from = first * (channels_last ? 1 : a.OH * a.OW) + (oh * a.OW + ow) * pixel, above = a.OW * pixel;
      const bool right = ow < a.OW, below = oh < a.OH, left = ow > 0, top = oh > 0;
      const auto window = [&](unsigned at, bool exists) {
        return Window<T, channels_last, length, around>(dy, argmax, at, out_planes, place.neighbours, exists);
      };
      const unsigned to = first * (channels_last ? 1 : stride) + (2 * oh * a.W + 2 * ow) * pixel, next = a.W * pixel;
      const bool inside[4] = {true, 2 * ow + 1 < a.W, 2 * oh + 1 < a.H, 2 * ow + 1 < a.W && 2 * oh + 1 < a.H};
      const unsigned offset[4] = {to, to + pixel, to + next, to + next + pixel};
      const auto element = [&](int e) {
        return X(x + offset[e], planes, place.neighbours, reads_x && inside[e], anything());
      };
      float g[4][count];
      const auto set = [&](int j, int e, bool mine, float d) { g[e][j] = mine ? d : 0; };
      const auto add = [&](int j, int e, bool mine, float d) {
        if (mine) g[e][j] += d;
      };
      // All loads come first. Of 2 x 2 elements that do not overlap there is one window.
      const auto here = window(from, right && below), before = window(from - pixel, K == 3 && left && below),
                 over = window(from - above, K == 3 && right && top),
                 corner = window(from - above - pixel, K == 3 && left && top);
      const X xs[4] = {element(0), element(1), element(2), element(3)};
      if constexpr (K == 3) {
        here.for_each({0, 1, 2, 3}, {0, 1, 3, 4}, set);
        before.for_each({0, 2}, {2, 5}, add);
        over.for_each({0, 1}, {6, 7}, add);
        corner.for_each({0}, {8}, add);
      } else {
        here.for_each({0, 1, 2, 3}, {0, 1, 2, 3}, set);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float v[X::kCount], dx[length];
        xs[e].widen(v);
        if constexpr (rectified) rectify.apply(v);
        if constexpr (beta == Beta::none) {
#pragma unroll
          for (int i = 0; i < length; ++i) dx[i] = g[e][i];
        } else {
          differentiate<beta>(a, v, g[e], dx);
        }
        if (!inside[e]) continue;
#pragma unroll
        for (int i = 0; i < length; ++i) {
          if (rectified && v[2 * around + i] <= a.blocked) dx[i] = 0;
          sums[i] += dx[i];
        }
        store<T, channels_last>(out + offset[e], stride, dx);
      }
    }
  }
  if (a.partials) store_sums<channels_last>(a, place.run, sums);
}

}  // namespace fastcnn::cuda::fast
