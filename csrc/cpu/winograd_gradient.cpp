// The weight gradient of a convolution with 3x3 windows by Winograd's minimal filtering F(3x3, 2x2): 16 products for
// the 9 elements of a window instead of 36.
//
// A tile is 2x2 outputs, from 4x4 inputs, as in the convolution, whose transpose this is. A block of tiles at a time,
// for a panel of channels and one of outputs: transform the inputs, B' d B, and the gradients, A e A', to 16 matrices
// each, of tiles x channels and tiles x outputs; add their products, outputs x channels, to 16 sums; at last transform
// the sums, G' m G. Memory: sums and matrices stay in cache. The input is read, and transformed, once for each panel of
// outputs, the gradient once for each panel of channels, from a cache unless a part of the tiles is large.
//
// A sum is of blocks, each of which is summed up by itself, and then of parts: so its error hardly grows with the
// number of tiles. What is summed up in which order does not depend on the number of threads.
//
// Source: Lavin and Gray (2016), Fast Algorithms for Convolutional Neural Networks.
#include "kernel.h"
#include "scratch.h"
#include "winograd_blocks.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

constexpr int64_t kTiles = 64;   // of a block
constexpr int64_t kSummed = 16;  // tiles whose products are summed up by themselves
constexpr int64_t kPanel = 128;  // as many channels, or outputs, at most
constexpr int kRows = 4;         // of a product at a time

// To z: 16 matrices of tiles x columns, which are the outputs from `first` on.
template <bool masked>
void transform_gradient(const WinogradGradientTask& task, int64_t begin, int64_t end, int64_t first, int64_t columns,
                        float* z, int64_t plane) {
  for (int64_t i = begin; i < end; ++i, z += columns) {
    const Position tile = position_of(task, i);
    const bool right = tile.x + 1 < task.out_w, below = tile.y + 1 < task.out_h;  // those are in the map
    const int64_t at = ((tile.n * task.out_h + tile.y) * task.out_w + tile.x) * task.outputs + first;
    for (int64_t k = 0; k < columns; k += kLane) {
      const auto gradient = [&](bool inside, int64_t pixel) FASTCNN_INLINE_LAMBDA {
        if (!inside) return Floats{};
        const int64_t element = at + pixel * task.outputs + k;
        const Floats loaded = load(task.dy + element);
        return masked ? where_set<float>(load_bits(task.dy_mask, element), loaded) : loaded;
      };
      const Floats e[2][2] = {{gradient(true, 0), gradient(right, 1)},
                              {gradient(below, task.out_w), gradient(right && below, task.out_w + 1)}};
      for (int y = 0; y < 4; ++y) {
        Floats row[2];
        for (int x = 0; x < 2; ++x)
          row[x] = y == 0 ? e[0][x] : y == 1 ? e[0][x] + e[1][x] : y == 2 ? e[0][x] - e[1][x] : -e[1][x];
        store(z + (4 * y + 0) * plane + k, row[0]);
        store(z + (4 * y + 1) * plane + k, row[0] + row[1]);
        store(z + (4 * y + 2) * plane + k, row[0] - row[1]);
        store(z + (4 * y + 3) * plane + k, -row[1]);
      }
    }
  }
}

// G' m G of 16 sums of outputs x channels, `plane` elements apart.
void transform_sums(const float* m, int64_t plane, int64_t outputs, int64_t channels, float* dw, const int64_t* stride,
                    IntVec<float>& largest) {
  for (int64_t k = 0; k < outputs; ++k, dw += stride[1])
    for (int64_t c = 0; c < channels; c += kLane, m += kLane) {
      Floats rows[3][4];
      for (int x = 0; x < 4; ++x) {
        const Floats m1 = load(m + (4 + x) * plane), m2 = load(m + (8 + x) * plane), half = (m1 + m2) * 0.5f;
        rows[0][x] = load(m + x * plane) + half;
        rows[1][x] = (m1 - m2) * 0.5f;
        rows[2][x] = half + load(m + (12 + x) * plane);
      }
      for (int y = 0; y < 3; ++y) {
        const Floats half = (rows[y][1] + rows[y][2]) * 0.5f;
        const Floats w[3] = {rows[y][0] + half, (rows[y][1] - rows[y][2]) * 0.5f, half + rows[y][3]};
        for (int x = 0; x < 3; ++x) {
          keep_larger(largest, w[x]);
          float* const to = dw + c * stride[2] + y * stride[3] + x * stride[4];
          if (stride[2] == 1) store(to, w[x]);
          else
            for (int l = 0; l < kLane; ++l) to[l * stride[2]] = w[x][l];
        }
      }
    }
}

