"""Where the tensors of an ONNX file belong in a model, and what else has to change there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...params import LRNParams
from ..errors import GraphError
from .adapt import Changes
from .compare import Comparison, compare
from .node import Node, nodes_of
from .read import OnnxGraph
from .trace import trace


@dataclass
class Fit:
    """A file beside a model.

    Attributes:
        state: the file's tensors by the model's keys.
        mismatches: why it does not fit, one per line.
        changes: what was changed in the model's modules; to be undone if the file is not loaded.
        lines: what was changed in the model, for people.
        size: height and width of images that both take.
        before, after: what the file does to the image and to the logits, and the model does not.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    mismatches: list[str] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)
    lines: list[str] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    before: list[Node] = field(default_factory=list)
    after: list[Node] = field(default_factory=list)


def fit(model: nn.Module, graph: OnnxGraph, *, adapt: bool) -> Fit:
    """Compare a file with a model; with ``adapt``, give the model the file's settings first."""
    result = Fit()
    try:
        found, result.size = _compared(model, graph, result.changes, adapt)
    except GraphError as error:
        result.mismatches.append(str(error))
        return result
    result.state, result.before, result.after = found.state, found.before, found.after
    keys: dict[int, str] = {}  # of tensors that have several
    for key, like in model.state_dict(keep_vars=True).items():
        first = keys.setdefault(id(like), key)
        if first in found.state and first != key:
            result.state[key] = found.state[first]
        if key in found.constants and found.state[key].numel() == like.numel():
            result.state[key] = found.state[key].reshape(like.shape)
    result.mismatches += [*([] if adapt else found.adaptable), *found.mismatches, *map(str, found.differences)]
    result.lines += result.changes.lines
    result.lines += [f"{name} has a bias of 0, for the file has none" for name in found.zero]
    for (_, own), factor in found.factors.items():
        if factor != 1:
            name = own.keys.get("weight", str(own))
            by = f"{1 / factor:g}"
            result.lines.append(f"{name} is {factor:g} times the file's: the model scales its input by {by}")
    if result.changes.lines and hasattr(model, "fastcnn_report"):  # its graphs have settings as constants
        result.mismatches += [f"{line}: not after optimize(), load the weights before" for line in result.changes.lines]
    if result.mismatches and not adapt:
        other = fit(model, graph, adapt=True)
        other.changes.undo()
        if not other.mismatches:
            result.mismatches.append("adapt=True would resolve all of this")
    return result


def image_shape(graph: OnnxGraph) -> tuple[int, int | None, int | None]:
    """Channels, height and width of the images that a file takes; None for any."""
    first = next((node for node in nodes_of(graph.output) if node.kind == "Conv"), None)
    shape = graph.image.shape
    if shape is None:
        shape = (None, None, None)
    if len(shape) != 3:
        raise GraphError(f"the file takes inputs of {len(shape) + 1} dimensions, not images")
    channels = shape[0]
    if channels is None:
        channels = first.tensors["weight"].shape[1] * first.settings["groups"] if first is not None else 3
    return channels, shape[1], shape[2]


def _compared(model: nn.Module, graph: OnnxGraph, changes: Changes, adapt: bool) -> tuple[Comparison, tuple[int, int]]:
    channels, height, width = image_shape(graph)
    own_size = getattr(model, "input_size", None)
    if adapt and isinstance(own_size, int) and height is not None and height == width != own_size:
        changes.set(model, input_size=height)
        changes.lines.append(f"input_size {own_size} became {height}, as the file's")
    size = None if height is None or width is None else (height, width)
    own = trace(model, channels, size)
    found = compare(graph.output, own.output)
    if adapt and found.differences and not found.mismatches:
        adapted = [changes.adapt(difference) for difference in found.differences]
        if all(adapted):
            found = compare(graph.output, trace(model, channels, size).output)
    return found, own.size


def applied(nodes: list[Node], x: Tensor) -> Tensor:
    """What ``before`` or ``after`` computes."""
    functions: dict[str, Any] = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div}
    for node in nodes:
        if node.kind in functions:
            x = functions[node.kind](x, node.tensors["constant"])
        else:
            x = (F.softmax if node.kind == "Softmax" else F.log_softmax)(x, node.settings["axis"] + 1)
    return x


def lrns(graph: OnnxGraph) -> list[LRNParams]:
    """The parameters of each LRN."""
    return [node.settings["lrn"] for node in nodes_of(graph.output) if node.kind == "LRN"]
