"""Max pooling by the CUDA C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...memory_format import dense, format_of, output_format
from ...params import PoolParams
from .. import outputs


def forward(x: Tensor, pool: PoolParams, with_argmax: bool) -> tuple[Tensor, Tensor]:
    format = output_format(x)
    y, argmax = outputs.pooled(x, pool, with_argmax)
    x = dense(x, format)
    channels_last = format == torch.channels_last
    torch.ops.fastcnn_cuda.max_pool2d(x, y, argmax if with_argmax else None, channels_last, *pool.op_args())
    return y, argmax


def backward(dy: Tensor, argmax: Tensor, size: list[int], channels_last: bool, pool: PoolParams) -> Tensor:
    format, dx = format_of(channels_last), outputs.unpooled(dy, size, channels_last)
    dy, argmax = dense(dy, format), dense(argmax, format)
    torch.ops.fastcnn_cuda.max_pool2d_backward(dy, argmax, dx, channels_last, *pool.op_args())
    return dx
