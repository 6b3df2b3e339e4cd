// The tail of an AlexNet stage, max_pool2d(lrn(relu(x + bias))), any part of which may be absent, and its gradient.
// Memory: forward reads x once and writes the pooled map and its argmax; backward reads x, dy and argmax and writes dx.
// A row is loaded, rectified, normalized and pooled along W in cache; the last few such rows are kept for pooling along H.
#include <limits>

#include "dispatch.h"
#include "kernels.h"
#include "lrn.h"
#include "max_pool2d.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

Shape out_shape(const TailTask& task) {
  Shape out = task.shape;
  if (task.pool) out.H = task.pool.h.out, out.W = task.pool.w.out;
  return out;
}

int64_t row_offset(const Shape& shape, int64_t n, int64_t h) {
  return n * shape.image_stride() + h * shape.W * shape.pixel_stride();
}

// What both directions need: a row of the input is a tile; x + bias, rectified, is its source.
template <typename T, typename A = Compute<T>>
struct Stage {
  const TailTask& task;
  const Tile tile;
  const Shape out;
  A* const bias;
  const int64_t ahead = tile.channels_last ? 2048 : 2 * tile.pixels;  // in NCHW, the row after the next
  const TileLRN<A> lrn;

  Stage(const TailTask& t, Scratch& scratch)
      : task(t),
        tile{t.shape.channels_last, t.shape.C, t.lrn.groups, t.shape.W},
        out(out_shape(t)),
        bias(scratch.take<A>(tile.channels + kVectorBytes)),
        lrn(t.lrn, tile, scratch, sizeof(T) == 2 && !t.dy) {}

  A* take_tile(Scratch& scratch) const { return scratch.take<A>(tile.lanes() + pool_slack(task.pool.w)); }

  void prepare() const {
    for (int64_t c = 0; c < tile.channels; ++c) bias[c] = task.bias ? static_cast<const A*>(task.bias)[c] : A(-0.0);
  }

  RectifiedSource<T> x(int64_t n, int64_t row) const {
    const T* from = static_cast<const T*>(task.x) + row_offset(task.shape, n, row);
    const A floor = task.relu ? 0 : -std::numeric_limits<A>::infinity();
    return {{tile, from, task.shape.channel_stride(), ahead}, bias, floor};
  }
};

template <typename T, typename A = Compute<T>>
struct Forward : Stage<T> {
  using Stage<T>::task, Stage<T>::tile, Stage<T>::out;
  const PoolAxis &h = this->task.pool.h, &w = this->task.pool.w;
  const PooledLayout layout{tile.channels_last, tile.groups, tile.group(), w.out, 0};
  A* const y;  // relu and LRN of a row
  // Rows pooled along W: row r of the map is in slot r % slots, if owners[slot] says so.
  const int64_t slots = std::min((h.reach() - 1) * h.dilation + 1, h.size);
  PooledRow<A> ring;
  int64_t* const owners;
  PaddedRow<A> padded;

  Forward(const TailTask& t, Scratch& scratch)
      : Stage<T>(t, scratch),
        y(this->take_tile(scratch)),
        ring{scratch.take<A>(slots * layout.lanes()), scratch.take<Lane<A>>(slots * layout.lanes())},
        owners(scratch.take<int64_t>(slots)),
        padded{scratch.take<A>(w.size + pool_slack(w)), scratch.take<Lane<A>>(w.out + kVectorBytes)} {}

  void prepare() const {
    Stage<T>::prepare();
    for (int64_t i = 0; i < slots; ++i) owners[i] = -1;
    for (int64_t i = 0; i < w.size + pool_slack(w); ++i) padded.row[i] = -std::numeric_limits<A>::infinity();
    for (int64_t o = 0; o < w.out; ++o) padded.firsts[o] = w.first(o) < w.last(o) ? w.first(o) : 0;
  }

  template <typename Sink>
  void normalize(int64_t n, int64_t row, Sink sink) const {
    if (task.lrn) this->lrn.forward(tile, this->x(n, row), sink);
    else copy<A>(tile, this->x(n, row), sink);
  }