int64_t units(const WinogradGradientTask& task) {
  return task.parts * task.groups * panels(task.outputs / task.groups, kPanel) *
         panels(task.shape.C / task.groups, kPanel);
}

int64_t scratch_bytes(const WinogradGradientTask&) {
  return 16 * (2 * plane_of(kTiles, kPanel) + plane_of(kPanel, kPanel)) * static_cast<int64_t>(sizeof(float));
}

void run(const WinogradGradientTask& task, int64_t begin, int64_t end, void* scratch) {
  const int64_t C = task.shape.C / task.groups, K = task.outputs / task.groups;
  IntVec<float> largest{};
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t of_channels = panels(C, kPanel), of_outputs = panels(K, kPanel);
    const int64_t channel_panel = unit % of_channels, output_panel = unit / of_channels % of_outputs;
    const int64_t group = unit / of_channels / of_outputs % task.groups;
    const int64_t part = unit / of_channels / of_outputs / task.groups;
    const int64_t c = panel_begin(C, kPanel, channel_panel), channels = panel_begin(C, kPanel, channel_panel + 1) - c;
    const int64_t k = panel_begin(K, kPanel, output_panel), outputs = panel_begin(K, kPanel, output_panel + 1) - k;
    const int64_t last = tiles(task) * (part + 1) / task.parts, start = tiles(task) * part / task.parts;
    const int64_t v_plane = plane_of(kTiles, channels), z_plane = plane_of(kTiles, outputs);
    const int64_t m_plane = plane_of(outputs, channels);
    float* const db = task.db && channel_panel == 0 ? task.db + part * task.outputs + group * K + k : nullptr;
    if (db) std::fill_n(db, outputs, 0.0f);
    Scratch pieces(scratch);
    float* const v = pieces.take<float>(16 * v_plane);
    float* const z = pieces.take<float>(16 * z_plane);
    float* const m = pieces.take<float>(16 * m_plane);
    for (int64_t first = start; first < last; first += kTiles) {
      const int64_t next = std::min(first + kTiles, last);
      transform_input<false>(task, nullptr, first, next, group * C + c, channels, v, v_plane);
      (task.dy_mask ? transform_gradient<true> : transform_gradient<false>)(task, first, next, group * K + k, outputs,
                                                                            z, z_plane);
      for (int i = 0; i < 16; ++i)
        for (int64_t r = 0; r < outputs; r += kRows)
          in_columns(channels, [&](auto number, int64_t j) FASTCNN_INLINE_LAMBDA {
            for (int64_t t = 0; t < next - first; t += kSummed)
              multiply_rows<kRows, number.value>(z + i * z_plane + t * outputs + r, 1, outputs,
                                                 v + i * v_plane + t * channels + j, channels,
                                                 std::min(kSummed, next - first - t),
                                                 m + i * m_plane + r * channels + j, channels, t > 0 || first > start);
          });
      // One of the matrices has each tile's sum.
      for (int64_t j = 0; db && j < outputs; j += kLane)
        for (int64_t t = 0; t < next - first; t += kSummed) {
          Floats sum{};
          for (int64_t i = t; i < std::min(t + kSummed, next - first); ++i)
            sum += load(z + 5 * z_plane + i * outputs + j);
          store(db + j, load(db + j) + sum);
        }
    }
    float* const dw = task.dw + part * task.stride[0] + (group * K + k) * task.stride[1] + c * task.stride[2];
    transform_sums(m, m_plane, outputs, channels, dw, task.stride, largest);
  }
  report(largest, *task.largest);
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(winograd_gradient, WinogradGradientTask, units, scratch_bytes, run)
