// Convolution with 3x3 windows by Winograd's minimal filtering F(2x2, 3x3): 16 products for 4 outputs instead of 36;
// and with 5x5 windows, which are the sum of four smaller ones: 49 products instead of 100.
//
// A tile is 2x2 outputs, from 4x4 inputs of 3x3 windows. A block of tiles at a time: transform the inputs, B' d B, to
// 16 matrices of tiles x channels; multiply each by its matrix of transformed weights; transform the products back, A'
// m A, and add the bias, rectify and pool on the way out. Memory: a block's matrices stay in cache, so the input is
// read once for each piece of the window and the output written once; the weights, about twice their size, are read
// once a block.
//
// Source: Lavin and Gray (2016), Fast Algorithms for Convolutional Neural Networks.
#include "kernel.h"
#include "scratch.h"
#include "winograd_blocks.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

constexpr int64_t kPanel = 64;  // as many outputs at most

constexpr int64_t kDepth = 128;  // this many rows of weights stay in the L1 cache

// sums[rows x columns] = a[rows x depth] * b[depth x columns]; b and sums are dense. columns is 16, 32, 48 or 64.
// `between` is called between any two blocks of rows.
template <typename Between>
void multiply(const float* a, int64_t a_stride, const float* b, int64_t rows, int64_t depth, int64_t columns,
              float* sums, const Between& between) {
  for (int64_t c = 0; c < depth; c += kDepth, a += kDepth, b += kDepth * columns) {
    for (int64_t r = 0; r < rows; r += kRows) {
      between();
      in_columns(columns, [&](auto number, int64_t j) FASTCNN_INLINE_LAMBDA {
        multiply_rows<kRows, number.value>(a + r * a_stride, a_stride, 1, b + j, columns, std::min(kDepth, depth - c),
                                           sums + r * columns + j, columns, c > 0);
      });
    }
  }
}

// From m: a matrix of tiles x columns for each product, which are the outputs from `first` on. What other pieces of the
// window add lies in `sums`, tile by tile.
template <typename P, bool masked>
void transform_output(const WinogradTask& task, int64_t begin, int64_t end, int64_t first, int64_t columns,
                      const float* m, int64_t plane, float* sums, bool is_last, IntVec<float>& largest) {
  constexpr int down = P::products_down, across = P::products_across;
  constexpr bool is_first = P::y == 0 && P::x == 0;
  const int64_t K = task.outputs;
  for (int64_t i = begin; i < end; ++i, m += columns) {
    const Position tile = position_of(task, i);
    const bool right = tile.x + 1 < task.out_w, below = tile.y + 1 < task.out_h;  // those outputs are in the map
    for (int64_t k = 0; k < columns; k += kLane) {
      Floats s[2][across], out[2][2];
      for (int x = 0; x < across; ++x) {
        Floats products[down], both[2];
        for (int y = 0; y < down; ++y) products[y] = load(m + (y * across + x) * plane + k);
        outputs_of(products, both);
        s[0][x] = both[0], s[1][x] = both[1];
      }
      const Floats bias = task.bias && is_last ? load(task.bias + first + k) : Floats{};
      for (int y = 0; y < 2; ++y) {
        outputs_of(s[y], out[y]);
        for (int x = 0; x < 2; ++x) {
          float* const sum = sums + ((i - begin) * 4 + 2 * y + x) * K + first + k;
          if (!is_first) out[y][x] += load(sum);
          if (!is_last) store(sum, out[y][x]);
          out[y][x] += bias;
        }
      }
      if (!is_last) continue;
      for (int y = 0; y < 2; ++y)
        for (int x = 0; x < 2; ++x) {
          if ((y && !below) || (x && !right)) continue;
          keep_larger(largest, out[y][x]);
          const int64_t pixel = (tile.n * task.out_h + tile.y + y) * task.out_w + tile.x + x;
          if (task.addend) out[y][x] += load(task.addend + pixel * K + first + k);
          if (task.relu) out[y][x] = out[y][x] < 0 ? Floats{} : out[y][x];  // NaN of the addend stays
          if (task.pool) continue;
          store(task.out + pixel * task.out_stride + first + k, out[y][x]);
          if (masked) store_bits(task.out_mask, pixel * K + first + k, passing<float>(out[y][x]));
        }
      if (task.pool && right && below) {
        const Floats up = out[0][0] > out[0][1] ? out[0][0] : out[0][1];
        const Floats low = out[1][0] > out[1][1] ? out[1][0] : out[1][1];
        const int64_t at = (tile.n * (task.out_h / 2) + tile.y / 2) * (task.out_w / 2) + tile.x / 2;
        store(task.out + at * task.out_stride + first + k, up > low ? up : low);
      }
    }
  }
}

