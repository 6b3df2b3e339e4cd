"""A network's outputs are compared with those of the plain network in float64 before any time is taken."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from .cases import Case
from .network_providers import CHECKED, checked_loss, gradients
from .verify import Mismatch

LOGITS = {"fp32": 1e-5, "bf16": 5e-2}  # difference relative to the logits minus their mean
LOSS = {"fp32": 1e-5, "bf16": 1e-2}
# Where rounding decides which of two values is the maximum, or on which side of zero one lies, the gradient goes
# another way; one such place among the 9216 of AlexNet's last map moves it by about 1/100. In bf16 they were seen to
# add up to a fifth in AlexNet's first layer.
GRADIENT = {"fp32": 5e-2, "bf16": 0.4}


def expected_of_network(case: Case, plain: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Of the first images: logits; or loss and every parameter's gradient; or each image's loss, and its gradient."""
    network, x = deepcopy(plain).double(), x[:CHECKED].double()
    if case.mode == "inference":
        with torch.no_grad():
            return (network(x),)
    if case.mode == "input gradient":
        losses = network(x.requires_grad_())
        return losses.detach(), *torch.autograd.grad(losses.sum(), x)
    loss = checked_loss(network(x), labels)
    loss.backward()
    return loss.detach(), *gradients(network)


def check_network(case: Case, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """The largest error against what is allowed of it, and that.

    In 16 bits the five likeliest classes are not compared, as near ones may change places.

    Raises:
        Mismatch: an output is wrong.
    """
    if case.mode == "inference":
        logits, truth = outputs[0][:CHECKED].double(), expected[0]
        pairs = [("logits", _difference(logits, truth, truth - truth.mean(1, keepdim=True)), LOGITS[case.dtype])]
    else:
        checked = [o[:CHECKED] if case.mode == "input gradient" else o for o in outputs]
        pairs = [("loss", _difference(checked[0], expected[0], expected[0]), LOSS[case.dtype])]
        for gradient, truth in zip(checked[1:], expected[1:], strict=True):
            pairs.append(("gradient", _difference(gradient, truth, truth), GRADIENT[case.dtype]))
    for what, error, tolerance in pairs:
        if not error <= tolerance:  # NaN included
            raise Mismatch(f"{what}: error {error:.1e}, allowed is {tolerance:.0e}")
    if case.mode == "inference" and case.dtype == "fp32":
        ours, theirs = (logits[:CHECKED].topk(min(5, logits.shape[1])).indices for logits in (outputs[0], expected[0]))
        if not torch.equal(ours, theirs):
            raise Mismatch("the five likeliest classes differ")
    _, error, tolerance = max(pairs, key=lambda pair: pair[1] / pair[2])
    return error, tolerance


def _difference(output: Tensor, truth: Tensor, scale: Tensor) -> float:
    if output.shape != truth.shape:
        raise Mismatch(f"shape {tuple(output.shape)} instead of {tuple(truth.shape)}")
    return float((output.double() - truth).norm() / scale.norm())
