"""Frozen weights, packed: in the blocked format in which oneDNN computes, so that no call has to reorder them again.

A cache beside the weights, not in them: ``state_dict``, deepcopy and pickling know nothing of it, and an entry goes
when its weight goes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..memory_format import is_channels_last


@dataclass
class Frozen:
    """What was made of a weight with these contents."""

    contents: tuple[object, ...]
    made: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returned the first time."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]


_frozen = WeakTensorKeyDictionary()
_unchanged = WeakTensorKeyDictionary()


def contents_of(weight: Tensor) -> Frozen | None:
    """The entry of a weight that asks for no gradient, a new one where its contents changed; None of any other.

    Weights may be written through ``.data``, which no version counter sees, so the contents themselves are compared:
    one read, next to nothing beside a convolution.
    """
    memory = weight.detach().permute(0, 2, 3, 1) if is_channels_last(weight) else weight.detach()
    if weight.requires_grad or not memory.is_contiguous():
        return None
    contents = torch.ops.fastcnn_cpu.fingerprint(memory), weight.dtype, weight.shape, weight.stride()
    known = _frozen.get(weight)
    if known is None or known.contents != contents:
        known = _frozen[weight] = Frozen(contents)
    return known


def unchanged(weight: Tensor) -> Frozen:
    """The entry of a weight that is written only where torch can see it: not through ``.data``. Costs no read.

    Of tensors made under inference_mode torch sees nothing: a new entry each time.
    """
    if weight.is_inference():
        return Frozen(())
    contents = weight._version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride()
    known = _unchanged.get(weight)
    if known is None or known.contents != contents:
        known = _unchanged[weight] = Frozen(contents)
    return known


_generation = 0


def generation() -> int:
    """A number that changes when entries are forgotten."""
    return _generation


def forget(weight: Tensor) -> None:
    """Make the entries of a weight anew when they are needed next."""
    global _generation
    _generation += 1
    for entries in (_frozen, _unchanged):
        entries.pop(weight, None)
