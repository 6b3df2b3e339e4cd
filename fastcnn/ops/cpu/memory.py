"""Memory of large outputs and gradients, which fastcnn's allocator keeps for the next ones: see csrc/cpu/memory.h."""

import torch
from torch import Tensor

_LARGE_BYTES = 1 << 20
# A larger block is mapped anew each time it is allocated, by the GNU C library for one; smaller ones are used again.
REUSED_BYTES = 32 << 20


def kept(empty: Tensor, *, lasting: bool = False) -> Tensor:
    """``empty`` itself, or if it is large a tensor like it whose memory comes from the allocator.

    ``lasting``: it will probably be saved for backward, or is a parameter's gradient.
    """
    if not empty.is_cpu or empty.nbytes <= _LARGE_BYTES or torch.are_deterministic_algorithms_enabled():
        return empty
    return torch.ops.fastcnn_cpu.kept_like(empty, lasting)
