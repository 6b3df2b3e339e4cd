// The tail of an AlexNet stage, max_pool2d(lrn(relu(x + bias))), any part of which may be absent, and its gradient.
// Memory: forward reads x once and writes the pooled map and its argmax; backward reads x, dy and argmax and writes dx.
// A row is loaded, rectified, normalized and pooled along W in cache, the last few such rows along H: see max_pool2d.h.
#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "kernel.h"
#include "lrn.h"
#include "max_pool2d_backward.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

// What both directions need: the rows of x + bias, rectified, and their LRN.
template <typename T>
struct RectifiedRows : Rows<T> {
  using A = Compute<T>;
  using Rows<T>::task, Rows<T>::tile;
  A* const bias;
  const TileLRN<A> lrn;

  RectifiedRows(const TailTask& t, Scratch& scratch, int64_t most_rows = 1)
      : Rows<T>{t},
        bias(scratch.take<A>(tile.channels + kVectorBytes)),
        lrn(t.lrn, this->rows(most_rows), scratch, sizeof(T) == 2 && !t.dy) {
    if (scratch.only_counts()) return;
    for (int64_t c = 0; c < tile.channels; ++c) bias[c] = task.bias ? static_cast<const A*>(task.bias)[c] : A(-0.0);
  }

  RectifiedSource<T> x(int64_t n, int64_t row, int64_t count = 1) const {
    const A floor = task.relu ? 0 : -std::numeric_limits<A>::infinity();
    return {this->source(task.x, n, row, count), bias, floor};
  }
};

template <typename T>
class Forward {
  using A = Compute<T>;

 public:
  Forward(const TailTask& task, Scratch& scratch)
      : task_(task), rows_(task, scratch, rows_at_a_time(task)), pool_(rows_, scratch) {}

  void unit(int64_t u) const {
    const auto normalize = [&](int64_t n, int64_t row, int64_t count, auto sink) {
      const RectifiedSource<T> x = rows_.x(n, row, count);
      if (task_.lrn) rows_.lrn.forward(x.x.tile, x, sink);
      else copy<A>(x.x.tile, x, sink);
    };
    if (task_.pool) return pool_.unit(u, normalize);
    const UnitRows rows(task_, u);
    normalize(rows.n, rows.begin, rows.count(), rows_.sink(task_.out, rows.n, rows.begin, rows.count()));
  }

 private:
  const TailTask& task_;
  const RectifiedRows<T> rows_;
  const PooledRows<T> pool_;
};

template <typename T>
struct Backward {
  using A = Compute<T>;
  const TailTask& task;
  const int64_t most = rows_at_a_time_backward(task);
  const RectifiedRows<T> rows;
  A *const d, *const summed;  // gradients of rows: what the pool passes on, and the result where there is a bias
  PoolBackward<T> pool;

  Backward(const TailTask& t, Scratch& scratch)
      : task(t),
        rows(t, scratch, most),
        d(rows.take(scratch, most)),
        summed(rows.take(scratch, most)),
        pool(t, scratch) {}

  void unit(int64_t u) {
    A* const sums = task.partials ? static_cast<A*>(task.partials) + u * task.shape.C : nullptr;
    for (int64_t c = 0; sums && c < task.shape.C; ++c) sums[c] = 0;
    for_each_rows(task, u, [&](int64_t n, int64_t row, int64_t count) { backward_rows(n, row, count, sums); });
  }

  void backward_rows(int64_t n, int64_t row, int64_t count, A* sums) {
    const Tile tile = rows.rows(count);
    if (task.pool) pool.gather(n, row, count, d);
    else copy<A>(tile, rows.source(task.dy, n, row, count), TileSink<A>{tile, d});
    const TileSource<A> dy{tile, d}, result{tile, summed};
    const RectifiedSource<T> x = rows.x(n, row, count);
    const TensorSink<T> dx = rows.sink(task.out, n, row, count);
    if (!sums) return differentiate(tile, x, dy, dx);
    differentiate(tile, x, dy, TileSink<A>{tile, summed});
    copy<A>(tile, result, dx);
    add_to_bias(tile, sums);
  }

  // From the gradient of what was normalized to that of the rows, which `sink` takes.
  template <typename Gradient, typename Sink>
  void differentiate(const Tile& tile, RectifiedSource<T> x, Gradient dy, Sink sink) const {
    if (!task.relu && !task.lrn) return copy<A>(tile, dy, sink);  // x may be absent
    const auto masked = [&, relu = task.relu](int64_t r) FASTCNN_INLINE_LAMBDA {
      return [to = sink(r), relu](int64_t i, Vec<A> dx, Vec<A> x)
                 FASTCNN_INLINE_LAMBDA { to(i, relu ? (x <= 0 ? Vec<A>{} : dx) : dx); };
    };
    if (task.lrn) return rows.lrn.backward(tile, x, dy, masked);
    const int64_t runs = tile.runs(), n = tile.run();
    for (int64_t r = 0; r < runs; ++r) {
      const auto value = x(r);
      const auto gradient = dy(r);
      const auto to = masked(r);
      for_each_vector<A>(n, [&](int64_t i) FASTCNN_INLINE_LAMBDA { to(i, gradient(i), value(i)); });
    }
  }

  void add_to_bias(const Tile& tile, A* sums) const {
    const int64_t runs = tile.runs(), n = tile.run();
    for (int64_t r = 0; r < runs; ++r) {
      const A* run = summed + tile.in_scratch(r);
      A* sum = sums + tile.first_channel(r);
      int64_t i = 0;
      if (tile.channels_last) {
        for (; i + kLanes<A> <= n; i += kLanes<A>) store(sum + i, load(sum + i) + load(run + i));
        for (; i < n; ++i) sum[i] += run[i];
      } else {
        Vec<A> lanes = {};
        for (; i + kLanes<A> <= n; i += kLanes<A>) lanes += load(run + i);
        A total = 0;
        for (; i < n; ++i) total += run[i];
        for (int l = 0; l < kLanes<A>; ++l) total += lanes[l];
        *sum += total;
      }
    }
  }
};

int64_t blocks(const TailTask& task) { return task.shape.N * row_blocks(task); }

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(relu_lrn_max_pool2d, TailTask, UnitRows::units, scratch_bytes<Forward>, run<Forward>)
FASTCNN_REGISTER_KERNEL(relu_lrn_max_pool2d_backward, TailTask, blocks, scratch_bytes<Backward>, run<Backward>)
