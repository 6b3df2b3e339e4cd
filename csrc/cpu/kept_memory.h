// Memory of large outputs, kept for the next ones. The C library unmaps a freed block above 32 MB, so that each step of a
// training would have the system map and clear every page of such an output anew, up to half the time of a pool; and it
// leaves a heap of smaller ones full of holes, which make a process grow by more than it ever uses.
#pragma once

#include <cstdint>

namespace fastcnn {

struct Block {
  void* begin = nullptr;
  int64_t bytes = 0;
};

// A block of so many bytes, at most twice as many, or an empty one where none is left. One that lasts until backward,
// while others are computed, wastes less: it is at most a quarter larger, and little is kept beside it.
Block take_memory(int64_t bytes, bool lasting);
// Keep it for the next taker; the oldest of what is too much to keep is unmapped.
void keep_memory(Block block);
// Unmap all that is kept.
void release_memory();

}  // namespace fastcnn
