"""Batch norm, ReLU and max-pool by the C++ kernels."""

from typing import Any

import torch
from torch import Tensor

from ...memory_format import dense, output_format
from ...params import BatchNormParams, wide_bias
from .. import outputs
from .memory import kept

CPU, OP = torch.ops.fastcnn_cpu, "batch_norm_relu_max_pool2d"


def forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: BatchNormParams,
    keep: bool,
    library: Any = CPU,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    format = output_format(x)
    channels_last = format == torch.channels_last
    y, argmax, mean, var = outputs.normalized(x, norm, keep)
    y, dense_x = kept(y, lasting=keep), dense(x, format)
    by: tuple[Tensor | None, Tensor | None] = mean, var
    if norm.training:
        library.batch_norm_statistics(dense_x, mean, var, channels_last, norm.relu and norm.relu_first)
    else:
        by = wide_bias(OP, running_mean, x, "running_mean"), wide_bias(OP, running_var, x, "running_var")
        for kept_one, running in zip((mean, var), by, strict=True):
            if keep and running is not None:
                kept_one.copy_(running)
    tensors = *by, wide_bias(OP, weight, x, "weight"), wide_bias(OP, bias, x), y, argmax if argmax.numel() else None
    library.batch_norm_relu_max_pool2d(dense_x, *tensors, channels_last, *norm.op_args())
    return y, argmax, mean, var


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    argmax: Tensor,
    norm: BatchNormParams,
    library: Any = CPU,
) -> tuple[Tensor, Tensor, Tensor]:
    format, dx = output_format(x), kept(outputs.empty_output(x))
    affine = wide_bias(OP, weight, x, "weight"), wide_bias(OP, bias, x)
    sums = [None if t is None else torch.empty_like(t) for t in affine]
    inputs = dense(dy, format), dense(x, format), mean.contiguous(), var.contiguous(), *affine
    places = None if norm.pool is None else dense(argmax, format)
    library.batch_norm_relu_max_pool2d_backward(
        *inputs, places, dx, *sums, format == torch.channels_last, *norm.op_args()
    )
    dweight, dbias = (
        x.new_empty(0) if s is None or t is None else s.to(t.dtype) for s, t in zip(sums, (weight, bias), strict=True)
    )
    return dx, dweight, dbias
