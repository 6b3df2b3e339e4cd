"""Batch norm, ReLU and max-pool in plain PyTorch."""

import torch
from torch import Tensor

from ... import reference
from ...memory_format import output, output_format
from ...params import BatchNormParams, opmath
from ..outputs import argmax_dtype


def forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: BatchNormParams,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    format = output_format(x)
    mean, var = reference.statistics(x, running_mean, running_var, norm)
    y = reference.standardized(x.to(opmath(x.dtype)), mean, var, weight, bias, norm)
    argmax = x.new_empty(0, dtype=torch.uint8)
    if norm.pool is not None:
        y, places = reference.window_offsets(y, norm.pool)
        argmax = output(places.to(argmax_dtype(norm.pool)), format) if keep else argmax
    if not norm.training:  # an op returns no tensor that it was given
        mean, var = (t.clone() if keep else t.new_empty(0) for t in (mean, var))
    return output(y.to(x.dtype), format), argmax, mean, var


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    argmax: Tensor,
    norm: BatchNormParams,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(opmath(x.dtype))
    dz = dy.to(wide.dtype)
    if norm.pool is not None:
        dz = reference.max_pool2d_backward(dz, argmax, (x.shape[2], x.shape[3]), norm.pool)
    if norm.relu and not norm.relu_first:
        dz = dz.masked_fill(reference.standardized(wide, mean, var, weight, bias, norm) <= 0, 0)
    inverse = (var + norm.eps).rsqrt()[:, None, None]
    normalized = ((wide.relu() if norm.relu and norm.relu_first else wide) - mean[:, None, None]) * inverse
    dbias, dweight = (t.sum((0, 2, 3)) for t in (dz, dz * normalized))
    dx = dz
    if norm.training and x.numel():
        count = x.numel() // x.shape[1]
        dx = dz - dbias[:, None, None] / count - normalized * (dweight[:, None, None] / count)
    dx = dx * inverse if weight is None else dx * (inverse * weight.to(wide.dtype)[:, None, None])
    if norm.relu and norm.relu_first:
        dx = dx.masked_fill(wide <= 0, 0)
    dweight, dbias = (x.new_empty(0) if t is None else s.to(t.dtype) for t, s in ((weight, dweight), (bias, dbias)))
    return output(dx.to(x.dtype), output_format(x)), dweight, dbias
