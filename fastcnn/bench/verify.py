"""Outputs are compared with the reference in float64 before any time is taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .cases import LRN, POOL, Case
from .inputs import CHECKED_IMAGES


class Mismatch(Exception):
    """The outputs of a provider are not those of the reference."""


def expected_outputs(case: Case, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """What a call returns for the first images, by the reference in float64."""
    x = x[:CHECKED_IMAGES].detach().double().requires_grad_(case.mode != "forward")
    if case.op == "lrn":
        y = reference.local_response_norm(x, LRN.size, LRN.alpha, LRN.beta, LRN.k)
    else:
        y = reference.relu_lrn_max_pool2d(x, lrn=LRN, pool=POOL)
    if case.mode == "forward":
        return (y,)
    dx = torch.autograd.grad(y, x, dy[:CHECKED_IMAGES].double())
    return dx if case.mode == "backward" else (y.detach(), *dx)


def check(outputs: Sequence[Tensor], expected: Sequence[Tensor], mode: str) -> tuple[float, float]:
    """The largest error ``||out - ref|| / ||ref||`` of the outputs' first images, and what is allowed.

    Allowed are 1e-6 for a forward and 5e-6 for a gradient in fp32; in 16 bits 1.5 times the reference's rounding error.

    Raises:
        Mismatch: an output is wrong.
    """
    worst = (0.0, 1.0)
    for i, (output, truth) in enumerate(zip(outputs, expected, strict=True)):
        if output.shape[1:] != truth.shape[1:]:
            raise Mismatch(f"shape {tuple(output.shape)} instead of {(len(output), *truth.shape[1:])}")
        norm = truth.norm()
        if output.dtype == torch.float32:
            tolerance = 1e-6 if mode == "forward" or (mode == "forward+backward" and i == 0) else 5e-6
        else:
            tolerance = 1.5 * float((truth.to(output.dtype).double() - truth).norm() / norm)
        error = float((output[:CHECKED_IMAGES].double() - truth).norm() / norm)
        if not error <= tolerance:  # NaN included
            raise Mismatch(f"error {error:.1e}, allowed is {tolerance:.1e}")
        worst = max(worst, (error, tolerance), key=lambda pair: pair[0] / pair[1])
    return worst
