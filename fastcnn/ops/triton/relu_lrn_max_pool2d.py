"""Launchers of the kernels of an AlexNet stage's tail."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...memory_format import dense, is_channels_last, output, output_format
from ...params import LRNParams, PoolParams, TailParams, check_bias, check_same, opmath
from .. import outputs
from . import lrn, max_pool2d
from .launch import acc_dtype, capability, cdiv, index_dtype, kernels, launch, processors

# Lanes of a program, warps that they are spread over, and about how many channels a lane owns; forward also, how many
# neighbouring outputs where their windows overlap, in channels_last, and how many programs a multiprocessor runs. For
# 16-bit tensors in channels_last the second is for sm_90, and the third, of fewer registers, from sm_100 on; the first
# is for all others, and the rest are what a GPU test checks too.
FORWARD_CONFIGS = [(128, 4, 12, 1, 3), (128, 4, 8, 3, 3), (128, 4, 8, 2, 3), (128, 4, 16, 2, 2), (64, 2, 8, 4, 4)]
BACKWARD_CONFIGS = [(128, 4, 8), (128, 4, 24), (128, 4, 16), (64, 2, 16)]


def _config(x: Tensor) -> int:
    """Index of the configuration for ``x``."""
    if not is_channels_last(x) or x.element_size() != 2:
        return 0
    return sum(capability(x) >= least for least in ((9, 0), (10, 0)))  # see kernels/packed.py


def _bias(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """In the dtype of ``x`` if it has that, so that the kernels rectify two 16-bit elements at once; else wide."""
    check_bias("relu_lrn_max_pool2d", bias, x)
    if bias is None:
        return None
    return (bias if bias.dtype == x.dtype else bias.to(opmath(x.dtype))).contiguous()


def _constants(x: Tensor, tail: TailParams, most: int) -> dict[str, Any] | None:
    """What both kernels take; None where a window is too large to unroll. ``most`` is that of ``lrn.share``."""
    channels, pool = x.shape[1], tail.pool or PoolParams(1)
    window = lrn.window_of(tail.lrn or LRNParams(1), channels)
    if not lrn.is_near(window) or not max_pool2d.is_near(pool):
        return None
    v, width = lrn.share(x, window["CHANNELS"], most)
    return {
        "C": channels,
        "RELU": tail.relu,
        "LRN": tail.lrn is not None,
        "CHANNELS_LAST": is_channels_last(x),
        "V": v,
        "VECTOR": width,
        "ACC": acc_dtype(x.dtype),
        **window,
        **max_pool2d.pooling_of(pool),
    }


def _registers(lanes: int) -> int:
    """Per lane, for a multiprocessor to run so many at once. Left alone, ptxas uses more, or spills to use fewer."""
    return min(255, 65536 // lanes // 8 * 8)


def forward(
    x: Tensor,
    bias: Tensor | None,
    tail: TailParams,
    with_argmax: bool,
    *,
    config: tuple[int, int, int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    bias = _bias(bias, x)
    y, argmax = outputs.pooled(x, tail.pool, with_argmax)
    if y.numel() == 0:
        return y, argmax
    block, num_warps, most, r, programs = config or FORWARD_CONFIGS[_config(x)]
    constants = _constants(x, tail, most)
    if constants is None:
        return _in_steps(x, bias, tail, with_argmax)
    (h, w), (oh, ow) = x.shape[2:], y.shape[2:]
    channels, kw, sw, dw = (constants[name] for name in ("CHANNELS", "KW", "SW", "DW"))
    exchanged = not is_channels_last(x) and kw == sw + 1 and dw == 1
    if exchanged or kw <= sw or dw > 1 or ow < r:
        r = 1
    columns = ow + 1 if exchanged else cdiv(ow, r)
    lanes = x.shape[0] * x.shape[1] // channels * cdiv(channels, constants["V"]) * columns
    blocks = cdiv(lanes, block // 32 * 31 if exchanged else block)
    rows = blocks * oh
    run = cdiv(rows, programs * processors(x.device))
    launch(
        kernels("relu_lrn_max_pool2d").forward,
        cdiv(rows, run),
        *(dense(x, output_format(x)), x if bias is None else bias, y, argmax, x.shape[0], h, w, oh, ow, rows, run),
        PADDED=tail.pool is not None and not max_pool2d.is_inside(tail.pool, (h, w), (oh, ow)),
        WITH_BIAS=bias is not None,
        WITH_ARGMAX=argmax.numel() > 0,
        R=r,
        EXCHANGED=exchanged,
        BLOCK=block,
        INDEX=index_dtype(max(blocks * block, rows + run)),
        num_warps=num_warps,
        maxnreg=_registers(32 * num_warps * programs),
        **constants,
    )
    return y, argmax


def _in_steps(x: Tensor, bias: Tensor | None, tail: TailParams, with_argmax: bool) -> tuple[Tensor, Tensor]:
    """One operator after the other, rounded once at the end."""
    y, argmax = reference.rectified(x.to(opmath(x.dtype)), bias, tail.relu), x.new_empty(0, dtype=torch.uint8)
    if tail.lrn is not None:
        y = lrn.forward(y, tail.lrn)
    if tail.pool is not None:
        y, argmax = max_pool2d.forward(y, tail.pool, with_argmax)
    return output(y.to(x.dtype), output_format(x)), argmax


def _backward_in_steps(
    dy: Tensor, x: Tensor, bias: Tensor | None, argmax: Tensor, tail: TailParams
) -> tuple[Tensor, Tensor]:
    wide = opmath(x.dtype)
    z, dz = reference.rectified(x.to(wide), bias, tail.relu), dy.to(wide)
    if tail.pool is not None:
        dz = max_pool2d.backward(dz, argmax, list(x.shape[2:]), is_channels_last(x), tail.pool)
    if tail.lrn is not None:
        dz = lrn.backward(dz, z, tail.lrn)
    if tail.relu:
        dz = dz.masked_fill(z <= 0, 0)
    dbias = x.new_empty(0) if bias is None else dz.sum((0, 2, 3)).to(bias.dtype)
    return output(dz.to(x.dtype), output_format(x)), dbias


@lru_cache
def _splits(batch: int, lanes: int, at_once: int) -> int:
    """Into how many groups to split the images, each group done by so many lanes, of which a GPU runs some at once.

    Of the numbers that finish soonest, the smallest: each group leaves partial sums.
    """
    most = min(batch, max(1, 8 * at_once // lanes))
    return min(range(1, most + 1), key=lambda splits: cdiv(batch, splits) * cdiv(splits * lanes, at_once))


def backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    argmax: Tensor,
    tail: TailParams,
    *,
    config: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    expected = outputs.pooled(x, tail.pool, with_argmax=True)
    check_same("relu_lrn_max_pool2d_backward", "grad", dy, expected[0])
    if tail.pool is not None:
        check_same("relu_lrn_max_pool2d_backward", "argmax", argmax, expected[1])
    kernel_bias, format, dx = _bias(bias, x), output_format(x), outputs.empty_output(x)
    block, num_warps, most = config or BACKWARD_CONFIGS[_config(x)]
    constants = _constants(x, tail, most) if x.numel() else {}
    if constants is None:
        return _backward_in_steps(dy, x, bias, argmax, tail)
    resident = 384 if tail.lrn is None else 256  # lanes that a multiprocessor runs at once
    rows = columns = splits = 0
    if constants:
        rows = cdiv(x.shape[2] + constants["PH"], constants["SH"])
        columns = cdiv(x.shape[3] + constants["PW"], constants["SW"])
        channels = constants["CHANNELS"]
        lanes = rows * columns * x.shape[1] // channels * cdiv(channels, constants["V"])
        splits = _splits(x.shape[0], lanes, resident * processors(x.device))
    sums = x.new_empty((splits * rows * columns, x.shape[1]) if bias is not None else 0, dtype=opmath(x.dtype))
    if constants:
        launch(
            kernels("relu_lrn_max_pool2d").backward,
            cdiv(splits * lanes, block),
            *(dense(dy, format), dense(x, format), x if kernel_bias is None else kernel_bias),
            *(argmax if tail.pool is None else dense(argmax, format), dx, sums),
            *(x.shape[0], *x.shape[2:], *dy.shape[2:], splits),
            POOL=tail.pool is not None,
            WITH_BIAS=bias is not None,
            BLOCK=block,
            INDEX=index_dtype(splits * lanes),
            num_warps=num_warps,
            maxnreg=_registers(resident),
            **constants,
        )
    return dx, sums if bias is None else sums.sum(0).to(bias.dtype)
