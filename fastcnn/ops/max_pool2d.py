"""Max pooling with a 1-byte argmax; backward adds up in one fixed order and without atomics."""

from typing import Any

from torch import Tensor

from .. import reference
from ..memory_format import is_channels_last
from ..params import IntOrPair, PoolParams, check_input
from . import outputs
from .aten import max_pool2d as aten
from .cpu import max_pool2d as cpu
from .cuda import max_pool2d as cuda
from .overridable import overridable
from .register import define, needs_grad
from .triton import max_pool2d as triton


@overridable("input", composite=reference.max_pool2d)
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
    y, argmax = pool_op(batched, pool, return_indices or needs_grad(input))
    y = y if input.dim() == 4 else y.squeeze(0)
    if not return_indices:
        return y
    indices = reference.flat_indices(argmax, input.shape[-1], pool)
    return y, indices if input.dim() == 4 else indices.squeeze(0)


def _setup_context(ctx: Any, inputs: tuple[Tensor, PoolParams, bool], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.pool, ctx.has_argmax = inputs
    ctx.size, ctx.channels_last = list(x.shape[2:]), is_channels_last(x)
    # Exported where no gradient was asked for, there is no argmax: then the input is saved, to find it when needed.
    ctx.save_for_backward(output[1] if ctx.has_argmax else x)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None]:
    if dy is None:
        return (None,)
    (saved,) = ctx.saved_tensors
    argmax = saved if ctx.has_argmax else pool_op(saved.detach(), ctx.pool, True)[1]
    return (pool_backward_op(dy, argmax, ctx.size, ctx.channels_last, ctx.pool),)


def _backward_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, argmax, _, _, ctx.pool = inputs
    ctx.save_for_backward(argmax)


def _backward_backward(ctx: Any, ddx: Tensor) -> tuple[Tensor]:
    (argmax,) = ctx.saved_tensors
    flat = reference.flat_indices(argmax, ddx.shape[-1], ctx.pool).reshape(*argmax.shape[:2], -1)
    return (ddx.reshape(*ddx.shape[:2], -1).gather(-1, flat).view(argmax.shape),)


BACKENDS = {"reference": aten, "cpu": cpu, "triton": triton, "cuda": cuda}

pool_backward_op = define(
    "max_pool2d_backward(Tensor grad, Tensor argmax, SymInt[] input_size, bool channels_last, {params}) -> Tensor",
    PoolParams,
    implementations={name: backend.backward for name, backend in BACKENDS.items()},
    fake=lambda dy, argmax, size, channels_last, pool: outputs.unpooled(dy, size, channels_last),
    setup_context=_backward_setup_context,
    backward=_backward_backward,
    vmap=2,
)
pool_op = define(
    "max_pool2d(Tensor input, {params}, bool with_argmax) -> (Tensor, Tensor)",
    PoolParams,
    implementations={name: backend.forward for name, backend in BACKENDS.items()},
    fake=outputs.pooled,
    setup_context=_setup_context,
    backward=_backward,
    vmap=1,
)
