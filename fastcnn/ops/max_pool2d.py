"""Max pooling with a 1-byte argmax; backward gathers, in one fixed order and without atomics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..params import IntOrPair, PoolParams, check_input, opmath, pooled_size
from ._layout import dense, empty_output, format_of, is_channels_last, kept, output, output_format
from ._operator import define, fold_batch, needs_grad, unfold_batch
from ._triton import acc_dtype, cdiv, check_same, index_dtype, kernels, launch, vector


def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling, overlapping or not, as :func:`torch.nn.functional.max_pool2d`.

    Where a gradient will be asked for, one byte an output is kept, the place of its maximum; torch keeps the input and
    eight bytes. Of equal values the first in row-major order counts; NaN propagates.

    Args:
        input: shape (C, H, W) or (N, C, H, W); float16, bfloat16, float32 or float64, contiguous or channels_last
            (others are copied first). Integer tensors are handed to torch.
        kernel_size: height and width of the window.
        stride: default ``kernel_size``.
        padding: implicit ``-inf`` on both sides, at most half the window.
        dilation: distance between the window's elements.
        ceil_mode: let the last window start inside the input and end outside.
        return_indices: also return where the maxima are, as flat indices ``h*W + w`` of dtype int64.

    Returns:
        Tensor of shape (..., OH, OW); dtype and memory format as the input. With ``return_indices`` a pair.

    Raises:
        TypeError, RuntimeError, NotImplementedError: as torch, for the same arguments.

    Source: Krizhevsky et al. (2012), 3.4.
    """
    pool = PoolParams(kernel_size, stride, padding, dilation, ceil_mode)
    if isinstance(input, Tensor) and not input.is_floating_point() and not input.is_complex():
        return reference.max_pool2d(input, *pool.op_args(), return_indices)
    check_input("max_pool2d", input)
    if input.dim() not in (3, 4) or 0 in input.shape[-3:]:
        raise RuntimeError(
            "max_pool2d(): expected a 3D (C, H, W) or 4D (N, C, H, W) input with only the batch allowed to be empty, "
            f"but got size {list(input.shape)}"
        )
    pool.output_size(input.shape[-2], input.shape[-1])
    batched = input if input.dim() == 4 else input.contiguous().unsqueeze(0)
    y, argmax = pooled(batched, *pool.op_args(), return_indices or needs_grad(input))
    y = y if input.dim() == 4 else y.squeeze(0)
    if not return_indices:
        return y
    indices = reference.flat_indices(argmax, input.shape[-1], pool)
    return y, indices if input.dim() == 4 else indices.squeeze(0)


def empty_argmax(x: Tensor, shape: list[int], kernel_size: list[int]) -> Tensor:
    """The place ``kh*KW + kw`` of each maximum in its unclipped window: one byte where that is enough."""
    wide = kernel_size[0] * kernel_size[1] > 256
    return empty_output(x, shape, torch.int32 if wide else torch.uint8)


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *pool, with_argmax = args
    shape = [*x.shape[:2], *pooled_size(x.shape[2:], *pool)]
    argmax = empty_argmax(x, shape, pool[0]) if with_argmax else x.new_empty(0, dtype=torch.uint8)
    return empty_output(x, shape), argmax


