// Max pooling and its gradient, row by row, as max_pool2d.h and max_pool2d_backward.h do them.
// Memory: forward reads x once and writes y and its argmax; backward reads dy and argmax and writes dx.
#include "dispatch.h"
#include "kernel.h"
#include "max_pool2d_backward.h"

namespace fastcnn::FASTCNN_CAPABILITY {
namespace {

template <typename T>
struct Forward {
  const PooledRows<T> pool;

  Forward(const TailTask& task, Scratch& scratch) : pool(Rows<T>{task}, scratch) {}

  void unit(int64_t u) const {
    pool.unit(u, [](auto...) {});
  }
};

template <typename T>
struct Backward {
  const Rows<T> rows;
  Compute<T>* const d;
  PoolBackward<T> pool;

  Backward(const TailTask& task, Scratch& scratch)
      : rows{task}, d(rows.take(scratch, rows_at_a_time_backward(task))), pool(task, scratch) {}

  void unit(int64_t u) {
    for_each_rows(rows.task, u, [&](int64_t n, int64_t row, int64_t count) {
      pool.gather(n, row, count, d);
      const Tile tile = rows.rows(count);
      copy<Compute<T>>(tile, TileSource<Compute<T>>{tile, d}, rows.sink(rows.task.out, n, row, count));
    });
  }
};

int64_t blocks(const TailTask& task) { return task.shape.N * row_blocks(task); }

}  // namespace
}  // namespace fastcnn::FASTCNN_CAPABILITY

FASTCNN_REGISTER_KERNEL(max_pool2d, TailTask, UnitRows::units, scratch_bytes<Forward>, run<Forward>)
FASTCNN_REGISTER_KERNEL(max_pool2d_backward, TailTask, blocks, scratch_bytes<Backward>, run<Backward>)
