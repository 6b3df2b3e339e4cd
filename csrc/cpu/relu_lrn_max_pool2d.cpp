// The tail of an AlexNet stage, max_pool2d(lrn(relu(x + bias))), any part of which may be absent, and its gradient.
// Memory: forward reads x once and writes the pooled map and its argmax; backward reads x, dy and argmax and writes dx.
// A row is loaded, rectified, normalized and pooled along W in cache; the last few such rows are kept for pooling along H.
#include <limits>

#include "dispatch.h"
#include "kernels.h"
#include "lrn.h"
#include "max_pool2d.h"
#include "scratch.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

Tile tile_of(const TailTask& task) {
  const int64_t groups = task.lrn.groups, group = task.shape.C / groups;
  return {task.shape.channels_last, task.shape.C, groups, task.shape.W, task.lrn ? task.lrn.before(group) : 0};
}

Shape out_shape(const TailTask& task) {
  Shape out = task.shape;
  if (task.pool) out.H = task.pool.h.out, out.W = task.pool.w.out;
  return out;
}

int64_t row_offset(const Shape& shape, int64_t n, int64_t h) {
  return n * shape.image_stride() + h * shape.W * shape.pixel_stride();
}

// What both directions need: the geometry, and x + bias, rectified.
template <typename T, typename A = Compute<T>>
struct Stage {
  const TailTask& task;
  const Tile tile;
  A* const bias;
  const A floor;
  A* const x;

  Stage(const TailTask& task, Scratch& scratch)
      : task(task),
        tile(tile_of(task)),
        bias(task.bias ? scratch.take<A>(tile.channels + kVectorBytes) : nullptr),
        floor(task.relu ? A(0) : -std::numeric_limits<A>::infinity()),
        x(take_tile(scratch)) {}

  A* take_tile(Scratch& scratch) const { return scratch.take<A>(tile.lanes() + pool_slack(task.pool.w)); }

  void prepare() const {
    if (bias) std::memcpy(bias, task.bias, tile.channels * sizeof(A));
    clear_pads(tile, x);
  }

  void load_row(int64_t n, int64_t h) const {
    const T* from = static_cast<const T*>(task.x) + row_offset(task.shape, n, h);
    load_tile<T, A>(tile, from, task.shape.channel_stride(), bias, floor, x);
  }
};

template <typename T, typename A = Compute<T>>
struct Forward : Stage<T> {
  using Stage<T>::task, Stage<T>::tile, Stage<T>::x;
  const PoolAxis &h = this->task.pool.h, &w = this->task.pool.w;
  const PooledLayout layout{this->task.shape.channels_last, tile.groups, tile.group(), w.out, 0};
  const Shape out = out_shape(this->task);
  A* const y;
  // Pooled along W: row r of the map is in slot r % slots, if owners[slot] says so.
  const int64_t slots = (h.kernel - 1) * h.dilation + 1;
  PooledRow<A> ring;
  int64_t* const owners;
  PaddedRow<A> padded;

  Forward(const TailTask& task, Scratch& scratch)
      : Stage<T>(task, scratch),
        y(task.lrn ? this->take_tile(scratch) : x),
        ring{scratch.take<A>(slots * layout.lanes()), scratch.take<Lane<A>>(slots * layout.lanes())},
        owners(scratch.take<int64_t>(slots)),
        padded{scratch.take<A>(w.size + pool_slack(w)), scratch.take<Lane<A>>(w.out + kVectorBytes)} {}

  void prepare() const {
    Stage<T>::prepare();
    for (int64_t i = 0; i < slots; ++i) owners[i] = -1;
    for (int64_t i = 0; i < w.size + pool_slack(w); ++i) padded.row[i] = -std::numeric_limits<A>::infinity();
    for (int64_t o = 0; o < w.out; ++o) padded.firsts[o] = w.first(o) < w.last(o) ? w.first(o) : 0;
  }

  void normalized_row(int64_t n, int64_t row) const {
    this->load_row(n, row);
    if (task.lrn) lrn_tile(task.lrn, tile, x, y);
  }

  PooledRow<A> pooled_row(int64_t n, int64_t row) const {
    const int64_t slot = row % slots, owner = n * h.size + row;
    const PooledRow<A> pooled{ring.values + slot * layout.lanes(), ring.places + slot * layout.lanes()};
    if (owners[slot] != owner) {
      normalized_row(n, row);
      pool_columns(w, tile, y, layout, pooled, padded);
      owners[slot] = owner;
    }
    return pooled;
  }

  template <typename Argmax>
  void pool_rows(int64_t n, int64_t o, Argmax* argmax) const {
    const int64_t first = h.first(o), last = h.last(o), at = row_offset(out, n, o);
    for (int64_t i = first; i < last; ++i) pooled_row(n, h.element(o, i));
    for (int64_t r = 0; r < layout.runs(); ++r) {
      const int64_t to = at + (out.channels_last ? r * layout.run() : r * out.channel_stride());
      const auto maximum = [&](int64_t lane) {
        Maximum<A> best = Maximum<A>::of_nothing();
        for (int64_t i = first; i < last; ++i) {
          const int64_t from = h.element(o, i) % slots * layout.lanes() + layout.start(r) + lane;
          const IntVec<A> place = load_as<IntVec<A>>(ring.places + from) + places<A>(i * w.kernel);
          if (i == first) best = {load(ring.values + from), place};
          else best.take(load(ring.values + from), place);
        }
        return best;
      };
      store_maxima(maximum, static_cast<T*>(task.out) + to, argmax ? argmax + to : nullptr);
    }
  }

