"""Originals of packed weights in a file, so that memory does not hold them twice."""

import mmap
import os
import tempfile
from collections import Counter

import torch
from torch import nn

_LEAST_BYTES = 4096  # a page


class Offloaded:
    """Moves the parameters and buffers of a model to a file. Memory holds what was read of it since the last release.

    They stay what they are: they can be read, written, saved and copied. The file is unlinked, and goes with the model.

    Args:
        model: on CPU; its small tensors, and those that share their memory, stay where they are.
        folder: of the file.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, model: nn.Module, folder: str | os.PathLike[str]) -> None:
        tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_cpu and t.layout == torch.strided]
        owners = Counter(t.untyped_storage().data_ptr() for t in tensors)
        tensors = [
            t
            for t in tensors
            if t.nbytes >= _LEAST_BYTES and t.untyped_storage().nbytes() == t.nbytes
            if owners[t.untyped_storage().data_ptr()] == 1
        ]
        self._memory: mmap.mmap | None = None
        if not tensors:
            return
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(sum(t.nbytes for t in tensors))
            self._memory = mmap.mmap(file.fileno(), 0)
        offset = 0
        for t in sorted(tensors, key=lambda t: -t.element_size()):  # so that all are aligned
            flat = torch.frombuffer(self._memory, dtype=t.dtype, count=t.numel(), offset=offset)
            offset += t.nbytes
            t.data = flat.as_strided(t.shape, t.stride()).copy_(t.data)
        self.release()

    def release(self) -> None:
        """Give the memory back; what is read again comes from the file."""
        if self._memory is not None:
            self._memory.madvise(mmap.MADV_DONTNEED)
