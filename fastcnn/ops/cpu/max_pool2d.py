"""Max pooling by the C++ kernel."""

from typing import Any

import torch
from torch import Tensor

from ...memory_format import dense, format_of, output_format
from ...params import PoolParams
from .. import outputs
from .memory import kept

CPU = torch.ops.fastcnn_cpu


def forward(x: Tensor, pool: PoolParams, with_argmax: bool, library: Any = CPU) -> tuple[Tensor, Tensor]:
    format = output_format(x)
    y, argmax = outputs.pooled(x, pool, with_argmax)
    x, y = dense(x, format), kept(y, lasting=with_argmax)
    channels_last = format == torch.channels_last
    library.max_pool2d(x, y, argmax if with_argmax else None, channels_last, *pool.op_args())
    return y, argmax


def backward(
    dy: Tensor, argmax: Tensor, size: list[int], channels_last: bool, pool: PoolParams, library: Any = CPU
) -> Tensor:
    format, dx = format_of(channels_last), kept(outputs.unpooled(dy, size, channels_last))
    dy, argmax = dense(dy, format), dense(argmax, format)
    library.max_pool2d_backward(dy, argmax, dx, channels_last, *pool.op_args())
    return dx