  // Whether a row of NCHW can be pooled where it lies: nothing comes before the pool, and the vectors that reach beyond the
  // row's end stay inside the tensor.
  bool untouched(int64_t n, int64_t row) const {
    const Shape& s = task.shape;
    const int64_t end = row_offset(s, n, row) + (s.C - 1) * s.channel_stride() + s.W;
    return !s.channels_last && !task.lrn && !task.relu && !task.bias &&
           end + pool_slack(w) + kVectorBytes <= s.N * s.image_stride();
  }

  void pool_along_width(int64_t n, int64_t row) const {
    const int64_t slot = row % slots, owner = n * h.size + row, at = slot * layout.lanes();
    if (owners[slot] == owner) return;
    owners[slot] = owner;
    const PooledRow<A> pooled{ring.values + at, ring.places + at};
    if constexpr (std::is_same_v<T, A>) {
      if (untouched(n, row)) {
        Tile in_place = tile;
        in_place.pad = task.shape.channel_stride() - w.size;
        const A* from = static_cast<const A*>(task.x) + row_offset(task.shape, n, row);
        return pool_columns(w, in_place, from - in_place.pad, layout, pooled, padded, this->ahead);
      }
    }
    normalize(n, row, TileSink<A>{tile, y});
    pool_columns(w, tile, y, layout, pooled, padded, 0);
  }

  template <typename Argmax>
  void pool_row(int64_t n, int64_t o, Argmax* argmax) const {
    typedef typename VectorOf<Argmax, kLanes<A>>::type Narrow;
    const int64_t first = h.first(o), last = h.last(o), at = row_offset(out, n, o);
    for (int64_t i = first; i < last; ++i) pool_along_width(n, h.element(o, i));
    const Tile pooled{tile.channels_last, tile.channels, tile.groups, w.out};
    const TensorSink<T> sink{pooled, static_cast<T*>(task.out) + at, out.channel_stride()};
    for (int64_t r = 0; r < pooled.runs(); ++r) {
      const auto to = sink(r);
      Argmax* const to_argmax = argmax ? argmax + at + pooled.in_memory(r, out.channel_stride()) : nullptr;
      for_each_vector<A>(pooled.run(), [&](int64_t lane) FASTCNN_INLINE_LAMBDA {
        Maximum<A> best = Maximum<A>::of_nothing();
        for (int64_t i = first; i < last; ++i) {
          const int64_t from = h.element(o, i) % slots * layout.lanes() + layout.start(r) + lane;
          const IntVec<A> place = load_as<IntVec<A>>(ring.places + from) + places<A>(i * w.kernel);
          if (i == first) best = {load(ring.values + from), place};
          else best.take(load(ring.values + from), place);
        }
        to(lane, best.value);
        if (!argmax) return;
        const Narrow narrow = __builtin_convertvector(best.place, Narrow);
        if (pooled.run() >= kLanes<A>) std::memcpy(to_argmax + lane, &narrow, sizeof narrow);
        else std::memcpy(to_argmax, &narrow, pooled.run() * sizeof(Argmax));
      });
    }
  }

  void unit(int64_t u) const {
    const int64_t n = u / out.H, o = u % out.H;
    if (!task.pool) {
      T* to = static_cast<T*>(task.out) + row_offset(out, n, o);
      normalize(n, o, TensorSink<T>{tile, to, out.channel_stride()});
    } else if (task.pool.wide_argmax()) {
      pool_row(n, o, static_cast<int32_t*>(task.argmax));
    } else {
      pool_row(n, o, static_cast<uint8_t*>(task.argmax));
    }
  }
};

