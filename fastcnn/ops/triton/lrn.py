"""Launchers of the LRN kernels."""

from typing import Any

import torch
from torch import Tensor

from ...memory_format import dense, is_channels_last, output_format
from ...params import LRNParams, check_same, opmath
from ..outputs import empty_output
from .launch import cdiv, kernels, launch, layout, vector
from .parameters import LRN

# Lanes of a program, warps that they are spread over, and about how many channels a lane owns.
# The first is for channels_last, the second for NCHW; the others are what a GPU test checks too.
FORWARD_CONFIGS = [(256, 4, 8), (128, 4, 24), (128, 4, 16), (256, 8, 8)]
BACKWARD_CONFIGS = [(128, 4, 8), (128, 4, 16), (128, 4, 24), (256, 8, 8)]

# The longest window that a program keeps in registers.
LONGEST_NEAR = 16


def parameters(lrn: LRNParams, channels: int) -> LRN:
    """Of the normalization, as the kernels take them; ``channels`` of a group, not 0."""
    quarters = int(max(-32, min(32, 4 * lrn.beta)))
    before, after = min(lrn.size // 2, channels - 1), min((lrn.size - 1) // 2, channels - 1)
    return LRN(before, after, lrn.alpha / lrn.size, lrn.k, quarters, lrn.beta - quarters / 4)


def is_near(lrn: LRN) -> bool:
    """Whether a window fits into registers."""
    return lrn.BEFORE + 1 + lrn.AFTER <= LONGEST_NEAR


def share(x: Tensor, channels: int, most: int) -> tuple[int, int]:
    """How many of so many channels a lane owns, at most about ``most``, and how many of them it loads at once.

    Where they are vectors, all lanes own as many.
    """
    if not is_channels_last(x):
        return cdiv(channels, cdiv(channels, most)), 1
    width = vector(channels, x)
    vectors = max(n for n in range(1, max(1, most // width) + 1) if channels // width % n == 0)
    return vectors * width, width


def _run(kernel: Any, x: Tensor, lrn: LRN, channels: int, config: tuple[int, int, int], *tensors: Tensor) -> None:
    """Launch one of the near kernels, whose windows fit into registers."""
    block, num_warps, most = config
    v, width = share(x, channels, most)
    pixels = x.numel() // x.shape[1]
    parts = x.shape[1] // channels * cdiv(channels, v)
    last = is_channels_last(x)
    launch(
        kernel,
        cdiv(pixels * parts, block) if last else cdiv(pixels, block) * parts,
        *tensors,
        pixels=pixels,
        S=pixels // x.shape[0],
        lrn=lrn,
        layout=layout(x, channels, (v, width), block, pixels * parts if last else pixels * parts // min(parts, block)),
        num_warps=num_warps,
    )


def _run_far(kernel: Any, x: Tensor, lrn: LRN, channels: int, *tensors: Tensor | None) -> None:
    launch(
        kernel,
        cdiv(x.numel(), 256),
        *tensors,
        elements=x.numel(),
        stride=1 if is_channels_last(x) else x[0, 0].numel(),
        lrn=lrn,
        layout=layout(x, channels, (1, 1), 256, x.numel()),
        num_warps=4,
    )


def forward(x: Tensor, lrn: LRNParams, *, config: tuple[int, int, int] | None = None) -> Tensor:
    x, y = dense(x, output_format(x)), empty_output(x)
    if x.numel() == 0:
        return y
    channels = x.shape[1] // lrn.groups
    window = parameters(lrn, channels)
    if is_near(window):
        config = config or FORWARD_CONFIGS[not is_channels_last(x)]
        _run(kernels("lrn").lrn_forward_kernel, x, window, channels, config, x, y)
    else:
        _run_far(kernels("lrn").lrn_forward_far_kernel, x, window, channels, x, None, y)
    return y


def backward(dy: Tensor, x: Tensor, lrn: LRNParams, *, config: tuple[int, int, int] | None = None) -> Tensor:
    check_same("lrn_backward", "grad", dy, x)
    dy, x, dx = dense(dy, output_format(x)), dense(x, output_format(x)), empty_output(x)
    if x.numel() == 0:
        return dx
    channels = x.shape[1] // lrn.groups
    window = parameters(lrn, channels)
    if is_near(window):
        config = config or BACKWARD_CONFIGS[not is_channels_last(x)]
        _run(kernels("lrn").lrn_backward_kernel, x, window, channels, config, dy, x, dx)
    else:
        terms = torch.empty_like(x, dtype=opmath(x.dtype))
        _run_far(kernels("lrn").lrn_forward_far_kernel, x, window, channels, x, dy, terms)
        _run_far(kernels("lrn").lrn_backward_far_kernel, x, window, channels, dy, x, terms, dx)
    return dx