def _reference(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *pool, with_argmax = args
    y, argmax = reference.window_offsets(x, PoolParams(*pool))
    dtype = empty_argmax(x, [0] * 4, pool[0]).dtype
    argmax = output(argmax.to(dtype), output_format(x)) if with_argmax else x.new_empty(0, dtype=torch.uint8)
    return output(y, output_format(x)), argmax


def _compiled(library: str, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *pool, with_argmax = args
    y, argmax = _fake(x, *args)
    x, y = dense(x, output_format(x)), kept(y, lasting=with_argmax)
    getattr(torch.ops, library).max_pool2d(x, y, argmax if with_argmax else None, is_channels_last(x), *pool)
    return y, argmax


def _backward_fake(dy: Tensor, argmax: Tensor, size: list[int], channels_last: bool, *pool: Any) -> Tensor:
    shape = (*dy.shape[:2], *size)
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=format_of(channels_last))


def _backward_reference(dy: Tensor, argmax: Tensor, size: list[int], channels_last: bool, *pool: Any) -> Tensor:
    dx = reference.max_pool2d_backward(dy.to(opmath(dy.dtype)), argmax, (size[0], size[1]), PoolParams(*pool))
    return output(dx.to(dy.dtype), format_of(channels_last))


def _backward_compiled(
    library: str, dy: Tensor, argmax: Tensor, size: list[int], channels_last: bool, *pool: Any
) -> Tensor:
    format = format_of(channels_last)
    dx = kept(_backward_fake(dy, argmax, size, channels_last))
    backward = getattr(torch.ops, library).max_pool2d_backward
    backward(dense(dy, format), dense(argmax, format), dx, channels_last, *pool)
    return dx


# Of the Triton kernels: lanes in a program, warps that they are spread over, and most channels of a lane in NCHW. The
# first is for channels_last, the second for NCHW; the others are what a GPU test checks too.
FORWARD_CONFIGS = [(128, 4, 8), (128, 4, 4), (256, 4, 8), (256, 8, 8)]
BACKWARD_CONFIGS = [(128, 4, 8), (128, 4, 16), (64, 2, 8), (256, 8, 8)]


def triton_pool(pool: Any) -> dict[str, int]:
    """The parameters of the pooling as the Triton kernels take them."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), _ = pool
    return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw, "DH": dh, "DW": dw}


def is_near(pool: dict[str, int]) -> bool:
    """Whether a Triton program can unroll the windows that hold an element, and the elements between two windows."""
    reach = ((pool["KH"] - 1) * pool["DH"] // pool["SH"] + 1) * ((pool["KW"] - 1) * pool["DW"] // pool["SW"] + 1)
    return pool["SH"] * pool["SW"] <= 16 and reach <= 32 and pool["KH"] * pool["KW"] <= 32


def is_inside(pool: dict[str, int], size: Sequence[int], out: Sequence[int]) -> bool:
    """Whether every window is inside of the map."""
    return all(
        pool["P" + d] == 0 and (o - 1) * pool["S" + d] + (pool["K" + d] - 1) * pool["D" + d] < s
        for d, o, s in zip("HW", out, size, strict=True)
    )


def _run(
    kernel: Any, config: tuple[int, int, int], x: Tensor, items: int, *args: Any, channels_last: bool, **constants: Any
) -> None:
    """Launch a kernel over ``items`` places in each map of ``x``, at which it reads vectors of the channels."""
    (block, num_warps, most), channels = config, x.shape[1]
    v = vector(channels, x) if channels_last else min(channels, most)
    lanes = x.shape[0] * cdiv(channels, v) * items
    launch(
        kernel,
        cdiv(lanes, block),
        *args,
        C=channels,
        CHANNELS_LAST=channels_last,
        V=v,
        BLOCK=block,
        INDEX=index_dtype(lanes),
        ACC=acc_dtype(x.dtype),
        num_warps=num_warps,
        **constants,
    )


def triton(x: Tensor, *args: Any, config: tuple[int, int, int] | None = None) -> tuple[Tensor, Tensor]:
    *pool, with_argmax = args
    y, argmax = _fake(x, *args)
    channels_last = is_channels_last(x)
    (h, w), (oh, ow), constants = x.shape[2:], y.shape[2:], triton_pool(pool)
    _run(
        kernels("max_pool2d").forward,
        config or FORWARD_CONFIGS[not channels_last],
        x,
        oh * ow,
        *(dense(x, output_format(x)), y, argmax, x.shape[0], h, w, oh, ow),
        channels_last=channels_last,
        UNROLL=pool[0][0] * pool[0][1] <= 32,
        PADDED=not is_inside(constants, (h, w), (oh, ow)),
        WITH_ARGMAX=with_argmax,
        **({} if channels_last else {"maxnreg": 96}),  # left alone, ptxas uses fewer, and has fewer loads in flight
        **constants,
    )
    return y, argmax


def triton_backward(
    dy: Tensor,
    argmax: Tensor,
    size: list[int],
    channels_last: bool,
    *pool: Any,
    config: tuple[int, int, int] | None = None,
) -> Tensor:
    (h, w), (oh, ow), format = size, dy.shape[2:], format_of(channels_last)
    check_same("max_pool2d_backward", "argmax", argmax, empty_argmax(dy, list(dy.shape), pool[0]))
    if [oh, ow] != pooled_size(size, *pool):
        raise RuntimeError(f"max_pool2d_backward(): expected grad of size {pooled_size(size, *pool)}, got {[oh, ow]}")
    dx = _backward_fake(dy, argmax, size, channels_last)
    constants = triton_pool(pool)
    near, module = is_near(constants), kernels("max_pool2d")
    blocks = cdiv(h + constants["PH"], constants["SH"]) * cdiv(w + constants["PW"], constants["SW"])
    _run(
        module.backward if near else module.backward_far,
        config or BACKWARD_CONFIGS[not channels_last],
        dx,
        blocks if near else h * w,
        *(dense(dy, format), dense(argmax, format), dx, dy.shape[0], h, w, oh, ow),
        channels_last=channels_last,
        **constants,
    )
    return dx


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.pool, ctx.has_argmax = inputs
    ctx.size, ctx.channels_last = list(x.shape[2:]), is_channels_last(x)
    # Exported where no gradient was asked for, there is no argmax: then the input is kept, to find it when needed.
    ctx.save_for_backward(output[1] if ctx.has_argmax else x)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 6
    if dy is None:
        return None, *rest
    (saved,) = ctx.saved_tensors
    argmax = saved if ctx.has_argmax else pooled(saved.detach(), *ctx.pool, True)[1]
    return pooled_backward(dy, argmax, ctx.size, ctx.channels_last, *ctx.pool), *rest


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, argmax, _, _, *ctx.pool = inputs
    ctx.save_for_backward(argmax)


def _backward_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    (argmax,) = ctx.saved_tensors
    pool = PoolParams(*ctx.pool)
    flat = reference.flat_indices(argmax, ddx.shape[-1], pool).reshape(*argmax.shape[:2], -1)
    return ddx.reshape(*ddx.shape[:2], -1).gather(-1, flat).view(argmax.shape), *(None,) * 8


def _vmap(info: Any, in_dims: Any, x: Tensor, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
    y, argmax = torch.ops.fastcnn.max_pool2d(fold_batch(x, in_dims[0], info.batch_size), *args)
    y = unfold_batch(y, info.batch_size)
    return (y, unfold_batch(argmax, info.batch_size) if args[-1] else argmax), (0, 0 if args[-1] else None)


def _backward_vmap(info: Any, in_dims: Any, dy: Tensor, argmax: Tensor, *args: Any) -> tuple[Tensor, int]:
    dy, argmax = (fold_batch(t, dim, info.batch_size) for t, dim in zip((dy, argmax), in_dims, strict=False))
    return unfold_batch(torch.ops.fastcnn.max_pool2d_backward(dy, argmax, *args), info.batch_size), 0


_POOL = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"
pooled_backward = define(
    f"max_pool2d_backward(Tensor grad, Tensor argmax, SymInt[] input_size, bool channels_last, {_POOL}) -> Tensor",
    implementations={
        "reference": _backward_reference,
        "cpu": partial(_backward_compiled, "fastcnn_cpu"),
        "triton": triton_backward,
        "cuda": partial(_backward_compiled, "fastcnn_cuda"),
    },
    fake=_backward_fake,
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    vmap=_backward_vmap,
)
pooled = define(
    f"max_pool2d(Tensor input, {_POOL}, bool with_argmax) -> (Tensor, Tensor)",
    implementations={
        "reference": _reference,
        "cpu": partial(_compiled, "fastcnn_cpu"),
        "triton": triton,
        "cuda": partial(_compiled, "fastcnn_cuda"),
    },
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
)
