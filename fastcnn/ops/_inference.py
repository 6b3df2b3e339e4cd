"""Inference on CPU from weights that do not change: packed once, convolution and tail sharing one small buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..params import LRNParams, PoolParams, opmath, pooled_size
from ._packed import Frozen, unchanged
from .conv2d_relu import _magnitude, _onednn_runs, _output_shape, _pack

# A larger block is mapped anew each time it is allocated, by the GNU C library for one; smaller ones are used again.
_REUSED_BYTES = 32 << 20
_LINEAR_BATCH = 32  # that weights are packed for, and good for any


def runs_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether the functions of this file may run: on real tensors of the CPU that ask for no gradient."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if type(x) is not Tensor or x.device.type != "cpu" or weight.device.type != "cpu" or x.dtype != weight.dtype:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return _onednn_runs(x) and backends.choose("conv2d_relu", ("reference", "cpu"), x) == "cpu"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`torch.nn.functional.linear` of a batch of vectors."""
    reorder = torch.ops.mkldnn._reorder_linear_weight
    packed = unchanged(weight).get("linear", lambda: reorder(weight.detach(), _LINEAR_BATCH))
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def conv_stage(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    relu: bool,
    lrn: LRNParams | None,
    pool: PoolParams | None,
) -> Tensor:
    """Convolution -> ReLU? -> LRN? -> max-pool?, in channels_last."""
    x = x.contiguous(memory_format=torch.channels_last)
    frozen = unchanged(weight)
    packed = frozen.get("forward", lambda: _pack(weight, x, stride, padding, dilation, groups))

    def convolve(x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed, bias, padding, stride, dilation, groups, activation, [], ""
        ).contiguous(memory_format=torch.channels_last)

    if lrn is None and pool is None:
        if not relu:
            return convolve(x, bias, "none")
        if _is_finite(x, weight, bias, frozen):  # oneDNN's ReLU makes 0 of NaN
            return convolve(x, bias, "relu")
        return torch.relu_(convolve(x, bias, "none"))
    return _with_tail(x, convolve, _output_shape(x, weight, stride, padding, dilation, groups), bias, relu, lrn, pool)


def _is_finite(x: Tensor, weight: Tensor, bias: Tensor | None, frozen: Frozen) -> bool:
    of_weight = frozen.get("magnitude", lambda: torch.tensor(_magnitude(weight))).item()
    return _magnitude(x) * of_weight * weight[0].numel() + _magnitude(bias) < 1e38


def _with_tail(
    x: Tensor,
    convolve: Any,
    shape: list[int],
    bias: Tensor | None,
    relu: bool,
    lrn: LRNParams | None,
    pool: PoolParams | None,
) -> Tensor:
    """A few images at a time, so that the convolution's output stays in memory that is used again."""
    n, c, *size = shape
    lrn_args = (0, 0.0, 0.0, 0.0, 1) if lrn is None else lrn.op_args()
    pool_args = ([], [], [], [], False) if pool is None else pool.op_args()
    out_size = size if pool is None else pooled_size(size, *pool_args)
    y = torch.empty((n, c, *out_size), dtype=x.dtype, memory_format=torch.channels_last)
    wide_bias = None if bias is None else bias.to(opmath(x.dtype)).contiguous()
    image_bytes = c * size[0] * size[1] * x.element_size()
    step = n if n * image_bytes <= _REUSED_BYTES else max(1, _REUSED_BYTES // 2 // image_bytes)
    for i in range(0, n, step):
        z = convolve(x[i : i + step], None, "none")
        torch.ops.fastcnn_cpu.relu_lrn_max_pool2d(
            z, wide_bias, y[i : i + step], None, True, relu, *lrn_args, *pool_args
        )
    return y
