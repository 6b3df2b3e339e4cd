"""The tail of an AlexNet stage by the C++ kernel."""

from typing import Any

import torch
from torch import Tensor

from ...memory_format import dense, output_format
from ...params import TailParams, wide_bias
from .. import outputs
from .memory import kept

CPU = torch.ops.fastcnn_cpu


def forward(
    x: Tensor, bias: Tensor | None, tail: TailParams, with_argmax: bool, library: Any = CPU
) -> tuple[Tensor, Tensor]:
    format = output_format(x)
    y, argmax = outputs.pooled(x, tail.pool, with_argmax)
    y = kept(y, lasting=with_argmax)
    tensors = dense(x, format), wide_bias("relu_lrn_max_pool2d", bias, x), y, argmax if argmax.numel() else None
    library.relu_lrn_max_pool2d(*tensors, format == torch.channels_last, *tail.op_args())
    return y, argmax


def backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, argmax: Tensor, tail: TailParams, library: Any = CPU
) -> tuple[Tensor, Tensor]:
    format, dx = output_format(x), kept(outputs.empty_output(x))
    kernel_bias = wide_bias("relu_lrn_max_pool2d", bias, x)
    dbias = None if kernel_bias is None else torch.empty_like(kernel_bias)
    inputs = dense(dy, format), dense(x, format), kernel_bias, None if tail.pool is None else dense(argmax, format)
    library.relu_lrn_max_pool2d_backward(*inputs, dx, dbias, format == torch.channels_last, *tail.op_args())
    return dx, x.new_empty(0) if bias is None or dbias is None else dbias.to(bias.dtype)
