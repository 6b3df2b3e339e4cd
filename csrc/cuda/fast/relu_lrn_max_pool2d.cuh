// The tail of an AlexNet stage, max_pool2d(lrn(relu(x + bias))), and its gradient, with LRN over five channels and
// windows of K x K, K = 3 or 2, at stride 2. Memory: forward reads x once and writes the pooled map and its argmax;
// backward reads x, dy and argmax and writes dx.
#pragma once

#include "max_pool2d.cuh"

namespace fastcnn::cuda::fast {

template <typename T>
FASTCNN_DEVICE void narrow_two(float a, float b, T (&to)[2]) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t pair = narrow_pair<T>(a, b);
    memcpy(to, &pair, sizeof pair);
  } else {
    to[0] = a, to[1] = b;
  }
}

// -- forward ----------------------------------------------------------------------------------------------------------

// Deal out rows of outputs evenly: those of all chunks of units form one sequence, of which each block takes an equal
// part. f(chunk, first row, end of the rows)
template <typename F>
FASTCNN_DEVICE void for_each_strip(const Arguments& a, int units_per_block, F f) {
  const int64_t rows = static_cast<int64_t>((a.units + units_per_block - 1) / units_per_block) * a.OH;
  int64_t row = rows * blockIdx.x / gridDim.x;
  const int64_t end = rows * (blockIdx.x + 1) / gridDim.x;
  while (row < end) {
    const int chunk = static_cast<int>(row / a.OH), first = static_cast<int>(row - int64_t{chunk} * a.OH);
    const int last = static_cast<int>(min(int64_t{a.OH}, first + (end - row)));
    f(chunk, first, last);
    row += last - first;
  }
}

// A thread has a vector of channels of two neighbouring outputs. It walks down the map and keeps the maxima of the row
// that two windows share in registers.
template <typename T, int K, Beta beta>
__global__ void __launch_bounds__(kNarrow, 3) tail_vectors(const Arguments a) {
  constexpr int length = kVector<T>, columns = K + 2;
  const int run = block_y() * a.runs_per_block + threadIdx.x;
  if (run >= a.runs) return;
  const Neighbours neighbours(a, run);
  const Rectifier<length + 4> rectify(a, run * length, length, neighbours);
  for_each_strip(a, a.pixels_per_block, [&](int chunk, int first, int last) {
    const int unit = chunk * a.pixels_per_block + threadIdx.y;
    if (unit >= a.units) return;
    const int n = a.by_columns.divide(unit), ow = 2 * (unit - n * ((a.OW + 1) / 2));
    const T* const x = opaque(static_cast<const T*>(a.x) + n * a.image + run * length);
    const int64_t to = n * a.out_image + ow * a.C + run * length;
    unsigned offset[columns];
#pragma unroll
    for (int j = 0; j < columns; ++j) offset[j] = min(2 * ow + j, a.W - 1) * a.C;
    // f(column, y / factor of the vector) for the columns of a row
    const auto for_each_column = [&](int h, auto f) {
      using X = Span<T, true, length, 2>;
      const unsigned row = min(h, a.H - 1) * a.W * a.C;
      const auto at = [&](int j) { return X(x + (row + offset[j]), Planes<true, 0>(0), neighbours); };
      const X xs[4] = {at(0), at(1), at(2), at(3)};
      const auto take = [&](const X& column, int j) {
        float v[length + 4], y[length];
        column.widen(v);
        rectify.apply(v);
        normalize<beta>(v, a.start, y);
        f(j, y);
      };
#pragma unroll
      for (int j = 0; j < 4; ++j) take(xs[j], j);
      if constexpr (K == 3) take(at(4), 4);
    };
    Largest shared[2][length];
    const auto start_row = [&](int h) {
      for_each_column(h, [&](int j, const float (&y)[length]) {
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          if (j < 2 * o || j >= 2 * o + K) continue;
#pragma unroll
          for (int i = 0; i < length; ++i) {
            if (j == 2 * o) shared[o][i] = {y[i], 0};
            else shared[o][i].take(y[i], j - 2 * o);
          }
        }
      });
    };
    if (K == 3) start_row(2 * first);
    for (int oh = first; oh < last; ++oh) {
      if (K == 2) start_row(2 * oh);
      Largest largest[2][length];
#pragma unroll
      for (int o = 0; o < 2; ++o) {
#pragma unroll
        for (int i = 0; i < length; ++i) largest[o][i] = shared[o][i];
      }
      for_each_column(2 * oh + 1, [&](int j, const float (&y)[length]) {
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          if (j < 2 * o || j >= 2 * o + K) continue;
#pragma unroll
          for (int i = 0; i < length; ++i) largest[o][i].take(y[i], K + j - 2 * o);
        }
      });
      if (K == 3) {
        start_row(2 * oh + 2);
#pragma unroll
        for (int o = 0; o < 2; ++o) {
#pragma unroll
          for (int i = 0; i < length; ++i) largest[o][i].take(shared[o][i].value, 2 * K + shared[o][i].place);
        }
      }
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        if (ow + o == a.OW) break;
        store_largest<T, true>(a, to + (int64_t{oh} * a.OW + o) * a.C, 0, largest[o]);
        float value[length];
#pragma unroll
        for (int i = 0; i < length; ++i) value[i] = largest[o][i].value;
        if (any_nan(value) && a.argmax) find_nan<T, true, length, beta, K>(a, n, oh, ow + o, run);
      }
    }
  });
}

