// Convolution with 3x3 windows by Winograd's minimal filtering F(2x2, 3x3): 16 products for 4 outputs instead of 36.
//
// A tile is 2x2 outputs, from 4x4 inputs. A block of tiles at a time: transform the inputs, B' d B, to 16 matrices of
// tiles x channels; multiply each by its matrix of transformed weights; transform the products back, A' m A, and add
// the bias, rectify and pool on the way out. Memory: a block's matrices stay in cache, so the input is read once and
// the output written once; the weights, 16/9 of their size, are read once a block.
//
// Source: Lavin and Gray (2016), Fast Algorithms for Convolutional Neural Networks.
#include "kernel.h"
#include "scratch.h"
#include "winograd_blocks.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

constexpr int64_t kRows = 6;    // of a product at a time, which are the tiles of a unit
constexpr int64_t kPanel = 64;  // as many outputs at most

// sums[rows x columns] = a[rows x depth] * b[depth x columns]; b and sums are dense. columns is 16, 32, 48 or 64.
void multiply(const float* a, int64_t a_stride, const float* b, int64_t rows, int64_t depth, int64_t columns,
              float* sums) {
  constexpr int64_t kDepth = 128;  // this many rows of b stay in the L1 cache
  for (int64_t c = 0; c < depth; c += kDepth, a += kDepth, b += kDepth * columns) {
    for (int64_t r = 0; r < rows; r += kRows)
      in_columns(columns, [&](auto number, int64_t j) FASTCNN_INLINE_LAMBDA {
        multiply_rows<kRows, number.value>(a + r * a_stride, a_stride, 1, b + j, columns, std::min(kDepth, depth - c),
                                           sums + r * columns + j, columns, c > 0);
      });
  }
}

// From m: 16 matrices of tiles x columns, which are the outputs from `first` on.
template <bool masked>
void transform_output(const WinogradTask& task, int64_t begin, int64_t end, int64_t first, int64_t columns,
                      const float* m, int64_t plane, IntVec<float>& largest) {
  const int64_t K = task.outputs;
  for (int64_t i = begin; i < end; ++i, m += columns) {
    const Position tile = position_of(task, i);
    const bool right = tile.x + 1 < task.out_w, below = tile.y + 1 < task.out_h;  // those outputs are in the map
    for (int64_t k = 0; k < columns; k += kLane) {
      Floats s[2][4], out[2][2];
      for (int x = 0; x < 4; ++x) {
        const Floats m0 = load(m + x * plane + k), m1 = load(m + (4 + x) * plane + k);
        const Floats m2 = load(m + (8 + x) * plane + k), m3 = load(m + (12 + x) * plane + k);
        s[0][x] = m0 + m1 + m2;
        s[1][x] = m1 - m2 - m3;
      }
      const Floats bias = task.bias ? load(task.bias + first + k) : Floats{};
      for (int y = 0; y < 2; ++y) {
        out[y][0] = s[y][0] + s[y][1] + s[y][2] + bias;
        out[y][1] = s[y][1] - s[y][2] - s[y][3] + bias;
      }
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

// Tiles of a block: few enough that their matrices stay in cache, but a few dozen, or the weights are read too often.
int64_t block_tiles(const WinogradTask& task) {
  constexpr int64_t kBytes = 768 << 10;
  const int64_t most = kBytes / (16 * sizeof(float)) / (task.shape.C + kPanel);
  return std::clamp<int64_t>(most, 48, 192) / kRows * kRows;
}

int64_t units(const WinogradTask& task) { return (tiles(task) + kRows - 1) / kRows; }

int64_t scratch_bytes(const WinogradTask& task) {
  const int64_t rows = block_tiles(task);
  return 16 * (plane_of(rows, task.shape.C) + plane_of(rows, kPanel)) * static_cast<int64_t>(sizeof(float));
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
    Scratch pieces(scratch);
    float* const v = pieces.take<float>(16 * v_plane);
    float* const m = pieces.take<float>(16 * plane_of(rows, kPanel));
    const auto transform = task.x_mask ? transform_input<true> : transform_input<false>;
    transform(task, task.x_mask, first, first + count, 0, task.shape.C, v, v_plane);
    for (int i = 0; i < 16; ++i)  // padding rows are ignored; zero them so that denormals do not slow the product
      std::fill_n(v + i * v_plane + count * task.shape.C, (rows - count) * task.shape.C, 0.0f);
    const float* weight = task.weight;
    for (int64_t g = 0; g < task.groups; ++g)
      for (int64_t p = 0; p < panels(K, kPanel); ++p) {
        const int64_t from = panel_begin(K, kPanel, p), columns = panel_begin(K, kPanel, p + 1) - from;
        const int64_t m_plane = plane_of(rows, columns);
        for (int i = 0; i < 16; ++i, weight += C * columns)
          multiply(v + i * v_plane + g * C, task.shape.C, weight, rows, C, columns, m + i * m_plane);
        (task.out_mask ? transform_output<true> : transform_output<false>)(task, first, first + count, g * K + from,
                                                                           columns, m, m_plane, largest);
      }
  }
  report(largest, *task.largest);
}

int64_t weight_units(const WinogradWeightTask& task) {
  return task.groups * panels(task.outputs, kPanel) * task.channels;
}

// G g G', in double, for one channel of one panel.
void transform_weight(const WinogradWeightTask& task, int64_t begin, int64_t end, void*) {
  constexpr int kSome = 16;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t C = task.channels, K = task.outputs;
    const int64_t c = unit % C, p = unit / C % panels(K, kPanel), g = unit / C / panels(K, kPanel);
    const int64_t from = panel_begin(K, kPanel, p), columns = panel_begin(K, kPanel, p + 1) - from, plane = C * columns;
    float* const out = task.out + 16 * C * (g * K + from) + c * columns;
    const float* in = task.weight + g * task.stride[0] + from * task.stride[1] + c * task.stride[2];
    for (int64_t k = 0; k < columns; k += kSome, in += kSome * task.stride[1]) {
      double w[3][3][kSome], rows[4][3][kSome];
      for (int y = 0; y < 3; ++y)
        for (int x = 0; x < 3; ++x)
          for (int l = 0; l < kSome; ++l) w[y][x][l] = in[l * task.stride[1] + y * task.stride[3] + x * task.stride[4]];
      for (int x = 0; x < 3; ++x)
        for (int l = 0; l < kSome; ++l) {
          rows[0][x][l] = w[0][x][l];
          rows[1][x][l] = (w[0][x][l] + w[1][x][l] + w[2][x][l]) / 2;
          rows[2][x][l] = (w[0][x][l] - w[1][x][l] + w[2][x][l]) / 2;
          rows[3][x][l] = w[2][x][l];
        }
      for (int y = 0; y < 4; ++y)
        for (int l = 0; l < kSome; ++l) {
          float* const to = out + 4 * y * plane + k + l;
          const double left = rows[y][0][l], middle = rows[y][1][l], right = rows[y][2][l];
          to[0] = static_cast<float>(left);
          to[plane] = static_cast<float>((left + middle + right) / 2);
          to[2 * plane] = static_cast<float>((left - middle + right) / 2);
          to[3 * plane] = static_cast<float>(right);
        }
    }
  }
}

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(winograd, WinogradTask, units, scratch_bytes, run)
FASTCNN_REGISTER_KERNEL(winograd_weight, WinogradWeightTask, weight_units, nullptr, transform_weight)
