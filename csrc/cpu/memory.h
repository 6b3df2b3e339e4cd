// The caching allocator of large outputs, which is the op kept_like. The C library unmaps a freed block above 32 MB, so
// that each training step would have the system map and clear every page of such an output again, up to half the time
// of a pool; and it leaves a heap of smaller ones full of holes, which make a process grow by more than it ever uses.
#pragma once

namespace fastcnn {

// Unmap all cached blocks.
void release_memory();

}  // namespace fastcnn
