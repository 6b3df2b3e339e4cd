#include "../arguments.h"
#include "fingerprint.h"
#include "parallel.h"

namespace fastcnn {

struct fingerprint;

// A hash of the tensor's contents: of the hashes of its pieces, until there is one.
static int64_t fingerprint_op(Tensor x) {
  STD_TORCH_CHECK(x.is_contiguous(), "the tensor must be contiguous");
  FingerprintTask task{x.const_data_ptr(), static_cast<int64_t>(x.numel() * x.element_size()), nullptr};
  for (std::vector<uint64_t> hashes, pieces;; hashes.swap(pieces)) {
    pieces.resize(kernel<fingerprint, FingerprintTask>().units(task));
    task.out = pieces.data();
    parallel<fingerprint>(task, (task.bytes + 7) / 8);
    if (pieces.size() == 1) return static_cast<int64_t>(pieces[0]);
    task.x = pieces.data();
    task.bytes = pieces.size() * sizeof(uint64_t);
  }
}

FASTCNN_OP(fastcnn_cpu, CPU, fingerprint, "(Tensor input) -> int", fingerprint_op)

}  // namespace fastcnn
