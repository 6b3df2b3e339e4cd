"""Max pooling in plain PyTorch."""

import torch
from torch import Tensor

from ... import reference
from ...memory_format import format_of, output, output_format
from ...params import PoolParams, opmath
from ..outputs import argmax_dtype


def forward(x: Tensor, pool: PoolParams, with_argmax: bool) -> tuple[Tensor, Tensor]:
    format = output_format(x)
    y, argmax = reference.window_offsets(x, pool)
    if not with_argmax:
        return output(y, format), x.new_empty(0, dtype=torch.uint8)
    return output(y, format), output(argmax.to(argmax_dtype(pool)), format)


def backward(dy: Tensor, argmax: Tensor, size: list[int], channels_last: bool, pool: PoolParams) -> Tensor:
    dx = reference.max_pool2d_backward(dy.to(opmath(dy.dtype)), argmax, (size[0], size[1]), pool)
    return output(dx.to(dy.dtype), format_of(channels_last))
