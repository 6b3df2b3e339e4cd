"""Memory formats: one rule decides the strides of every output, for kernels and fakes alike."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def output_format(x: Tensor) -> torch.memory_format:
    """channels_last if ``x`` is channels_last and not also contiguous, otherwise contiguous."""
    channels_last = _CHANNELS_LAST.get(x.dim())
    if channels_last is None or x.is_contiguous():
        return torch.contiguous_format
    try:
        return channels_last if x.is_contiguous(memory_format=channels_last) else torch.contiguous_format
    except RuntimeError:  # inside of vmap, where torch does not tell
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


def flat(x: Tensor) -> Tensor:
    """``x`` in the order of memory, which for a dense tensor is a view."""
    return (x.permute(0, 2, 3, 1) if is_channels_last(x) else x).reshape(-1)


def strides_of(shape: Sequence[Any], format: torch.memory_format) -> tuple[Any, ...]:
    """Of a new 4-D tensor that is not empty."""
    _, c, h, w = shape
    return (c * h * w, 1, c * w, c) if format == torch.channels_last else (c * h * w, h * w, w, 1)


def as_new(y: Tensor, format: torch.memory_format) -> Tensor:
    """``contiguous``, but also with the strides of a new 4-D tensor where a size is 1: a view, if ``y`` is dense."""
    y = y.contiguous(memory_format=format)
    if y.stride() == strides_of(y.shape, format):
        return y
    n, c, h, w = y.shape
    return flat(y).view(n, h, w, c).permute(0, 3, 1, 2) if format == torch.channels_last else flat(y).view(n, c, h, w)