  template <typename F, typename Argmax>
  void store_maxima(F maximum, T* values, Argmax* argmax) const {
    typedef typename VectorOf<Argmax, kLanes<A>>::type Narrow;
    const int64_t n = layout.run();
    const auto store_at = [&](int64_t lane) {
      const Maximum<A> best = maximum(lane);
      store(values + lane, best.value);
      if (!argmax) return;
      const Narrow narrow = __builtin_convertvector(best.place, Narrow);
      std::memcpy(argmax + lane, &narrow, sizeof narrow);
    };
    if (for_each_vector<A>(n, store_at)) return;
    const Maximum<A> best = maximum(0);
    T converted[kLanes<A>];
    store(converted, best.value);
    std::memcpy(values, converted, n * sizeof(T));
    for (int64_t i = 0; argmax && i < n; ++i) argmax[i] = static_cast<Argmax>(best.place[i]);
  }

  void unit(int64_t u) const {
    const int64_t n = u / out.H, o = u % out.H;
    if (!task.pool) {
      normalized_row(n, o);
      store_tile(tile, y, static_cast<T*>(task.out) + row_offset(out, n, o), out.channel_stride());
    } else if (task.pool.wide_argmax()) {
      pool_rows(n, o, static_cast<int32_t*>(task.argmax));
    } else {
      pool_rows(n, o, static_cast<uint8_t*>(task.argmax));
    }
  }
};

template <typename T, typename A = Compute<T>>
struct Backward : Stage<T> {
  using Stage<T>::task, Stage<T>::tile, Stage<T>::x;
  const PoolAxis &h = this->task.pool.h, &w = this->task.pool.w;
  const Shape out = out_shape(this->task);
  // In NCHW the gather looks this far beyond the ends of a row of dy.
  const int64_t margin =
      this->task.shape.channels_last ? 0 : (w.kernel * w.dilation + w.padding + w.size) / w.stride - w.out + 1 + kVectorBytes;
  const PooledLayout layout{this->task.shape.channels_last, tile.groups, tile.group(), w.out, margin};
  A *const dx, *const q;
  // Rows of dy in the compute type: row o is in slot o % slots, if owners[slot] says so.
  const int64_t slots = (h.kernel - 1) * h.dilation / h.stride + 1;
  PooledRow<A> ring;
  int64_t* const owners;
  Covering<A> covering;
  Source<A>* const sources;
  int64_t* const counts;

  Backward(const TailTask& task, Scratch& scratch)
      : Stage<T>(task, scratch),
        dx(this->take_tile(scratch)),
        q(task.lrn ? this->take_tile(scratch) : nullptr),
        ring{scratch.take<A>(slots * layout.lanes()), scratch.take<Lane<A>>(slots * layout.lanes())},
        owners(scratch.take<int64_t>(slots)),
        covering{scratch.take<PooledRow<A>>(slots), scratch.take<int64_t>(slots), 0},
        sources(scratch.take<Source<A>>(slots * w.kernel * w.stride)),
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
    for (int64_t r = 0; r < layout.runs(); ++r) {
      const int64_t from = at + (out.channels_last ? r * layout.run() : r * out.channel_stride()), to = layout.start(r);
      map<A>(static_cast<const T*>(task.dy) + from, row.values + to, layout.run(), [](Vec<A> v, int64_t) { return v; });
      const Argmax* argmax = static_cast<const Argmax*>(task.argmax) + from;
      for (int64_t i = 0; i < layout.run(); ++i) row.places[to + i] = argmax[i];
    }
    return row;
  }

  template <typename Argmax>
  void gather_row(int64_t n, int64_t row) {
    covering.count = 0;
    for (int64_t i = h.kernel - 1; i >= 0; --i) {
      const int64_t shifted = row + h.padding - i * h.dilation, o = shifted / h.stride;
      if (shifted < 0 || shifted % h.stride || o >= h.out) continue;
      covering.rows[covering.count] = dy_row<Argmax>(n, o);
      covering.kh[covering.count++] = i;
    }
    if (tile.channels_last) gather_channels_last(w, covering, tile, layout, sources, dx);
    else gather_nchw(w, covering, tile, layout, sources, counts, dx);
  }

  void load_dy(int64_t n, int64_t row) {
    if (!task.pool) {
      const T* from = static_cast<const T*>(task.dy) + row_offset(out, n, row);
      load_tile<T, A>(tile, from, out.channel_stride(), nullptr, -std::numeric_limits<A>::infinity(), dx);
    } else if (task.pool.wide_argmax()) {
      gather_row<int32_t>(n, row);
    } else {
      gather_row<uint8_t>(n, row);
    }
  }

  void mask() const {
    for (int64_t i = tile.begin(); i < tile.end(); i += kLanes<A>) {
      store(dx + i, load(x + i) <= 0 ? Vec<A>{} : load(dx + i));
    }
  }

  void add_to_bias(A* dbias) const {
    for (int64_t r = 0; r < tile.runs(); ++r) {
      const A* run = dx + tile.run_in_tile(r);
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
    for (int64_t row = first; row < std::min(first + TailTask::kRows, task.shape.H); ++row) {
      if (task.relu || task.lrn) this->load_row(n, row);
      load_dy(n, row);
      if (task.lrn) lrn_backward_tile(task.lrn, tile, x, dx, q);
      if (task.relu) mask();
      if (dbias) add_to_bias(dbias);
      store_tile(tile, dx, static_cast<T*>(task.out) + row_offset(task.shape, n, row), task.shape.channel_stride());
    }
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
