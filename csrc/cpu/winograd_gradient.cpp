// The weight gradient of a convolution with 3x3 windows by Winograd's minimal filtering F(3x3, 2x2): 16 products for
// the 9 elements of a window instead of 36; with 5x5 windows, the same for each of their pieces: 49 instead of 100.
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
#include <utility>

#include "kernel.h"
#include "scratch.h"
#include "winograd_blocks.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

constexpr int64_t kTiles = 64;   // of a block
constexpr int64_t kSummed = 16;  // tiles whose products are summed up by themselves
constexpr int64_t kPanel = 128;  // as many channels, or outputs, at most

// m = z' v, or m += z' v: outputs x channels, of this many tiles. `between` is called between any two blocks of rows.
template <typename Between>
void multiply(const float* z, int64_t outputs, const float* v, int64_t channels, int64_t tiles, float* m, bool add,
              const Between& between) {
  in_rows(outputs, [&](auto rows, int64_t r) FASTCNN_INLINE_LAMBDA {
    between();
    in_columns(channels, [&](auto number, int64_t j) FASTCNN_INLINE_LAMBDA {
      for (int64_t t = 0; t < tiles; t += kSummed)
        multiply_rows<rows.value, number.value>(z + t * outputs + r, 1, outputs, v + t * channels + j, channels,
                                                std::min(kSummed, tiles - t), m + r * channels + j, channels,
                                                add || t > 0);
    });
  });
}

// To z: a matrix of tiles x columns for each product, which are the outputs from `first` on.
template <typename P, bool masked>
void transform_gradient(const WinogradGradientTask& task, int64_t begin, int64_t end, int64_t first, int64_t columns,
                        float* z, int64_t plane) {
  constexpr int down = P::products_down, across = P::products_across;
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
      Floats changed[down][across];
      both_axes(e, changed, [](const auto& in, auto& out) FASTCNN_INLINE_LAMBDA { gradient_points(in, out); });
      for (int y = 0; y < down; ++y)
        for (int x = 0; x < across; ++x) store(z + (y * across + x) * plane + k, changed[y][x]);
    }
  }
}

// G' m G of a sum of outputs x channels for each product, `plane` elements apart.
template <typename P>
void transform_sums(const float* m, int64_t plane, int64_t outputs, int64_t channels, float* dw, const int64_t* stride,
                    IntVec<float>& largest) {
  constexpr int down = P::products_down, across = P::products_across;
  for (int64_t k = 0; k < outputs; ++k, dw += stride[1])
    for (int64_t c = 0; c < channels; c += kLane, m += kLane) {
      Floats sums[down][across], w[P::rows][P::columns];
      for (int y = 0; y < down; ++y)
        for (int x = 0; x < across; ++x) sums[y][x] = load(m + (y * across + x) * plane);
      both_axes(sums, w, [](const auto& in, auto& out) FASTCNN_INLINE_LAMBDA { weights_of(in, out); });
      for (int y = 0; y < P::rows; ++y)
        for (int x = 0; x < P::columns; ++x) {
          keep_larger(largest, w[y][x]);
          float* const to = dw + c * stride[2] + (P::y + y) * stride[3] + (P::x + x) * stride[4];
          if (stride[2] == 1) store(to, w[y][x]);
          else
            for (int l = 0; l < kLane; ++l) to[l * stride[2]] = w[y][x][l];
        }
    }
}

int64_t units(const WinogradGradientTask& task) {
  return task.parts * pieces(task.window) * task.groups * panels(task.outputs / task.groups, kPanel) *
         panels(task.shape.C / task.groups, kPanel);
}

int64_t scratch_bytes(const WinogradGradientTask&) {
  return kMostProducts * (2 * plane_of(kTiles, kPanel) + plane_of(kPanel, kPanel)) *
         static_cast<int64_t>(sizeof(float));
}

// A panel of outputs, from the group's k on, and one of channels, from c on, in one part of the tiles.
template <typename P>
void run_piece(const WinogradGradientTask& task, int64_t part, int64_t group, int64_t k, int64_t outputs, int64_t c,
               int64_t channels, void* scratch, IntVec<float>& largest) {
  const int64_t C = task.shape.C / task.groups, K = task.outputs / task.groups;
  const int64_t last = tiles(task) * (part + 1) / task.parts, start = tiles(task) * part / task.parts;
  const int64_t v_plane = plane_of(kTiles, channels), z_plane = plane_of(kTiles, outputs);
  const int64_t m_plane = plane_of(outputs, channels);
  const bool finds_bias = task.db && c == 0 && P::y == 0 && P::x == 0;
  float* const db = finds_bias ? task.db + part * task.outputs + group * K + k : nullptr;
  if (db) std::fill_n(db, outputs, 0.0f);
  Scratch memory(scratch);
  float* const v = memory.take<float>(P::products * v_plane);
  float* const z = memory.take<float>(P::products * z_plane);
  float* const m = memory.take<float>(P::products * m_plane);
  for (int64_t first = start; first < last; first += kTiles) {
    const int64_t next = std::min(first + kTiles, last);
    transform_input<P, false>(task, nullptr, first, next, group * C + c, channels, v, v_plane);
    (task.dy_mask ? transform_gradient<P, true> : transform_gradient<P, false>)(task, first, next, group * K + k,
                                                                                outputs, z, z_plane);
    Prefetcher prefetcher(task, next, std::min(next + kTiles, last), P::products * row_blocks(outputs));
    const auto between = [&] {
      prefetcher.step([&](const Position& tile, int64_t y, int64_t x) FASTCNN_INLINE_LAMBDA {
        const int64_t pixel = (tile.n * task.out_h + tile.y + y) * task.out_w + tile.x + x;
        Prefetcher::ask(task.dy, pixel * task.outputs + group * K + k, outputs);
        const int64_t h = tile.y + y + P::y + 2 - task.padding[0], w = tile.x + x + P::x + 2 - task.padding[1];
        Prefetcher::ask(task.x, ((tile.n * task.shape.H + h) * task.shape.W + w) * task.shape.C + group * C + c,
                        channels);
      });
    };
    for (int i = 0; i < P::products; ++i)
      multiply(z + i * z_plane, outputs, v + i * v_plane, channels, next - first, m + i * m_plane, first > start,
               between);
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
  transform_sums<P>(m, m_plane, outputs, channels, dw, task.stride, largest);
}

void run(const WinogradGradientTask& task, int64_t begin, int64_t end, void* scratch) {
  const int64_t C = task.shape.C / task.groups, K = task.outputs / task.groups;
  IntVec<float> largest{};
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t rest = unit;
    const auto next = [&](int64_t count) { return std::exchange(rest, rest / count) % count; };
    const int64_t channel_panel = next(panels(C, kPanel)), output_panel = next(panels(K, kPanel));
    const int64_t group = next(task.groups), piece = next(pieces(task.window));
    const int64_t c = panel_begin(C, kPanel, channel_panel), channels = panel_begin(C, kPanel, channel_panel + 1) - c;
    const int64_t k = panel_begin(K, kPanel, output_panel), outputs = panel_begin(K, kPanel, output_panel + 1) - k;
    with_piece(piece, [&](auto of_window) {
      run_piece<decltype(of_window)>(task, rest, group, k, outputs, c, channels, scratch, largest);
    });
  }
  report(largest, *task.largest);
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(winograd_gradient, WinogradGradientTask, units, scratch_bytes, run)
