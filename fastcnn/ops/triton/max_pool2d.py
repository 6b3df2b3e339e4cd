"""Launchers of the max-pool kernels."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...memory_format import dense, format_of, is_channels_last, output_format
from ...params import PoolParams, check_same, pooled_size
from .. import outputs
from ..outputs import empty_output
from .launch import acc_dtype, cdiv, index_dtype, kernels, launch, vector

# Lanes of a program, warps that they are spread over, and most channels of a lane in NCHW. The first is for
# channels_last, the second for NCHW; the others are what a GPU test checks too.
FORWARD_CONFIGS = [(128, 4, 8), (128, 4, 4), (256, 4, 8), (256, 8, 8)]
BACKWARD_CONFIGS = [(128, 4, 8), (128, 4, 16), (64, 2, 8), (256, 8, 8)]


def pooling_of(pool: PoolParams) -> dict[str, int]:
    """The parameters of the pooling as the kernels take them."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), _ = pool.op_args()
    return {"KH": kh, "KW": kw, "SH": sh, "SW": sw, "PH": ph, "PW": pw, "DH": dh, "DW": dw}


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


def forward(
    x: Tensor, pool: PoolParams, with_argmax: bool, *, config: tuple[int, int, int] | None = None
) -> tuple[Tensor, Tensor]:
    y, argmax = outputs.pooled(x, pool, with_argmax)
    channels_last = is_channels_last(x)
    (h, w), (oh, ow), pooling = x.shape[2:], y.shape[2:], pooling_of(pool)
    _run(
        kernels("max_pool2d").forward,
        config or FORWARD_CONFIGS[not channels_last],
        x,
        oh * ow,
        *(dense(x, output_format(x)), y, argmax, x.shape[0], h, w, oh, ow),
        channels_last=channels_last,
        UNROLL=pooling["KH"] * pooling["KW"] <= 32,
        PADDED=not is_inside(pool, (h, w), (oh, ow)),
        WITH_ARGMAX=with_argmax,
        **({} if channels_last else {"maxnreg": 96}),  # left alone, ptxas uses fewer, and has fewer loads in flight
        **pooling,
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
    (h, w), (oh, ow), format = size, dy.shape[2:], format_of(channels_last)
    check_same("max_pool2d_backward", "argmax", argmax, empty_output(dy, dtype=outputs.argmax_dtype(pool)))
    expected = pooled_size(size, *pool.op_args())
    if [oh, ow] != expected:
        raise RuntimeError(f"max_pool2d_backward(): expected grad of size {expected}, got {[oh, ow]}")
    dx, pooling = outputs.unpooled(dy, size, channels_last), pooling_of(pool)
    near, module = is_near(pool), kernels("max_pool2d")
    blocks = cdiv(h + pooling["PH"], pooling["SH"]) * cdiv(w + pooling["PW"], pooling["SW"])
    _run(
        module.backward if near else module.backward_far,
        config or BACKWARD_CONFIGS[not channels_last],
        dx,
        blocks if near else h * w,
        *(dense(dy, format), dense(argmax, format), dx, dy.shape[0], h, w, oh, ow),
        channels_last=channels_last,
        **pooling,
    )
    return dx