template <typename T, typename A = Compute<T>>
struct Backward : Stage<T> {
  using Stage<T>::task, Stage<T>::tile, Stage<T>::out;
  const PoolAxis &h = this->task.pool.h, &w = this->task.pool.w;
  // In NCHW the gather looks this far beyond the ends of a row of dy.
  const int64_t margin =
      tile.channels_last ? 0 : (w.reach() * w.dilation + w.padding + w.size) / w.stride - w.out + 1 + kVectorBytes;
  const PooledLayout layout{tile.channels_last, tile.groups, tile.group(), w.out, margin};
  A *const d, *const summed;  // gradients of a row: what the pool passes on, and the result where there is a bias
  // Rows of dy in the compute type: row o is in slot o % slots, if owners[slot] says so.
  const int64_t slots = std::min((h.reach() - 1) * h.dilation / h.stride + 1, h.out);
  PooledRow<A> ring;
  int64_t* const owners;
  Covering<A> covering;
  Source<A>* const sources;
  int64_t* const counts;

  Backward(const TailTask& t, Scratch& scratch)
      : Stage<T>(t, scratch),
        d(this->take_tile(scratch)),
        summed(this->take_tile(scratch)),
        ring{scratch.take<A>(slots * layout.lanes()), scratch.take<Lane<A>>(slots * layout.lanes())},
        owners(scratch.take<int64_t>(slots)),
        covering{scratch.take<PooledRow<A>>(slots), scratch.take<int64_t>(slots), 0},
        sources(scratch.take<Source<A>>(slots * w.reach() * w.stride)),
        counts(scratch.take<int64_t>(w.stride)) {}

  void prepare() const {
    Stage<T>::prepare();
    for (int64_t i = 0; i < slots; ++i) owners[i] = -1;
    for (int64_t i = 0; i < slots * layout.lanes(); ++i) ring.places[i] = -1;  // where no output is
  }

  template <typename Argmax>
  PooledRow<A> dy_row(int64_t n, int64_t o) const {
    const int64_t slot = o % slots, owner = n * h.out + o, at = row_offset(out, n, o);
    const PooledRow<A> row{ring.values + slot * layout.lanes(), ring.places + slot * layout.lanes()};
    if (owners[slot] == owner) return row;
    owners[slot] = owner;
    const Tile pooled{tile.channels_last, tile.channels, tile.groups, w.out};
    const TensorSource<T> dy{pooled, static_cast<const T*>(task.dy) + at, out.channel_stride(), this->ahead};
    for (int64_t r = 0; r < pooled.runs(); ++r) {
      const int64_t to = layout.start(r);
      const auto from = dy(r);
      const Argmax* argmax = static_cast<const Argmax*>(task.argmax) + at + pooled.in_memory(r, out.channel_stride());
      for_each_vector<A>(pooled.run(), [&](int64_t i) { store(row.values + to + i, from(i)); });
      for (int64_t i = 0; i < pooled.run(); ++i) row.places[to + i] = argmax[i];
    }
    return row;
  }

  template <typename Argmax>
  void gather_row(int64_t n, int64_t row) {
    covering.count = 0;
    for (int64_t i = h.reach() - 1; i >= 0; --i) {
      const int64_t shifted = row + h.padding - i * h.dilation, o = shifted / h.stride;
      if (shifted < 0 || shifted % h.stride || o >= h.out) continue;
      covering.rows[covering.count] = dy_row<Argmax>(n, o);
      covering.kh[covering.count++] = i;
    }
    if (tile.channels_last) gather_channels_last(w, covering, tile, layout, sources, d);
    else gather_nchw(w, covering, tile, layout, sources, counts, d);
  }

  // From the gradient of what was normalized to that of the row, which `sink` takes.
  template <typename Gradient, typename Sink>
  void differentiate(int64_t n, int64_t row, Gradient dy, Sink sink) const {
    if (!task.relu && !task.lrn) return copy<A>(tile, dy, sink);  // x may be absent
    const RectifiedSource<T> x = this->x(n, row);
    const auto masked = [&, relu = task.relu](int64_t r) FASTCNN_INLINE_LAMBDA {
      return [to = sink(r), relu](int64_t i, Vec<A> dx, Vec<A> x) FASTCNN_INLINE_LAMBDA {
        to(i, relu ? (x <= 0 ? Vec<A>{} : dx) : dx);
      };
    };
    if (task.lrn) return this->lrn.backward(tile, x, dy, masked);
    for (int64_t r = 0; r < tile.runs(); ++r) {
      const auto value = x(r);
      const auto gradient = dy(r);
      const auto to = masked(r);
      for_each_vector<A>(tile.run(), [&](int64_t i) FASTCNN_INLINE_LAMBDA { to(i, gradient(i), value(i)); });
    }
  }

