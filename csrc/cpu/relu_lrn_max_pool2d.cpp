// The tail of an AlexNet stage, max_pool2d(lrn(relu(x + bias))), any part of which may be absent, and its gradient.
// Memory: forward reads x once and writes the pooled map and its argmax; backward reads x, dy and argmax and writes dx.
// A row is loaded, rectified, normalized and pooled along W in cache, the last few such rows along H: see max_pool2d.h.
#include <algorithm>
#include <limits>

#include "dispatch.h"
#include "kernel.h"
#include "lrn.h"
#include "max_pool2d.h"

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

// Output rows of a unit. In NCHW with LRN they are several, because pieces of channels are too short otherwise; but not
// so many that few units are left to share out.
int64_t unit_rows(const TailTask& task) {
  const Shape out = task.out_shape();
  if (pools_in_place(task)) return kPooledRows;
  if (out.channels_last) return 1;
  const int64_t row = task.shape.W * (task.pool ? task.pool.h.stride : 1);
  const int64_t most = std::min(1024 / std::max<int64_t>(row, 1), out.N * out.H / 64);
  return std::min(std::max<int64_t>(most, 4), std::max<int64_t>(out.H, 1));
}

int64_t units_of_image(const TailTask& task) { return (task.out_shape().H + unit_rows(task) - 1) / unit_rows(task); }

template <typename T>
class Forward {
  using A = Compute<T>;

 public:
  Forward(const TailTask& task, Scratch& scratch)
      : task_(task),
        rows_(task, scratch, most_rows_),
        pool_(task, scratch),
        ring_(scratch.take<A>(ring_lanes())),
        owners_(scratch.take<int64_t>(slots_)) {
    if (scratch.only_counts()) return;
    for (int64_t i = 0; i < slots_; ++i) owners_[i] = -1;
  }

  void unit(int64_t u) const {
    if (pools_in_place(task_)) return pool_in_place(task_, pool_, u);
    const int64_t per_image = units_of_image(task_), n = u / per_image, first = u % per_image * unit_rows_;
    const int64_t last = std::min(first + unit_rows_, task_.out_shape().H);
    if (!task_.pool) return normalize(n, first, last, rows_.sink(task_.out, n, first, last - first));
    if (task_.shape.channels_last) return pool_row(n, first);
    const int64_t begin = std::max<int64_t>(h_.element(first, 0), 0);
    const int64_t end = std::clamp(h_.element(last - 1, h_.kernel - 1) + 1, begin, h_.size);
    normalize(n, begin, end, PooledSink{*this, n * task_.shape.C, first, last, begin, end - begin});
  }

 private:
  // In channels_last: one output row, from the last few rows of the map.
  void pool_row(int64_t n, int64_t o) const {
    for (int64_t i = h_.first(o); i < h_.last(o); ++i) {
      const int64_t row = h_.element(o, i), slot = row % slots_, owner = n * h_.size + row;
      if (owners_[slot] == owner) continue;
      owners_[slot] = owner;
      normalize(n, row, row + 1, TileSink<A>{rows_.tile, ring_ + slot * slot_lanes_});
    }
    pool_.write(n, o, o + 1, PooledMap<A>{.data = ring_, .row_stride = slot_lanes_, .slots = slots_});
  }

  // In NCHW: takes the rows of one channel after the other, and pools them when they are complete.
  struct PooledSink {
    const Forward& forward;
    int64_t first_map, first, last, begin, rows;

    FASTCNN_INLINE auto operator()(int64_t) const {
      return [to = forward.ring_, n = rows * forward.task_.shape.W](int64_t i, Vec<A> v)
                 FASTCNN_INLINE_LAMBDA { store(to + i, v); };
    }
    void finish(int64_t c) const {
      const PooledMap<A> map{.data = forward.ring_, .row_stride = forward.task_.shape.W, .first_row = begin};
      forward.pool_.write(first_map + c, first, last, map);
    }
  };

  template <typename Sink>
  void normalize(int64_t n, int64_t begin, int64_t end, Sink sink) const {
    const RectifiedSource<T> x = rows_.x(n, begin, end - begin);
    if (task_.lrn) rows_.lrn.forward(x.x.tile, x, sink);
    else copy<A>(x.x.tile, x, sink);
  }

  int64_t ring_lanes() const {
    if (!task_.pool || pools_in_place(task_)) return 0;
    return task_.shape.channels_last ? slots_ * slot_lanes_ : most_rows_ * task_.shape.W + kVectorBytes;
  }

  const TailTask& task_;
  const PoolAxis& h_ = task_.pool.h;
  const int64_t unit_rows_ = unit_rows(task_);
  // Of the map, for a unit.
  const int64_t most_rows_ = task_.pool && !task_.shape.channels_last
                                 ? std::min((unit_rows_ - 1) * h_.stride + (h_.kernel - 1) * h_.dilation + 1, h_.size)
                                 : unit_rows_;
  const RectifiedRows<T> rows_;
  const PoolForward<T> pool_;
  // In channels_last row r is in slot r % slots, if owners[slot] says so; in NCHW this is the rows of a channel.
  const int64_t slots_ = task_.pool ? std::min((h_.reach() - 1) * h_.dilation + 1, h_.size) : 0;
  const int64_t slot_lanes_ = rows_.tile.lanes();
  A* const ring_;
  int64_t* const owners_;
};

template <typename T>
struct Backward {
  using A = Compute<T>;
  const TailTask& task;
  const RectifiedRows<T> rows;
  const Tile tile = rows.tile;
  A *const d, *const summed;  // gradients of a row: what the pool passes on, and the result where there is a bias
  PoolBackward<T> pool;

  Backward(const TailTask& t, Scratch& scratch)
      : task(t), rows(t, scratch), d(rows.take(scratch)), summed(rows.take(scratch)), pool(rows, scratch) {}

  void unit(int64_t u) {
    A* const sums = task.partials ? static_cast<A*>(task.partials) + u * tile.channels : nullptr;
    for (int64_t c = 0; sums && c < tile.channels; ++c) sums[c] = 0;
    for_each_row(task, u, [&](int64_t n, int64_t row) { backward_row(n, row, sums); });
  }

  void backward_row(int64_t n, int64_t row, A* sums) {
    if (task.pool) pool.gather(n, row, d);
    else copy<A>(tile, rows.source(task.dy, n, row), TileSink<A>{tile, d});
    const TileSource<A> dy{tile, d}, result{tile, summed};
    const TensorSink<T> dx = rows.sink(task.out, n, row);
    if (!sums) return differentiate(n, row, dy, dx);
    differentiate(n, row, dy, TileSink<A>{tile, summed});
    copy<A>(tile, result, dx);
    add_to_bias(sums);
  }

  // From the gradient of what was normalized to that of the row, which `sink` takes.
  template <typename Gradient, typename Sink>
  void differentiate(int64_t image, int64_t row, Gradient dy, Sink sink) const {
    if (!task.relu && !task.lrn) return copy<A>(tile, dy, sink);  // x may be absent
    const RectifiedSource<T> x = rows.x(image, row);
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

  void add_to_bias(A* sums) const {
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

int64_t units(const TailTask& task) { return task.shape.N * units_of_image(task); }
int64_t blocks(const TailTask& task) { return task.shape.N * row_blocks(task); }

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(relu_lrn_max_pool2d, TailTask, units, scratch_bytes<Forward>, run<Forward>)
FASTCNN_REGISTER_KERNEL(relu_lrn_max_pool2d_backward, TailTask, blocks, scratch_bytes<Backward>, run<Backward>)
