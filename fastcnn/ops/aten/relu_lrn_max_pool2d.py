"""The tail of an AlexNet stage in plain PyTorch."""

import torch
from torch import Tensor

from ... import reference
from ...memory_format import output, output_format
from ...params import TailParams, opmath
from ..outputs import argmax_dtype


def forward(x: Tensor, bias: Tensor | None, tail: TailParams, with_argmax: bool) -> tuple[Tensor, Tensor]:
    format = output_format(x)
    if tail.pool is None or not with_argmax:
        y = reference.relu_lrn_max_pool2d(x, bias, relu=tail.relu, lrn=tail.lrn, pool=tail.pool)
        return output(y, format), x.new_empty(0, dtype=torch.uint8)
    wide = x.to(opmath(x.dtype))
    wide_bias = None if bias is None else bias.to(wide.dtype)
    unpooled = reference.relu_lrn_max_pool2d(wide, wide_bias, relu=tail.relu, lrn=tail.lrn)
    y, argmax = reference.window_offsets(unpooled, tail.pool)
    return output(y.to(x.dtype), format), output(argmax.to(argmax_dtype(tail.pool)), format)


def backward(dy: Tensor, x: Tensor, bias: Tensor | None, argmax: Tensor, tail: TailParams) -> tuple[Tensor, Tensor]:
    wide = opmath(x.dtype)
    z = reference.rectified(x.to(wide), bias, tail.relu)
    dz = dy.to(wide)
    if tail.pool is not None:
        dz = reference.max_pool2d_backward(dz, argmax, (x.shape[2], x.shape[3]), tail.pool)
    if tail.lrn is not None:
        dz = reference.lrn_backward(dz, z, tail.lrn)
    if tail.relu:
        dz = dz.masked_fill(z <= 0, 0)
    dbias = x.new_empty(0) if bias is None else dz.sum((0, 2, 3)).to(bias.dtype)
    return output(dz.to(x.dtype, copy=dz is dy), output_format(x)), dbias
