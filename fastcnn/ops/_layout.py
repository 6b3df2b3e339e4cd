"""Memory formats: one rule decides the strides of every output, for kernels and fakes alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGE_BYTES = 1 << 20
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def output_format(x: Tensor) -> torch.memory_format:
    """channels_last if ``x`` is channels_last and not also contiguous, otherwise contiguous."""
    channels_last = _CHANNELS_LAST.get(x.dim())
    if channels_last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Whether :func:`output_format` of ``x`` is one of the channels_last formats."""
    return output_format(x) != torch.contiguous_format


def format_of(channels_last: bool) -> torch.memory_format:
    """The format of a 4-D tensor of which only that is known."""
    return torch.channels_last if channels_last else torch.contiguous_format


def dense(x: Tensor, format: torch.memory_format) -> Tensor:
    """``x`` itself if it has that memory format, else a copy that has."""
    return x.contiguous(memory_format=format)


def output(y: Tensor, format: torch.memory_format) -> Tensor:
    """``y`` with the very strides of a new tensor of that format, which those of empty and 1-wide ones need not be."""
    new = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=format)
    return y if y.stride() == new.stride() else new.copy_(y)


def kept(empty: Tensor, *, lasting: bool = False) -> Tensor:
    """``empty``, or if it is large the same in memory that fastcnn keeps: see csrc/cpu/kept_memory.h.

    ``lasting``: until backward, most likely.
    """
    if not empty.is_cpu or empty.nbytes <= _LARGE_BYTES or torch.are_deterministic_algorithms_enabled():
        return empty
    return torch.ops.fastcnn_cpu.kept_like(empty, lasting)


def empty_output(x: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized output of an op on ``x``: its device and format, and where not given its shape and dtype."""
    return torch.empty(
        x.shape if shape is None else shape,
        dtype=x.dtype if dtype is None else dtype,
        device=x.device,
        memory_format=output_format(x),
    )