// Elements of the sums of a tile, where there are any.
int64_t sums_of_tile(const WinogradTask& task) { return pieces(task.window) > 1 ? 4 * task.outputs : 0; }

// Tiles of a block: few enough that their matrices stay in cache, but a few dozen, or the weights are read too often.
int64_t block_tiles(const WinogradTask& task) {
  constexpr int64_t kBytes = 768 << 10;
  const int64_t elements = kMostProducts * (task.shape.C + kPanel) + sums_of_tile(task);
  return std::clamp<int64_t>(kBytes / elements / sizeof(float), 48, 192) / kRows * kRows;
}

int64_t units(const WinogradTask& task) { return (tiles(task) + kRows - 1) / kRows; }

struct Block {
  float *v, *m, *sums;
};

Block block_of(const WinogradTask& task, int64_t rows, Scratch& scratch) {
  float* const v = scratch.take<float>(kMostProducts * plane_of(rows, task.shape.C));
  float* const m = scratch.take<float>(kMostProducts * plane_of(rows, kPanel));
  return {v, m, scratch.take<float>(rows * sums_of_tile(task))};
}

int64_t scratch_bytes(const WinogradTask& task) {
  Scratch scratch(nullptr);
  block_of(task, block_tiles(task), scratch);
  return scratch.used();
}

void run(const WinogradTask& task, int64_t begin, int64_t end, void* scratch) {
  const int64_t C = task.shape.C / task.groups, K = task.outputs / task.groups;
  const int64_t last = std::min(end * kRows, tiles(task));
  const int64_t blocks = ((end - begin) * kRows + block_tiles(task) - 1) / block_tiles(task);
  const int64_t step = (end - begin + blocks - 1) / blocks * kRows;
  IntVec<float> largest{};
  for (int64_t first = begin * kRows; first < last; first += step) {
    const int64_t count = std::min(step, last - first), rows = (count + kRows - 1) / kRows * kRows;
    const int64_t v_plane = plane_of(rows, task.shape.C);
    Scratch memory(scratch);
    const Block block = block_of(task, rows, memory);
    const float* weight = task.weight;
    const int64_t products = winograd_products(task.window) * task.groups * panels(K, kPanel);
    const int64_t of_product = row_blocks(rows) * ((C + kDepth - 1) / kDepth);
    Prefetcher prefetcher(task, first + step, std::min(first + 2 * step, last), products * of_product);
    const auto between = [&] {
      prefetcher.step([&](const Position& tile, int64_t y, int64_t x) FASTCNN_INLINE_LAMBDA {
        const Shape& s = task.shape;
        const int64_t h = tile.y + y + task.window - 1 - task.padding[0],
                      w = tile.x + x + task.window - 1 - task.padding[1];
        Prefetcher::ask(task.x, ((tile.n * s.H + h) * s.W + w) * s.C, s.C);
      });
    };
    const auto run_piece = [&](auto piece, bool is_last) {
      using P = decltype(piece);
      const auto transform = task.x_mask ? transform_input<P, true> : transform_input<P, false>;
      transform(task, task.x_mask, first, first + count, 0, task.shape.C, block.v, v_plane);
      for (int i = 0; i < P::products; ++i)  // padding rows are ignored; zero them so that denormals slow no product
        std::fill_n(block.v + i * v_plane + count * task.shape.C, (rows - count) * task.shape.C, 0.0f);
      for (int64_t g = 0; g < task.groups; ++g)
        for (int64_t p = 0; p < panels(K, kPanel); ++p) {
          const int64_t from = panel_begin(K, kPanel, p), columns = panel_begin(K, kPanel, p + 1) - from;
          const int64_t m_plane = plane_of(rows, columns);
          for (int i = 0; i < P::products; ++i, weight += C * columns)
            multiply(block.v + i * v_plane + g * C, task.shape.C, weight, rows, C, columns, block.m + i * m_plane,
                     between);
          (task.out_mask ? transform_output<P, true>
                         : transform_output<P, false>)(task, first, first + count, g * K + from, columns, block.m,
                                                       m_plane, block.sums, is_last, largest);
        }
    };
    for (int64_t i = 0; i < pieces(task.window); ++i)
      with_piece(i, [&](auto piece) { run_piece(piece, i + 1 == pieces(task.window)); });
  }
  report(largest, *task.largest);
}

