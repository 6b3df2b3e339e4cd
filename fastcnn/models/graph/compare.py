"""A file's graph beside a model's: the same operations in the same order, with the same settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ...params import LRNParams
from .node import Node, nodes_of

Pair = tuple[Node, Node]  # of the file and of the model

_WEIGHTED = ("Conv", "Gemm")


@dataclass(frozen=True)
class Difference:
    """A setting in which two nodes of the same kind differ."""

    theirs: Node
    own: Node
    setting: str

    def __str__(self) -> str:
        parts = (f"{name} is {a} in the file and {b} in the model" for name, a, b in self.parts())
        return f"{self.theirs}: {', '.join(parts)}, {self.own}"

    def parts(self) -> Iterator[tuple[str, Any, Any]]:
        """The name of each value that differs, its value in the file, and that in the model."""
        a, b = (node.settings[self.setting] for node in (self.theirs, self.own))
        if not is_dataclass(a):
            yield self.setting, a, b
            return
        for part in fields(a):
            values = getattr(a, part.name), getattr(b, part.name)
            if values[0] != values[1]:
                yield {"begin": "padding at the start", "end": "padding at the end"}.get(part.name, part.name), *values


@dataclass
class Comparison:
    """What of a file belongs where in a model.

    Attributes:
        state: the file's tensors by the model's keys.
        pairs: nodes of the file and the model that are the same operation, in the order of the file.
        factors: by pair, how many times larger the weights have to be than the file's, as the model scales their input.
        mismatches: what no setting could resolve, one per line.
        differences: the settings in which the pairs differ.
        constants: keys of tensors whose shape does not matter, but the number of their values.
        zero: layers of the model whose bias the file leaves out.
        before, after: the file's operations on the image and on the logits that the model does not have.
        adaptable: mismatches that ``factors``, ``before`` and ``after`` make up for, one per line.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    factors: dict[Pair, float] = field(default_factory=dict)
    constants: set[str] = field(default_factory=set)
    zero: list[str] = field(default_factory=list)
    before: list[Node] = field(default_factory=list)
    after: list[Node] = field(default_factory=list)
    adaptable: list[str] = field(default_factory=list)


def compare(theirs: Node, own: Node) -> Comparison:
    """Walk both graphs from their outputs, the file's and the model's, to the image."""
    found = Comparison()
    while theirs.kind in ("Softmax", "LogSoftmax") and own.kind != theirs.kind:
        found.after.insert(0, theirs)
        found.adaptable.append(f"{theirs} in the file, {_shown(own)} in the model")
        theirs = theirs.inputs[0]
    if own.kind == "Flatten" and theirs.kind != "Flatten" and (own.inputs[0].shape or ())[1:] == (1, 1):
        found.adaptable.append(f"{theirs} in the file returns maps of 1x1, the model vectors")
        own = own.inputs[0]
    _Walk(found).run(theirs, own)
    order = {node: i for i, node in enumerate(nodes_of(theirs))}
    found.pairs.sort(key=lambda pair: order[pair[0]])
    for a, b in found.pairs:
        _compare_settings(found, a, b)
        _compare_tensors(found, a, b)
    return found


class _Walk:
    def __init__(self, found: Comparison) -> None:
        self.found = found
        self.image: Node | None = None  # what of the file stands for the image of the model

    def run(self, theirs: Node, own: Node) -> None:
        seen: set[Pair] = set()
        # with each pair, the one of weights into which a factor of its output can go
        stack: list[tuple[Node, Node, Pair | None]] = [(theirs, own, None)]
        while stack:
            a, b, weighted = stack.pop()
            a, b = _past_dropout(a), _past_dropout(b)
            if weighted is not None:
                a, b = self._past_factors(a, b, weighted)
            if (a, b) in seen:
                continue
            seen.add((a, b))
            if b.kind == "Image" and self._is_the_image(a):
                continue
            if a.kind != b.kind or len(a.inputs) != len(b.inputs):
                self.found.mismatches.append(f"{_shown(a)} in the file, {_shown(b)} in the model")
                stack += [(*pair, None) for pair in _after_a_mismatch(a, b)]
                continue
            self.found.pairs.append((a, b))
            if a.kind in _WEIGHTED:
                weighted = (a, b)
            elif a.kind not in ("Flatten", "Reshape"):
                weighted = None
            stack += [(x, y, weighted) for x, y in zip(a.inputs, b.inputs, strict=True)]

    def _past_factors(self, a: Node, b: Node, weighted: Pair) -> Pair:
        if _factor(a) == _factor(b):
            return a, b
        self.found.adaptable.append(f"{_shown(a)} in the file, {_shown(b)} in the model")
        factor = self.found.factors.get(weighted, 1.0)
        while (by := _factor(a)) is not None:
            factor *= by
            a = _past_dropout(a.inputs[0])
        while (by := _factor(b)) is not None:
            factor /= by
            b = _past_dropout(b.inputs[0])
        self.found.factors[weighted] = factor
        return a, b

    def _is_the_image(self, node: Node) -> bool:
        """Whether a node of the file may stand for the image: it, or constants added to it or multiplied with it."""
        steps = nodes_of(node)
        if any(len(step.inputs) > 1 or step.kind not in ("Image", "Add", "Sub", "Mul", "Div") for step in steps):
            return False
        if self.image is None:
            self.image, self.found.before = node, steps[1:]
            self.found.adaptable += [f"{step} in the file, nothing in the model" for step in steps[1:]]
        return node is self.image


