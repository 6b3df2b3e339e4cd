"""Launchers of the LRN kernels."""

from typing import Any

import torch
from torch import Tensor

from ...memory_format import dense, is_channels_last, output_format
from ...params import LRNParams, check_same, opmath
from ..outputs import empty_output
from .launch import acc_dtype, cdiv, index_dtype, kernels, launch, vector

# Lanes of a program, warps that they are spread over, and about how many channels a lane owns.
# The first is for channels_last, the second for NCHW; the others are what a GPU test checks too.
FORWARD_CONFIGS = [(256, 4, 8), (128, 4, 24), (128, 4, 16), (256, 8, 8)]
BACKWARD_CONFIGS = [(128, 4, 8), (128, 4, 16), (128, 4, 24), (256, 8, 8)]

# The longest window that a program keeps in registers.
LONGEST_NEAR = 16


def window_of(lrn: LRNParams, channels: int) -> dict[str, Any]:
    """The parameters of the normalization as the kernels take them; ``channels`` of the input, not 0."""
    channels //= lrn.groups
    quarters = int(max(-32, min(32, 4 * lrn.beta)))
    return {
        "CHANNELS": channels,
        "BEFORE": min(lrn.size // 2, channels - 1),
        "AFTER": min((lrn.size - 1) // 2, channels - 1),
        "SCALE": lrn.alpha / lrn.size,
        "K": lrn.k,
        "QUARTERS": quarters,
        "REST": lrn.beta - quarters / 4,
    }


def is_near(window: dict[str, Any]) -> bool:
    """Whether this window of :func:`window_of` fits into registers."""
    return window["BEFORE"] + 1 + window["AFTER"] <= LONGEST_NEAR


def share(x: Tensor, channels: int, most: int) -> tuple[int, int]:
    """How many of so many channels a lane owns, at most about ``most``, and how many of them it loads at once.

    Where they are vectors, all lanes own as many.
    """
    if not is_channels_last(x):
        return cdiv(channels, cdiv(channels, most)), 1
    width = vector(channels, x)
    vectors = max(n for n in range(1, max(1, most // width) + 1) if channels // width % n == 0)
    return vectors * width, width


def _run(x: Tensor, window: dict[str, Any], config: tuple[int, int, int], kernel: Any, *args: Any) -> None:
    """Launch one of the near kernels."""
    block, num_warps, most = config
    channels, channels_last = window["CHANNELS"], is_channels_last(x)
    v, width = share(x, channels, most)
    pixels = x.numel() // x.shape[1]
    parts = x.shape[1] // channels * cdiv(channels, v)
    launch(
        kernel,
        cdiv(pixels * parts, block) if channels_last else cdiv(pixels, block) * parts,
        *args,
        pixels,
        pixels // x.shape[0],
        C=x.shape[1],
        CHANNELS_LAST=channels_last,
        V=v,
        VECTOR=width,
        BLOCK=block,
        INDEX=index_dtype(pixels * parts if channels_last else pixels * parts // min(parts, block)),
        ACC=acc_dtype(x.dtype),
        num_warps=num_warps,
        **window,
    )


def _run_far(x: Tensor, window: dict[str, Any], kernel: Any, *args: Any, **constants: Any) -> None:
    stride = 1 if is_channels_last(x) else x[0, 0].numel()
    before, after = window["BEFORE"], window["AFTER"]
    constants |= {name: window[name] for name in ("CHANNELS", "SCALE", "K", "QUARTERS", "REST")}
    launch(
        kernel,
        cdiv(x.numel(), 256),
        *(*args, x.numel(), stride, before, after),
        BLOCK=256,
        ACC=acc_dtype(x.dtype),
        num_warps=4,
        **constants,
    )


def forward(x: Tensor, lrn: LRNParams, *, config: tuple[int, int, int] | None = None) -> Tensor:
    x, y = dense(x, output_format(x)), empty_output(x)
    if x.numel() == 0:
        return y
    window = window_of(lrn, x.shape[1])
    if is_near(window):
        _run(x, window, config or FORWARD_CONFIGS[not is_channels_last(x)], kernels("lrn").forward, x, y)
    else:
        _run_far(x, window, kernels("lrn").forward_far, x, x, y, GRADIENT=False)
    return y


def backward(dy: Tensor, x: Tensor, lrn: LRNParams, *, config: tuple[int, int, int] | None = None) -> Tensor:
    check_same("lrn_backward", "grad", dy, x)
    dy, x, dx = dense(dy, output_format(x)), dense(x, output_format(x)), empty_output(x)
    if x.numel() == 0:
        return dx
    window = window_of(lrn, x.shape[1])
    if is_near(window):
        _run(x, window, config or BACKWARD_CONFIGS[not is_channels_last(x)], kernels("lrn").backward, dy, x, dx)
    else:
        terms = torch.empty_like(x, dtype=opmath(x.dtype))
        _run_far(x, window, kernels("lrn").forward_far, x, dy, terms, GRADIENT=True)
        _run_far(x, window, kernels("lrn").backward_far, dy, x, terms, dx)
    return dx