// Elements `at` and at + 1 of each of a thread's planes and their neighbours; the next lane's begin at at + 2. The last
// lane of a warp has only the first.
template <typename T, int count>
struct Columns {
  float value[2][count];

  template <int length>
  FASTCNN_DEVICE Columns(const T* image, int at, bool wide, const Planes<false, count>& planes, Neighbours exist,
                         std::integral_constant<int, length>) {
    constexpr int around = (count - length) / 2;
    const auto exists = [&](int j) { return j < around ? exist.left : j < around + length || exist.right; };
    if constexpr (sizeof(T) == 4) {
      const T *const first = opaque(image + at), *const second = opaque(first + wide);
#pragma unroll
      for (int j = 0; j < count; ++j) {
        value[0][j] = exists(j) ? first[planes.offset[j]] : 0;
        value[1][j] = exists(j) ? second[planes.offset[j]] : 0;
      }
    } else {
      // Words of two elements, of which the first may be the second: in every plane, or in every other.
      const int odd[2] = {at & 1, (at + static_cast<int>(planes.offset[1])) & 1};
      const T* const first[2] = {opaque(image + (at - odd[0])), opaque(image + (at - odd[1]))};
      uint32_t word[count];
#pragma unroll
      for (int j = 0; j < count; ++j) {
        word[j] = exists(j) ? *reinterpret_cast<const uint32_t*>(first[j % 2] + planes.offset[j]) : 0;
      }
      const uint32_t selector[2] = {0x3210u ^ odd[0] * (0x3210 ^ 0x5432), 0x3210u ^ odd[1] * (0x3210 ^ 0x5432)};
#pragma unroll
      for (int j = 0; j < count; ++j) {
        const uint32_t pair = permute_bytes(word[j], __shfl_down_sync(~0u, word[j], 1), selector[j % 2]);
        value[0][j] = widen_low<T>(pair);
        value[1][j] = wide ? widen_high<T>(pair) : value[0][j];
      }
    }
  }
};