  void backward_row(int64_t n, int64_t row, A* dbias) {
    const int64_t at = row_offset(task.shape, n, row), stride = task.shape.channel_stride();
    if (task.pool && task.pool.wide_argmax()) gather_row<int32_t>(n, row);
    else if (task.pool) gather_row<uint8_t>(n, row);
    else copy<A>(tile, TensorSource<T>{tile, static_cast<const T*>(task.dy) + at, stride, this->ahead}, TileSink<A>{tile, d});
    const TileSource<A> dy{tile, d}, result{tile, summed};
    const TensorSink<T> dx{tile, static_cast<T*>(task.out) + at, stride};
    if (!dbias) return differentiate(n, row, dy, dx);
    differentiate(n, row, dy, TileSink<A>{tile, summed});
    copy<A>(tile, result, dx);
    add_to_bias(dbias);
  }

  void add_to_bias(A* dbias) const {
    for (int64_t r = 0; r < tile.runs(); ++r) {
      const A* run = summed + tile.in_scratch(r);
      A* sum = dbias + tile.first_channel(r);
      int64_t i = 0;
      if (tile.channels_last) {
        for (; i + kLanes<A> <= tile.run(); i += kLanes<A>) store(sum + i, load(sum + i) + load(run + i));
        for (; i < tile.run(); ++i) sum[i] += run[i];
      } else {
        Vec<A> lanes = {};
        for (; i + kLanes<A> <= tile.run(); i += kLanes<A>) lanes += load(run + i);
        A total = 0;
        for (; i < tile.run(); ++i) total += run[i];
        for (int l = 0; l < kLanes<A>; ++l) total += lanes[l];
        *sum += total;
      }
    }
  }

  void unit(int64_t u) {
    const int64_t n = u / task.blocks(), first = u % task.blocks() * TailTask::kRows;
    A* dbias = task.dbias ? static_cast<A*>(task.dbias) + u * tile.channels : nullptr;
    for (int64_t c = 0; dbias && c < tile.channels; ++c) dbias[c] = 0;
    for (int64_t row = first; row < std::min(first + TailTask::kRows, task.shape.H); ++row) backward_row(n, row, dbias);
  }
};

template <template <typename, typename> class Direction>
void run(const TailTask& task, int64_t begin, int64_t end, void* block) {
  with_dtype(task.dtype, [&](auto t) {
    Scratch scratch(block);
    Direction<decltype(t), Compute<decltype(t)>> direction(task, scratch);
    direction.prepare();
    for (int64_t u = begin; u < end; ++u) direction.unit(u);
  });
}

}  // namespace

int64_t relu_lrn_max_pool2d_scratch_bytes(const TailTask& task) {
  int64_t bytes = 0;
  with_dtype(task.dtype, [&](auto t) {
    Scratch forward(nullptr), backward(nullptr);
    Forward<decltype(t)>(task, forward);
    Backward<decltype(t)>(task, backward);
    bytes = std::max(forward.used(), backward.used());
  });
  return bytes;
}

void relu_lrn_max_pool2d(const TailTask& task, int64_t begin, int64_t end, void* scratch) {
  run<Forward>(task, begin, end, scratch);
}

void relu_lrn_max_pool2d_backward(const TailTask& task, int64_t begin, int64_t end, void* scratch) {
  run<Backward>(task, begin, end, scratch);
}

}  // namespace fastcnn::FASTCNN_CAPABILITY
