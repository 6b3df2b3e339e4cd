"""Launchers of the kernels of batch norm, ReLU and max-pool."""

from typing import Any

import torch
from torch import Tensor

from ...memory_format import dense, is_channels_last, output_format
from ...params import BatchNormParams, PoolParams, check_same, opmath, pooled_size, wide_bias
from .. import outputs
from . import max_pool2d
from .launch import acc_dtype, cdiv, index_dtype, kernels, launch, processors, sizes
from .parameters import Tiles

OP = "batch_norm_relu_max_pool2d"
_ELEMENTS, _WARPS = 1024, 4  # of a tile, and of a program
_PROGRAMS = 8  # with parts of a channel, on each multiprocessor


def _tiles(x: Tensor) -> Tiles:
    """How programs share out a tensor like ``x``."""
    last, channels = is_channels_last(x), x.shape[1]
    width = min(64, 1 << (channels - 1).bit_length()) if last else 1
    return Tiles(channels, _ELEMENTS // width, width, last, index_dtype(x.numel()), acc_dtype(x.dtype))


def _parts(x: Tensor, layout: Tiles) -> tuple[int, int]:
    """Into how many parts a channel is cut, and of how many tiles."""
    tiles = cdiv(x.numel() // x.shape[1], layout.BP)
    wanted = max(1, processors(x.device) * _PROGRAMS // cdiv(layout.C, layout.BC))
    each = cdiv(tiles, wanted)
    return cdiv(tiles, each), each


def _sums(x: Tensor, parts: int) -> Tensor:
    return x.new_empty((2, parts, x.shape[1]), dtype=torch.float64)


def _constants(norm: BatchNormParams, layout: Tiles) -> dict[str, Any]:
    return {
        "RELU": norm.relu and not norm.relu_first,
        "RELU_FIRST": norm.relu and norm.relu_first,
        "pool": max_pool2d.parameters(norm.pool or PoolParams(1)),
        "layout": layout,
    }


def forward(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: BatchNormParams,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, argmax, mean, var = outputs.normalized(x, norm, keep)
    if x.numel() == 0:
        return y, argmax, mean.zero_(), var.zero_()
    module, layout = kernels(OP), _tiles(x)
    x = dense(x, output_format(x))
    constants, channel_blocks = _constants(norm, layout), cdiv(layout.C, layout.BC)
    by: tuple[Tensor | None, Tensor | None] = mean, var
    if norm.training:
        parts, tiles = _parts(x, layout)
        sums = _sums(x, parts)
        common = {"batch": x.shape[0], "pixels": x.shape[2] * x.shape[3], "parts": parts, "tiles": tiles}
        first = constants["RELU_FIRST"]
        statistics = module.batch_norm_statistics_kernel
        launch(statistics, parts * channel_blocks, x, sums, RELU_FIRST=first, layout=layout, num_warps=_WARPS, **common)
        launch(module.batch_norm_mean_kernel, channel_blocks, sums, mean, var, layout=layout, num_warps=1, **common)
    else:
        by = wide_bias(OP, running_mean, x, "running_mean"), wide_bias(OP, running_var, x, "running_var")
        for kept_one, running in zip((mean, var), by, strict=True):
            if keep and running is not None:
                kept_one.copy_(running)
    blocks = cdiv(y.numel() // layout.C, layout.BP)
    launch(
        module.batch_norm_relu_max_pool2d_forward_kernel,
        blocks * channel_blocks,
        *(x, *by, wide_bias(OP, weight, x, "weight"), wide_bias(OP, bias, x), y, argmax if argmax.numel() else None),
        batch=x.shape[0],
        **sizes(x, y),
        EPS=norm.eps,
        blocks=blocks,
        **constants,
        num_warps=_WARPS,
    )
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
) -> tuple[Tensor, Tensor, Tensor]:
    shape = list(x.shape)
    if norm.pool is not None:
        shape[2:] = pooled_size(x.shape[2:], *norm.pool.op_args())
        expected = outputs.empty_output(x, shape, outputs.argmax_dtype(norm.pool))
        check_same(f"{OP}_backward", "argmax", argmax, expected)
    check_same(f"{OP}_backward", "grad", dy, x, shape)
    for name, value in (("mean", mean), ("var", var)):
        check_same(f"{OP}_backward", name, value, x.new_empty(0, dtype=opmath(x.dtype)), x.shape[1:2])
    dx, dweight, dbias = outputs.norm_gradients(x, weight, bias)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    module, layout, format = kernels(OP), _tiles(x), output_format(x)
    dy, x, places = dense(dy, format), dense(x, format), dense(argmax, format) if norm.pool else None
    tensors = x, dy, places, mean.contiguous(), var.contiguous()
    affine = wide_bias(OP, weight, x, "weight"), wide_bias(OP, bias, x)
    channel_blocks = cdiv(layout.C, layout.BC)
    common = {"batch": x.shape[0], **sizes(x, dy), "EPS": norm.eps, **_constants(norm, layout)}
    terms = None
    if norm.training or weight is not None or bias is not None:
        parts, tiles = _parts(x, layout)
        sums, terms = _sums(x, parts), mean.new_empty((2, layout.C))
        sum_up = module.batch_norm_sums_kernel
        launch(
            sum_up, parts * channel_blocks, *tensors, *affine, sums, parts=parts, tiles=tiles, **common,
            num_warps=_WARPS,
        )  # fmt: skip
        launch(
            module.batch_norm_gradients_kernel,
            channel_blocks,
            *(sums, tensors[4], dweight if weight is not None else None, dbias if bias is not None else None, terms),
            count=x.numel() // layout.C,
            EPS=norm.eps,
            parts=parts,
            layout=layout,
            num_warps=1,
        )
    blocks = cdiv(x.numel() // layout.C, layout.BP)
    launch(
        module.batch_norm_relu_max_pool2d_backward_kernel,
        blocks * channel_blocks,
        *(*tensors, *affine, terms if norm.training else None, dx),
        blocks=blocks,
        **common,
        num_warps=_WARPS,
    )
    return dx, dweight, dbias