// A thread has kPlanes channels of two neighbouring columns of x and of the output whose window begins there; the
// window's next column comes from the next lane. The last lane of a warp only has a column for the lane before it.
template <typename T, int K, Beta beta>
__global__ void __launch_bounds__(kNarrow, 3) tail_planes(const Arguments a) {
  constexpr int length = kPlanes, lanes = 31, warps = kNarrow / 32;
  const int run = block_y(), lane = threadIdx.x % 32, stride = a.H * a.W, out_stride = a.OH * a.OW;
  if (run >= a.runs) return;
  const Neighbours neighbours(a, run);
  const Rectifier<length + 4> rectify(a, run * length, length, neighbours);
  const Planes<false, length + 4> planes(stride);
  for_each_strip(a, warps * lanes, [&](int chunk, int first, int last) {
    const int beyond = (chunk * warps + static_cast<int>(threadIdx.x) / 32) * lanes + lane;
    const int unit = min(beyond, a.units - 1);
    const int n = a.by_columns.divide(unit), ow = unit - n * (a.OW + 1);
    const bool mine = ow < a.OW && lane < lanes && beyond == unit;
    const T* const image = static_cast<const T*>(a.x) + n * a.image;
    const int column = (run * length - 2) * stride + min(2 * ow, a.W - 1);  // of the first plane, a neighbour
    const bool wide = (K == 3 && sizeof(T) == 2) || 2 * ow + 1 < a.W;       // no window of 3 begins in the last column
    const int64_t to = n * a.out_image + static_cast<int64_t>(run) * length * out_stride + ow;
    // Three columns of y / factor.
    const auto load = [&](int h, float (&y)[3][length]) {
      Columns<T, length + 4> x(image, column + min(h, a.H - 1) * a.W, wide, planes, neighbours,
                               std::integral_constant<int, length>());
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        rectify.apply(x.value[j]);
        normalize<beta>(x.value[j], a.start, y[j]);
      }
#pragma unroll
      for (int i = 0; i < length; ++i) y[2][i] = K == 3 ? __shfl_down_sync(~0u, y[0][i], 1) : 0;
    };
    Largest shared[length];
    const auto start_row = [&](int h) {
      float y[3][length];
      load(h, y);
#pragma unroll
      for (int i = 0; i < length; ++i) {
        shared[i] = {y[0][i], 0};
#pragma unroll
        for (int j = 1; j < K; ++j) shared[i].take(y[j][i], j);
      }
    };
    if (K == 3) start_row(2 * first);
    for (int oh = first; oh < last; ++oh) {
      if (K == 2) start_row(2 * oh);
      Largest largest[length];
      float y[3][length];
      load(2 * oh + 1, y);
#pragma unroll
      for (int i = 0; i < length; ++i) {
        largest[i] = shared[i];
#pragma unroll
        for (int j = 0; j < K; ++j) largest[i].take(y[j][i], K + j);
      }
      if (K == 3) {
        start_row(2 * oh + 2);
#pragma unroll
        for (int i = 0; i < length; ++i) largest[i].take(shared[i].value, 2 * K + shared[i].place);
      }
      if (!mine) continue;
      store_largest<T, false>(a, to + int64_t{oh} * a.OW, out_stride, largest);
      float value[length];
#pragma unroll
      for (int i = 0; i < length; ++i) value[i] = largest[i].value;
      if (any_nan(value) && a.argmax) find_nan<T, false, length, beta, K>(a, n, oh, ow, run);
    }
  });
}

// -- backward, NCHW ---------------------------------------------------------------------------------------------------

// Of shared memory: sums of eight channels of each lane, totals of each warp, and biases.
inline constexpr int kTotals = kNarrow / 32 * 8 * 33;  // where they begin
inline int floats_of_tail_backward(int channels) { return kTotals + kNarrow / 32 * channels + channels + 8; }