def _after_a_mismatch(a: Node, b: Node) -> list[tuple[Node, Node]]:
    """Where to go on, to name further mismatches: where one of the two has a node more, or another in its place."""
    if len(a.inputs) != 1 or len(b.inputs) != 1:
        return []
    before_a, before_b = _past_dropout(a.inputs[0]), _past_dropout(b.inputs[0])
    if before_a.kind == b.kind and before_b.kind != a.kind:
        return [(before_a, b)]
    if before_b.kind == a.kind and before_a.kind != b.kind:
        return [(a, before_b)]
    return [(before_a, before_b)]


def _past_dropout(node: Node) -> Node:
    while node.kind == "Dropout":
        node = node.inputs[0]
    return node


def _factor(node: Node) -> float | None:
    """By which the node multiplies all of its input."""
    if node.kind != "Mul" or len(node.inputs) != 1 or node.tensors["constant"].numel() != 1:
        return None
    if node.module is not None and node.keys:  # a parameter or a buffer
        return None
    factor = node.tensors["constant"].item()
    return factor if factor and math.isfinite(factor) else None


def _shown(node: Node) -> str:
    return "nothing" if node.kind == "Image" else str(node)


def _compare_settings(found: Comparison, theirs: Node, own: Node) -> None:
    for setting in theirs.settings:
        if not _is_same(setting, theirs, own):
            found.differences.append(Difference(theirs, own, setting))


def _is_same(setting: str, theirs: Node, own: Node) -> bool:
    a, b = theirs.settings[setting], own.settings[setting]
    if setting == "momentum":  # of training only
        return True
    if setting == "lrn":
        return _same_lrn(a, b)
    if setting == "count_include_pad":
        return a == b or (not _overhangs(theirs) and not _overhangs(own))
    if setting != "window":
        return _same_number(a, b) if isinstance(a, float) else a == b
    if a == b:
        return True
    if (a.kernel, a.stride, a.dilation, a.begin) != (b.kernel, b.stride, b.dilation, b.begin):
        return False
    # for images of one size what is at the end only matters where it makes the map larger, or is counted
    if not _is_known(theirs) or theirs.inputs[0].shape != own.inputs[0].shape or theirs.shape != own.shape:
        return False
    counted = theirs.settings.get("count_include_pad") or own.settings.get("count_include_pad")
    return not counted or not (_overhangs(theirs) or _overhangs(own))


def _is_known(node: Node) -> bool:
    shapes = (node.shape, node.inputs[0].shape)
    return all(shape is not None and None not in shape for shape in shapes)


def _overhangs(node: Node) -> bool:
    """Whether a window reaches out of the map, as far as it is known."""
    window = node.window
    if any(window.begin):
        return True
    if not _is_known(node):
        return any(window.end) or window.ceil_mode
    sizes = zip((node.inputs[0].shape or ())[1:], (node.shape or ())[1:], strict=True)
    return any(
        (after - 1) * window.stride[i] + window.dilation[i] * (window.kernel[i] - 1) + 1 > before
        for i, (before, after) in enumerate(sizes)
        if before is not None and after is not None
    )


def _compare_tensors(found: Comparison, theirs: Node, own: Node) -> None:
    factor = found.factors.get((theirs, own), 1.0)
    for name, tensor, value in _tensors(found, theirs, own):
        key = own.keys.get(name)
        if key is None and name == "weight" and factor != 1:
            found.mismatches.append(f"{theirs}: its weight in the model cannot absorb a factor, as it is no parameter")
        if key is None:
            same = _broadcast(tensor) == _broadcast(value)
            if not same or not torch.equal(tensor.flatten(), value.float().cpu().flatten()):
                found.mismatches.append(
                    f"{theirs}: its {name} differs from the model's, which is neither a parameter nor a buffer"
                )
            continue
        if name == "constant":
            if _broadcast(tensor) != _broadcast(value):
                found.mismatches.append(
                    f"{theirs}: its constant is {tuple(tensor.shape)} in the file and {tuple(value.shape)} in the model"
                )
            found.constants.add(key)
        if name == "weight":
            tensor = tensor * factor if factor != 1 else tensor
        if key in found.state and not torch.equal(found.state[key], tensor):
            found.mismatches.append(f"{key} of the model would have to hold two different tensors of the file")
        found.state[key] = tensor


def _broadcast(constant: Tensor) -> tuple[int, ...]:
    """The shape without what is no more than its number of dimensions."""
    shape = tuple(constant.shape)
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def _tensors(found: Comparison, theirs: Node, own: Node) -> Iterator[tuple[str, Tensor, Tensor]]:
    for name, value in own.tensors.items():
        if name in theirs.tensors:
            yield name, theirs.tensors[name], value
        elif name == "bias" and theirs.kind in _WEIGHTED:  # exporters leave out biases that are all 0
            found.zero.append(own.name)
            yield name, torch.zeros(value.shape, dtype=torch.float32, device="cpu"), value
        else:
            found.mismatches.append(f"{theirs}: it has no {name}, which the model has, {own}")
    for name, tensor in theirs.tensors.items():
        if name not in own.tensors and (name != "bias" or tensor.any()):
            found.mismatches.append(f"{theirs}: {own} of the model has no {name}")


def _same_number(a: float, b: float) -> bool:
    """Whether two numbers are the same in float32, in which ONNX stores them."""
    a, b = torch.tensor([a, b], dtype=torch.float32, device="cpu").tolist()
    return a == b


def _same_lrn(a: LRNParams, b: LRNParams) -> bool:
    return (a.size, a.groups) == (b.size, b.groups) and all(
        _same_number(getattr(a, name), getattr(b, name)) for name in ("alpha", "beta", "k")
    )
