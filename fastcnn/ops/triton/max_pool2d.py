"""Launchers of the max-pool kernels."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...memory_format import dense, is_channels_last, output_format
from ...params import PoolParams, check_same, pooled_size
from .. import outputs
from ..outputs import empty_output
from .launch import cdiv, kernels, launch, layout, sizes, vector
from .parameters import Pool

# Lanes of a program, warps that they are spread over, and most channels of a lane in NCHW. The first is for
# channels_last, the second for NCHW; the others are what a GPU test checks too.
FORWARD_CONFIGS = [(128, 4, 8), (128, 4, 4), (256, 4, 8), (256, 8, 8)]
BACKWARD_CONFIGS = [(128, 4, 8), (128, 4, 16), (64, 2, 8), (256, 8, 8)]


def parameters(pool: PoolParams, padded: bool = False) -> Pool:
    """Of the pooling, as the kernels take them."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), _ = pool.op_args()
    return Pool(kh, kw, sh, sw, ph, pw, dh, dw, padded)


def is_near(pool: PoolParams) -> bool:
    """Whether a program can unroll the windows that hold an element, and the elements between two windows."""
    (kh, kw), (sh, sw), _, (dh, dw), _ = pool.op_args()
    reach = ((kh - 1) * dh // sh + 1) * ((kw - 1) * dw // sw + 1)
    return sh * sw <= 16 and reach <= 32 and kh * kw <= 32


def is_inside(pool: PoolParams, size: Sequence[int], out: Sequence[int]) -> bool:
    """Whether every window is inside of the map."""
    *axes, _ = pool.op_args()
    return all(
        p == 0 and (o - 1) * s + (k - 1) * d < length for k, s, p, d, length, o in zip(*axes, size, out, strict=True)
    )


def _run(
    kernel: Any, config: tuple[int, int, int], x: Tensor, items: int, *tensors: Tensor | None, **parameters: Any
) -> None:
    """Launch a kernel over ``items`` places in each map of ``x``, at which it reads vectors of the channels."""
    (block, num_warps, most), channels, last = config, x.shape[1], is_channels_last(x)
    v = vector(channels, x) if last else min(channels, most)
    lanes = x.shape[0] * cdiv(channels, v) * items
    launch(
        kernel,
        cdiv(lanes, block),
        *tensors,
        batch=x.shape[0],
        layout=layout(x, channels, (v, v if last else 1), block, lanes),
        num_warps=num_warps,
        **parameters,
    )


def forward(
    x: Tensor, pool: PoolParams, with_argmax: bool, *, config: tuple[int, int, int] | None = None
) -> tuple[Tensor, Tensor]:
    y, argmax = outputs.pooled(x, pool, with_argmax)
    x = dense(x, output_format(x))
    last = is_channels_last(x)
    _run(
        kernels("max_pool2d").max_pool2d_forward_kernel,
        config or FORWARD_CONFIGS[not last],
        x,
        y.shape[2] * y.shape[3],
        *(x, y, argmax if with_argmax else None),
        **sizes(x, y),
        pool=parameters(pool, padded=not is_inside(pool, x.shape[2:], y.shape[2:])),
        **({} if last else {"maxnreg": 96}),  # left alone, ptxas uses fewer, and has fewer loads in flight
    )
    return y, argmax


def backward(
    dy: Tensor,
    argmax: Tensor,
    size: list[int],
    channels_last: bool,
    pool: PoolParams,
    *,
    config: tuple[int, int, int] | None = None,
) -> Tensor:
    (h, w), out = size, list(dy.shape[2:])
    check_same("max_pool2d_backward", "argmax", argmax, empty_output(dy, dtype=outputs.argmax_dtype(pool)))
    expected = pooled_size(size, *pool.op_args())
    if out != expected:
        raise RuntimeError(f"max_pool2d_backward(): expected grad of size {expected}, got {out}")
    dx, window, near = outputs.unpooled(dy, size, channels_last), parameters(pool), is_near(pool)
    format, module = output_format(dx), kernels("max_pool2d")
    _run(
        module.max_pool2d_backward_kernel if near else module.max_pool2d_backward_far_kernel,
        config or BACKWARD_CONFIGS[not is_channels_last(dx)],
        dx,
        cdiv(h + window.PH, window.SH) * cdiv(w + window.PW, window.SW) if near else h * w,
        *(dense(dy, format), dense(argmax, format), dx),
        **sizes(dx, dy),
        pool=window,
    )
    return dx