int64_t units_of_piece(const WinogradWeightTask& task) {
  return task.groups * panels(task.outputs, kPanel) * task.channels;
}

int64_t weight_units(const WinogradWeightTask& task) { return pieces(task.window) * units_of_piece(task); }

// G g G', in double, for one channel of one panel.
template <typename P>
void transform_weight(const WinogradWeightTask& task, int64_t unit, float* out) {
  using Doubles = Vec<double>;
  constexpr int64_t kSome = kLanes<double>;
  constexpr int down = P::products_down, across = P::products_across;
  const int64_t C = task.channels, K = task.outputs;
  const int64_t c = unit % C, p = unit / C % panels(K, kPanel), g = unit / C / panels(K, kPanel);
  const int64_t from = panel_begin(K, kPanel, p), columns = panel_begin(K, kPanel, p + 1) - from, plane = C * columns;
  const float* in = task.weight + g * task.stride[0] + from * task.stride[1] + c * task.stride[2] +
                    P::y * task.stride[3] + P::x * task.stride[4];
  out += P::products * C * (g * K + from) + c * columns;
  for (int64_t k = 0; k < columns; k += kSome, in += kSome * task.stride[1]) {
    Doubles w[P::rows][P::columns], changed[down][across];
    for (int y = 0; y < P::rows; ++y)
      for (int x = 0; x < P::columns; ++x)
        for (int64_t l = 0; l < kSome; ++l)
          w[y][x][l] = in[l * task.stride[1] + y * task.stride[3] + x * task.stride[4]];
    both_axes(w, changed, [](const auto& in, auto& out) FASTCNN_INLINE_LAMBDA { weight_points(in, out); });
    for (int y = 0; y < down; ++y)
      for (int x = 0; x < across; ++x)
        for (int64_t l = 0; l < kSome; ++l)
          out[(y * across + x) * plane + k + l] = static_cast<float>(changed[y][x][l]);
  }
}

void run_weight(const WinogradWeightTask& task, int64_t begin, int64_t end, void*) {
  float* out = task.out;
  for (int64_t i = 0; i < pieces(task.window); ++i)
    with_piece(i, [&](auto piece) {
      using P = decltype(piece);
      const int64_t before = i * units_of_piece(task);
      for (int64_t unit = std::max(begin, before); unit < std::min(end, before + units_of_piece(task)); ++unit)
        transform_weight<P>(task, unit - before, out);
      out += P::products * task.groups * task.outputs * task.channels;
    });
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(winograd, WinogradTask, units, scratch_bytes, run)
FASTCNN_REGISTER_KERNEL(winograd_weight, WinogradWeightTask, weight_units, nullptr, run_weight)