// A thread has a block of 2 x 2 elements that begins where a window does, and goes through `channels` channels of it:
// what the windows of channels share stays in registers. Dividing a group among blocks costs each of them four channels
// more on either side.
template <typename T, int K, Beta beta>
__global__ void __launch_bounds__(kNarrow, 3) tail_backward_planes(const Arguments a) {
  constexpr int batch = 4;  // channels that are loaded at once
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const sums = dynamic_shared<float>();  // of a thread's elements: [warp][(channel + 4) % 8][lane], and a column
  const unsigned own = opaque(static_cast<unsigned>(warp * 8 * 33 + lane));
  float* const biases = sums + kTotals + kNarrow / 32 * a.channels;  // from the first channel that is loaded
  const int group = a.C / a.runs * a.runs_per_group;
  const int from = block_y() * a.channels;  // the first channel
  if (from >= a.C) return;
  const int group_begin = from / group * group, group_end = group_begin + group;
  const int begin = max(from - 4, group_begin), end = min(from + a.channels + 4, group_end);
  const int rows = (a.H + 1) / 2, columns = (a.W + 1) / 2, stride = a.H * a.W, out_stride = a.OH * a.OW;
  for (int i = threadIdx.x; i < kNarrow / 32 * a.channels; i += kNarrow) sums[kTotals + i] = 0;
  for (int c = begin + threadIdx.x; c < end; c += kNarrow) {
    biases[c - begin] = a.bias ? static_cast<const float*>(a.bias)[c] : -0.0f;
  }
  __syncthreads();
  for (int first = blockIdx.x * kNarrow; first < a.units; first += gridDim.x * kNarrow) {
    const bool active = first + static_cast<int>(threadIdx.x) < a.units;
    const int unit = min(first + static_cast<int>(threadIdx.x), a.units - 1);
    const int row = a.by_columns.divide(unit), ow = unit - row * columns;
    const int n = a.by_rows.divide(row), oh = row - n * rows;
    const bool wide = 2 * ow + 1 < a.W, high = 2 * oh + 1 < a.H;
    const T* const x = opaque(static_cast<const T*>(a.x) + n * a.image);
    T* const out = opaque(static_cast<T*>(a.out) + n * a.image);
    const T* const dy = opaque(static_cast<const T*>(a.dy) + n * a.out_image);
    const uint8_t* const argmax = opaque(static_cast<const uint8_t*>(a.argmax) + n * a.out_image);
    // Of elements and windows in two rows each, the first of a row. Rows of windows beyond the map repeat another.
    unsigned element[2] = {2u * oh * a.W + 2 * ow, (2u * oh + high) * a.W + 2 * ow};
    unsigned window[2] = {min(oh, a.OH - 1) * a.OW + unsigned(ow), max(oh - 1, 0) * a.OW + unsigned(ow)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      element[i] += begin * stride, window[i] += begin * out_stride;
    }
    const bool right = ow < a.OW, left = K == 3 && ow > 0;
    // 0; of a window that does not exist, more than any place.
    const auto absent_unless = [&](bool exists) { return active && exists ? 0 : 256; };
    const int absent[4] = {absent_unless(right && oh < a.OH), absent_unless(left && oh < a.OH),
                           absent_unless(right && oh > 0), absent_unless(left && oh > 0)};

    // Of each element, for the last four channels: v = relu(x + bias), pairs of squares (each with half of what sums
    // start from), the gradient g of y, g * s^-beta, q = g * v * s^-(beta + 1), and pairs of q. Channel c is at c % 4.
    float v[4][4] = {}, squares[4][4], g[4][4] = {}, scaled[4][4] = {}, q[4][4] = {}, pairs[4][4] = {};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
#pragma unroll
      for (int i = 0; i < 4; ++i) squares[e][i] = a.half_start;
    }
    const unsigned mine = opaque(active * (1u | wide << 1 | high << 2 | (wide && high) << 3));
    // Take channel c1 + i, of which x and the gradients of y are given; channel c1 + i - 4 is complete.
    const auto advance = [&](int c1, int i, const float (&z)[4], const float (&gradient)[4]) {
      float dx[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const auto back = [&](const float (&ring)[4][4], int by) { return ring[e][(i + 4 - by) % 4]; };
        const float last = v[e][i], middle = back(v, 2);
        v[e][i] = z[e];
        g[e][i] = gradient[e];
        squares[e][i] = z[e] * z[e] + (back(v, 1) * back(v, 1) + a.half_start);
        float r;
        const float t = power<beta>(middle * middle + (back(squares, 3) + back(squares, 0)), r);
        scaled[e][i] = back(g, 2) * t;
        q[e][i] = back(scaled, 0) * (middle * (r * r));
        pairs[e][i] = back(q, 0) + back(q, 1);
        const float q_sum = back(q, 2) + (back(pairs, 3) + back(pairs, 0));
        dx[e] = a.factor * (back(scaled, 2) - a.twice_beta * last * q_sum);
        if (last <= a.blocked) dx[e] = 0;
      }
      sums[opaque(own + (c1 & 4) * 33) + i * 33] = (dx[0] + dx[1]) + (dx[2] + dx[3]);
      const unsigned stored = c1 > from ? mine : 0;
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        T* const to = opaque(out + (element[e / 2] - (8 - i) * stride));  // it is four channels ahead by now
        T two[2];
        narrow_two(dx[e], dx[e + 1], two);
        if (stored & 1 << e) to[0] = two[0];
        if (stored & 2 << e) to[1] = two[1];
      }
    };
    // Add up the sums of the eight channels before c, each by four lanes.
    const auto add_up = [&](int c) {
      __syncwarp();
      const int thread = computed_here(threadIdx.x), lane = thread % 32, warp = thread / 32;
      float* const totals = sums + kTotals + warp * a.channels;
      float sum = 0;
#pragma unroll
      for (int other = 0; other < 8; ++other) sum += sums[warp * 8 * 33 + lane / 4 * 33 + lane % 4 * 8 + other];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 0) totals[c - 8 + (lane / 4 ^ 4) - from] += sum;
      __syncwarp();
    };
    for (int c1 = begin; c1 < end; c1 += batch) {
      float xs[batch][4], dys[batch][4];
      int places[batch][4];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const T* const from_row = x + element[e / 2];
          xs[k][e] = e % 2 == 0 || wide ? widen(from_row[e % 2]) : 0;
        }
