"""Launchers of the kernels of an AlexNet stage's tail."""

from functools import lru_cache

import torch
from torch import Tensor

from ... import reference
from ...memory_format import dense, is_channels_last, output, output_format
from ...params import PoolParams, TailParams, check_bias, check_same, opmath
from .. import outputs
from . import lrn, max_pool2d
from .launch import capability, cdiv, kernels, launch, layout, processors, sizes
from .parameters import LRN, Pool

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


def _channels(x: Tensor, tail: TailParams) -> int:
    """Of a group."""
    return x.shape[1] // (tail.lrn.groups if tail.lrn else 1)


def _parameters(tail: TailParams, channels: int, padded: bool = False) -> tuple[LRN | None, Pool] | None:
    """As the kernels take them; None where a window is too large to unroll. ``channels`` of a group."""
    window = lrn.parameters(tail.lrn, channels) if tail.lrn else None
    pool = tail.pool or PoolParams(1)
    if (window and not lrn.is_near(window)) or not max_pool2d.is_near(pool):
        return None
    return window, max_pool2d.parameters(pool, padded)


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
    (oh, ow), channels = y.shape[2:], _channels(x, tail)
    padded = tail.pool is not None and not max_pool2d.is_inside(tail.pool, x.shape[2:], y.shape[2:])
    parameters = _parameters(tail, channels, padded)
    if parameters is None:
        return _in_steps(x, bias, tail, with_argmax)
    window, pool = parameters
    block, num_warps, most, r, programs = config or FORWARD_CONFIGS[_config(x)]
    share = lrn.share(x, channels, most)
    exchanged = not is_channels_last(x) and pool.KW == pool.SW + 1 and pool.DW == 1
    if exchanged or pool.KW <= pool.SW or pool.DW > 1 or ow < r:
        r = 1
    columns = ow + 1 if exchanged else cdiv(ow, r)
    lanes = x.shape[0] * x.shape[1] // channels * cdiv(channels, share[0]) * columns
    blocks = cdiv(lanes, block // 32 * 31 if exchanged else block)
    rows = blocks * oh
    run = cdiv(rows, programs * processors(x.device))
    launch(
        kernels("relu_lrn_max_pool2d").relu_lrn_max_pool2d_forward_kernel,
        cdiv(rows, run),
        *(dense(x, output_format(x)), bias, y, argmax if argmax.numel() else None),
        batch=x.shape[0],
        **sizes(x, y),
        rows=rows,
        run=run,
        RELU=tail.relu,
        lrn=window,
        pool=pool,
        layout=layout(x, channels, share, block, max(blocks * block, rows + run)),
        R=r,
        EXCHANGED=exchanged,
        num_warps=num_warps,
        maxnreg=_registers(32 * num_warps * programs),
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
    if x.numel() == 0:
        return dx, x.new_empty(0) if bias is None else torch.zeros_like(bias)
    channels = _channels(x, tail)
    parameters = _parameters(tail, channels)
    if parameters is None:
        return _backward_in_steps(dy, x, bias, argmax, tail)
    window, pool = parameters
    block, num_warps, most = config or BACKWARD_CONFIGS[_config(x)]
    share = lrn.share(x, channels, most)
    resident = 384 if tail.lrn is None else 256  # lanes that a multiprocessor runs at once
    rows, columns = cdiv(x.shape[2] + pool.PH, pool.SH), cdiv(x.shape[3] + pool.PW, pool.SW)
    lanes = rows * columns * x.shape[1] // channels * cdiv(channels, share[0])
    splits = _splits(x.shape[0], lanes, resident * processors(x.device))
    sums = x.new_empty((splits * rows * columns, x.shape[1]), dtype=opmath(x.dtype)) if bias is not None else None
    launch(
        kernels("relu_lrn_max_pool2d").relu_lrn_max_pool2d_backward_kernel,
        cdiv(splits * lanes, block),
        *(dense(dy, format), dense(x, format), kernel_bias),
        *(None if tail.pool is None else dense(argmax, format), dx, sums),
        batch=x.shape[0],
        **sizes(x, dy),
        splits=splits,
        RELU=tail.relu,
        lrn=window,
        pool=pool,
        layout=layout(x, channels, share, block, splits * lanes),
        num_warps=num_warps,
        maxnreg=_registers(resident),
    )
    return dx, x.new_empty(0) if sums is None or bias is None else sums.sum(0).to(bias.dtype)
