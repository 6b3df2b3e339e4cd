"""What the engine asks of a case: a provider's calls, a check of what they return, and how much work they are."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .cases import Case

Call = Callable[[], tuple[Tensor, ...]]


class Mismatch(Exception):
    """The outputs of a provider are not those of the reference."""


class NotInstalled(Exception):
    """A runtime that is not here."""


def reason(error: Exception) -> str:
    """Why, in one line."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, Mismatch | NotInstalled) else f"{type(error).__name__}: {text[:120]}"


@dataclass
class Phases:
    """Seconds of the parts of a training step, a list of each, filled in as it runs."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    def clear(self) -> None:
        for phase in (self.forward, self.backward, self.update):
            phase.clear()


@dataclass(frozen=True)
class Entry:
    """A provider, ready to run a case.

    Args:
        check: runs once, and returns what :meth:`Workload.check` compares.
        call: runs once as it is timed.
        forward: the forward whose memory for backward is counted; None without a backward.
        parameters: what is there anyway, and not counted.
        phases: of the calls, where they have any.
        allowed: the error of someone who rounds more than others; None for what the workload allows.
    """

    check: Call
    call: Call
    forward: Call | None = None
    parameters: Iterable[Tensor] = ()
    phases: Phases | None = None
    allowed: float | None = None


@dataclass(frozen=True)
class Yardstick:
    """A call of PyTorch's that stands for the machine's rate, and the bytes or operations of it."""

    call: Call
    amount: int


def copy_of(x: Tensor) -> Yardstick:
    """In bytes read and written."""
    target = torch.zeros_like(x)
    return Yardstick(lambda: (target.copy_(x),), 2 * x.nbytes)


def matmul(size: int, dtype: torch.dtype, device: str) -> Yardstick:
    """A product of square matrices."""
    a, b = torch.randn(2, size, size).to(device, dtype)
    product = torch.mm(a, b)
    return Yardstick(lambda: (torch.mm(a, b, out=product),), 2 * size**3)


class Workload(Protocol):
    """A case with its inputs. ``dtype`` is the case's, or "fp32" for a provider that also runs a 16-bit case in it."""

    case: Case
    flop: int | None
    measures_memory: bool  # whether a provider's resident and peak memory are of interest

    def bytes_moved(self, dtype: str) -> int | None:
        """What must be read and written at the least; None where that says nothing about the speed."""

    def prepare(self, provider: Any, dtype: str) -> Entry:
        """A provider's calls; what it raises is shown as its failure."""

    def check(self, outputs: Sequence[Tensor], dtype: str, allowed: float | None = None) -> tuple[float, float]:
        """The largest error against what is allowed of it, and that; Mismatch where an output is wrong."""

    def yardsticks(self) -> dict[str, Yardstick]:
        """By name, "copy" or "matmul": what is timed in the same rounds."""


def worst(compared: Iterable[tuple[str, float, float]]) -> tuple[float, float]:
    """Of (what, its error, what is allowed), the error closest to what is allowed, and that.

    Raises:
        Mismatch: an error is larger, or NaN.
    """
    closest = (0.0, 1.0)
    for what, error, allowed in compared:
        if not error <= allowed:
            raise Mismatch(f"{what}error {error:.1e}, allowed is {allowed:.1e}")
        closest = max(closest, (error, allowed), key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0)
    return closest