#pragma unroll
        for (int w = 0; w < (K == 3 ? 4 : 1); ++w) {
          const bool exists = w % 2 ? left : right;
          dys[k][w] = widen(load_if(exists, dy + window[w / 2] - w % 2));
          places[k][w] = load_if(exists, argmax + window[w / 2] - w % 2);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) element[i] += stride, window[i] += out_stride;
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const auto is = [&](int w, int place) { return ((places[k][w] ^ place) | absent[w]) == 0; };
        const auto add = [&](float& to, int w, int place) {
          if (is(w, place)) to += dys[k][w];
        };
        const float bias = biases[c1 + k - begin];
        float z[4], gradient[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          z[e] = max_or_nan(xs[k][e] + bias, a.lowest);
          gradient[e] = is(0, e % 2 + e / 2 * K) ? dys[k][0] : 0;
        }
        if constexpr (K == 3) {
          add(gradient[0], 1, 2), add(gradient[0], 2, 6), add(gradient[0], 3, 8);
          add(gradient[1], 2, 7);
          add(gradient[2], 1, 5);
        }
        advance(c1, k, z, gradient);
      }
      if (a.partials && c1 > from && (c1 - from) % 8 == 0) add_up(c1);
    }
    if (end == group_end) {  // what follows the group counts as zero
      const float nothing[4] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) element[i] += 4 * stride;
#pragma unroll
      for (int i = 0; i < 4; ++i) advance(group_end, i, nothing, nothing);
      if (a.partials) add_up(group_end);
    }
  }
  if (!a.partials) return;
  __syncthreads();
  for (int c = threadIdx.x; c < a.channels; c += kNarrow) {
    float sum = 0;
    for (int w = 0; w < kNarrow / 32; ++w) sum += sums[kTotals + w * a.channels + c];
    static_cast<float*>(a.partials)[static_cast<int64_t>(blockIdx.x) * a.C + from + c] = sum;
  }
}

}  // namespace fastcnn::cuda::fast
