"""Outputs are compared with the reference in float64 before any time is taken."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .cases import LRN, POOL, Case
from .inputs import CHECKED_IMAGES
from .providers import build_call, torch_op


class Mismatch(Exception):
    """The outputs of a provider are not those of the reference."""


def expected_outputs(case: Case, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """What a call returns, by the reference in float64: for the first images, by a convolution for all."""
    if case.op == "conv2d_relu":
        return build_call(torch_op(case), case, x.double(), dy.double())()
    x = x[:CHECKED_IMAGES].detach().double().requires_grad_(case.mode != "forward")
    if case.op == "lrn":
        y = reference.local_response_norm(x, LRN.size, LRN.alpha, LRN.beta, LRN.k)
    elif case.op == "max_pool2d":
        y = reference.max_pool2d(x, *POOL.op_args())
    else:
        y = reference.relu_lrn_max_pool2d(x, lrn=LRN, pool=POOL)
    if case.mode == "forward":
        return (y,)
    dx = torch.autograd.grad(y, x, dy[:CHECKED_IMAGES].double())
    return dx if case.mode == "backward" else (y.detach(), *dx)


def tolerances(case: Case, x: Tensor, dy: Tensor, expected: Sequence[Tensor]) -> list[float]:
    """The error ``||out - ref|| / ||ref||`` that is allowed of each output where ``x`` is given as it is here.

    That is 1e-6 for a forward and 5e-6 for a gradient in fp32; in 16 bits 1.5 times the reference's rounding error; and
    for a convolution twice the error of torch's in the same dtype (or of rounding, should torch have been lucky). What
    needs no rounding in 16 bits, as the maxima of a pool, must be exact.
    """
    rounding = [_error(truth.to(x.dtype), truth) for truth in expected]
    if case.op == "conv2d_relu":
        torchs = build_call(torch_op(case), case, x, dy)()
        errors = [_error(output, truth) for output, truth in zip(torchs, expected, strict=True)]
        return [2 * max(pair) for pair in zip(errors, rounding, strict=True)]
    if x.dtype != torch.float32:
        return [1.5 * error for error in rounding]
    return {"forward": [1e-6], "backward": [5e-6], "forward+backward": [1e-6, 5e-6]}[case.mode]


def check(outputs: Sequence[Tensor], expected: Sequence[Tensor], allowed: Sequence[float]) -> tuple[float, float]:
    """The largest error of the outputs, as far as there is an expectation of their images, and what is allowed.

    Raises:
        Mismatch: an output is wrong.
    """
    worst = (0.0, 1.0)
    for output, truth, tolerance in zip(outputs, expected, allowed, strict=True):
        if output.shape[1:] != truth.shape[1:]:
            raise Mismatch(f"shape {tuple(output.shape)} instead of {(len(output), *truth.shape[1:])}")
        error = _error(output[: len(truth)], truth)
        if not error <= tolerance:  # NaN included
            raise Mismatch(f"error {error:.1e}, allowed is {tolerance:.1e}")
        worst = max(worst, (error, tolerance), key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0)
    return worst


def _error(output: Tensor, truth: Tensor) -> float:
    return float((output.double() - truth).norm() / truth.norm())
