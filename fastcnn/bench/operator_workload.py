"""An operator's calls, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import backends
from .augmentations import pictures
from .cases import DTYPES, FORMATS, Case
from .inputs import features, seeded
from .operators import OPERATORS
from .workload import Call, Entry, Mismatch, Yardstick, copy_of, matmul, worst

if TYPE_CHECKING:
    from .providers import OperatorProvider

Function = Callable[..., Tensor]  # of the input and, where there are any, the parameters

CHECKED_IMAGES = 4  # LRN and pooling act on each image alone, so the first few stand for the batch
_MATMUL = 8192  # height and width of the matrices whose product stands for a GPU's rate


class OperatorWorkload:
    """An operator in one case.

    ``dy``, the gradient of the output, is zero where the operator's record says that the input's would be in doubt:
    no comparison of gradients could be exact there.
    """

    measures_memory = False

    def __init__(self, case: Case, source: str = "random", device: str = "cpu") -> None:
        self.case, self.device = case, device
        self.operator = OPERATORS[case.op]
        self.flop = self.operator.flop(case)
        is_whole = self.operator.weight_shape or self.operator.of_the_batch
        self.checked = case.shape[0] if is_whole else CHECKED_IMAGES
        dtype, format = DTYPES[case.dtype], FORMATS[case.format]
        if self.operator.takes_pictures:
            self.x = pictures(case.shape, source, device)
        else:
            self.x = features(case.shape, source, device).to(dtype, memory_format=format, copy=True)
        dy = torch.randn(self.operator.output_shape(case), generator=seeded(1, device), device=device)
        if self.operator.decided is not None and case.mode != "forward":
            dy[: self.checked] *= self.operator.decided(case, self.x[: self.checked])
        self.dy = dy.to(dtype).contiguous(memory_format=format)
        self.allowed = cache(self._allowed)

    def function(self, call: Function, dtype: torch.dtype) -> Function:
        """``ours``, ``torch`` or ``reference`` of the record with the case's arguments, for results of this dtype."""
        arguments = self.operator.arguments(self.case, dtype)
        return lambda *tensors: call(*tensors, *arguments)

    def bytes_moved(self, dtype: str) -> int | None:
        return self.operator.bytes_moved(self.case, DTYPES[dtype].itemsize)

    def yardsticks(self) -> dict[str, Yardstick]:
        copied = self.x
        if self.operator.takes_pictures:  # which are smaller than what is made of them
            copied = self.x.new_ones((self.bytes_moved(self.case.dtype) or 0) // 2)
        found = {"copy": copy_of(copied)}
        if self.flop and self.device != "cpu":
            found["matmul"] = matmul(_MATMUL, self.x.dtype, self.device)
        return found

    # -- calls --------------------------------------------------------------------------------------------------------

    def prepare(self, provider: OperatorProvider, dtype: str) -> Entry:
        function = provider.function(self, DTYPES[dtype])
        x, dy = self._as(self.x, DTYPES[dtype]), self.dy.to(DTYPES[dtype])
        parameters = tuple(p.requires_grad_() for p in self.operator.parameters(self.case, x))

        def forced(call: Call) -> Call:
            def run() -> tuple[Tensor, ...]:
                with backends.use(provider.backend):
                    return call()

            return run

        with backends.use(provider.backend):
            mapped = self.case.memory == "mapped"
            call = forced(self._mapped(x, dy) if mapped else self._call(function, x, dy, parameters))
        if self.case.mode == "forward":
            peer = self.operator.peers.get(provider.name)
            first = 1 if peer and peer.only_the_first else None
            return Entry(lambda: tuple(y[:first] for y in call()), call, allowed=peer.allowed if peer else None)
        leaf = x.detach().requires_grad_()
        return Entry(call, call, forced(lambda: (function(leaf, *parameters),)), parameters)

    def _as(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Pictures stay bytes; the result is what has the dtype."""
        return x if self.operator.takes_pictures else x.to(dtype)

    def _call(self, function: Function, x: Tensor, dy: Tensor, parameters: Sequence[Tensor]) -> Call:
        """Runs the case once, and returns output, gradients or both."""
        mode = self.case.mode
        if mode == "forward":

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (function(x, *parameters),)

            return forward

        leaves = [x.detach().requires_grad_(), *parameters]
        if mode == "backward":
            # inductor would otherwise reuse saved tensors as scratch memory, and refuse to run the same graph twice
            with torch._functorch.config.patch(donated_buffer=False):
                output = function(*leaves)
            return lambda: torch.autograd.grad(output, leaves, dy, retain_graph=True)

        def forward_backward() -> tuple[Tensor, ...]:
            y = function(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, dy)

        return forward_backward

    def _mapped(self, x: Tensor, dy: Tensor) -> Call:
        out = torch.zeros_like(x if self.case.mode == "backward" else dy)
        kernel, channels_last = self.operator.into[self.case.mode], self.case.format == "channels_last"

        def call() -> tuple[Tensor, ...]:
            kernel(x, dy, out, channels_last)
            return (out,)

        return call

    # -- check --------------------------------------------------------------------------------------------------------

    def check(self, outputs: Sequence[Tensor], dtype: str, allowed: float | None = None) -> tuple[float, float]:
        """The error is ``||out - ref|| / ||ref||``, against the reference in float64.

        Allowed is 1e-6 of a forward and 5e-6 of a gradient in fp32; in 16 bits 1.5 times the reference's rounding
        error; and of a convolution twice the error of torch's in the same dtype (or of rounding, should torch have been
        lucky). What needs no rounding in 16 bits, as the maxima of a pool, must be exact.
        """
        for output, truth in zip(outputs, self.expected, strict=True):
            if output.shape[1:] != truth.shape[1:]:
                raise Mismatch(f"shape {tuple(output.shape)} instead of {(len(output), *truth.shape[1:])}")
        pairs = zip(outputs, self.expected, strict=True)
        errors = [_error(out[: len(truth)], truth[: len(out)]) for out, truth in pairs]
        bounds = self.allowed(dtype) if allowed is None else [allowed] * len(errors)
        return worst([("", *pair) for pair in zip(errors, bounds, strict=True)])

    @cached_property
    def expected(self) -> tuple[Tensor, ...]:
        """What a call returns, in float64: for the first images, with weights for all."""
        x, dy = self._as(self.x[: self.checked], torch.float64), self.dy[: self.checked].double()
        return self._once(self.operator.reference, x, dy)

    def _once(self, call: Function, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        parameters = [p.requires_grad_() for p in self.operator.parameters(self.case, x)]
        return self._call(self.function(call, dy.dtype), x, dy, parameters)()

    def _allowed(self, dtype: str) -> list[float]:
        rounding = [_error(truth.to(DTYPES[dtype]), truth) for truth in self.expected]
        if self.operator.weight_shape is not None:
            torchs = self._once(self.operator.torch, self.x.to(DTYPES[dtype]), self.dy.to(DTYPES[dtype]))
            errors = [_error(output, truth) for output, truth in zip(torchs, self.expected, strict=True)]
            return [2 * max(pair) for pair in zip(errors, rounding, strict=True)]
        if dtype != "fp32":
            return [1.5 * error for error in rounding]
        return {"forward": [1e-6], "backward": [5e-6], "forward+backward": [1e-6, 5e-6]}[self.case.mode]


def _error(output: Tensor, truth: Tensor) -> float:
    return float((output.double() - truth).norm() / truth.norm())
