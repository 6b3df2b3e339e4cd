"""A graph read from a file matched with a model, step by step in their order."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ..params import LRNParams
from .steps import Step, set_ceil_mode, set_lrn, steps_of


@dataclass
class Match:
    """What of a graph belongs where in a model.

    Attributes:
        state: the graph's tensors by the model's keys.
        lrn: the parameters of the graph's LRNs.
        mismatches: what does not fit, a line each.
        changes: what else has to change so that the model computes what the graph does, a line each;
            :meth:`change_model` does it.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    lrn: list[LRNParams] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    _calls: list[Callable[[], object]] = field(default_factory=list)

    def change_model(self) -> None:
        for call in self._calls:
            call()

    def _change(self, line: str, call: Callable[[], object]) -> None:
        self.changes.append(line)
        self._calls.append(call)


def match(model: nn.Module, steps: list[Step]) -> Match:
    """Match the steps of a graph with those of a model; nothing of the model is changed yet.

    Kinds, which tensors there are, groups, and windows must agree; the tensors' shapes are the caller's to compare.
    """
    found = Match()
    size = getattr(model, "input_size", None)
    for theirs, own in zip_longest(steps, steps_of(model)):
        if theirs is None or own is None or theirs.kind != own.kind:
            found.mismatches.append(f"{_described(theirs)} in the file, {_described(own)} in the model")
            size = None
            continue
        found.mismatches += _differences(theirs, own)
        _match_tensors(found, theirs, own)
        if theirs.lrn is not None:
            found.lrn.append(theirs.lrn)
            if theirs.lrn != own.lrn:
                line = f"LRN of {own.name}: {own.lrn} became {theirs.lrn}"
                found._change(line, partial(set_lrn, model.get_submodule(own.name), theirs.lrn))
        if isinstance(size, int) and theirs.window is not None:
            size = _match_map(found, model, theirs, own, size)
    if hasattr(model, "fastcnn_report") and found._calls:  # its graphs have settings as constants
        found.mismatches += [f"{line}: not after optimize(), load the weights before" for line in found.changes]
    return found


def _described(step: Step | None) -> str:
    return "nothing" if step is None else f"{step.kind} {step.name}"


def _differences(theirs: Step, own: Step) -> list[str]:
    """What must agree besides shapes, of two steps of a kind."""
    pairs: list[tuple[str, Any, Any]] = [("groups", theirs.groups, own.groups)]
    if theirs.window is not None and own.window is not None:
        names = ("kernel", "stride", "padding", "dilation")
        pairs += [(name, getattr(theirs.window, name), getattr(own.window, name)) for name in names]
    lines = [f"{own.name}: {name} is {a} in the file and {b} in the model" for name, a, b in pairs if a != b]
    missing = [key for key in own.tensors if key not in theirs.tensors and not _may_be_zero(own, key)]
    lines += [f"{own.name}.{key} is missing in the file" for key in missing]
    return lines + [f"{own.name} of the model has no {key}" for key in theirs.tensors if key not in own.tensors]


def _may_be_zero(step: Step, key: str) -> bool:
    """Exporters leave out biases that are all 0."""
    return key == "bias" and step.kind in ("convolution", "fully connected")


def _match_tensors(found: Match, theirs: Step, own: Step) -> None:
    factor = theirs.input_scale / own.input_scale
    for name, tensor in theirs.tensors.items():
        key = f"{own.name}.{name}".lstrip(".")
        found.state[key] = tensor
        if name == "weight" and factor != 1:
            found.state[key] = tensor * factor
            found.changes.append(f"{key} is {factor:g} times the file's: the model scales its input by {1 / factor:g}")
    for name, tensor in own.tensors.items():
        if name not in theirs.tensors and _may_be_zero(own, name):
            found.state[f"{own.name}.{name}".lstrip(".")] = torch.zeros_like(tensor)
            found.changes.append(f"{own.name} has a {name} of 0, for the file has none")


def _match_map(found: Match, model: nn.Module, theirs: Step, own: Step, size: int) -> int | None:
    """See to it that the model's map has the size of the file's behind this step; None if that cannot be."""
    assert theirs.window is not None
    assert own.window is not None
    wanted = theirs.window.map_size(size)
    if own.window.map_size(size) == wanted:
        return wanted
    layer = model.get_submodule(own.name)
    ceil_mode = not own.window.ceil_mode
    missing = theirs.window.padding_end[0] - own.window.padding_end[0] + own.pad_end
    if own.kind == "max-pool" and own.window.rounding(ceil_mode).map_size(size) == wanted:
        line = f"{own.name} pools with ceil_mode={ceil_mode}, as the file for images of this size"
        found._change(line, partial(set_ceil_mode, layer, ceil_mode))
    elif own.pad and missing >= 0:
        line = f"{own.pad} adds {missing} zeros behind, as the file"
        found._change(line, partial(setattr, model.get_submodule(own.pad), "padding", (0, missing, 0, missing)))
    else:
        found.mismatches.append(f"the map behind {own.name} is {wanted}x{wanted} in the file, from {size}x{size}")
        return None
    return wanted
