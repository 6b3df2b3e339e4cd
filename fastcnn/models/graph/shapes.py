"""The shape of a node's output for one image; GraphError where its inputs do not fit."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import GraphError
from .node import Node, Shape


def _shape(node: Node, rank: int | None = None) -> Shape | None:
    """Of the first input."""
    shape = node.inputs[0].shape
    if shape is not None and rank is not None and len(shape) != rank:
        raise GraphError(f"it takes {rank + 1} dimensions, and gets {len(shape) + 1}")
    return shape


def map_of(node: Node, channels: int | None = None) -> Shape:
    """Of an input that must be a map, (C, H, W), with so many channels."""
    shape = _shape(node, 3) or (None, None, None)
    if None not in (channels, shape[0]) and shape[0] != channels:
        raise GraphError(f"it takes {channels} channels, and gets {shape[0]}")
    return (shape[0] if channels is None else channels, *shape[1:])


def _convolved(node: Node) -> Shape:
    weight, groups = node.tensors["weight"], node.settings["groups"]
    if weight.dim() != 4 or tuple(weight.shape[2:]) != node.window.kernel or not weight.numel():
        raise GraphError(f"its weight of shape {tuple(weight.shape)} does not fit its window")
    if groups < 1 or len(weight) % groups:
        raise GraphError(f"{len(weight)} output channels cannot be divided into {groups} groups")
    shape = map_of(node, weight.shape[1] * groups)
    node.window.check()
    _check_length(node, "bias", len(weight))
    return (len(weight), *node.window.map_size(shape[1:]))


def _multiplied(node: Node) -> Shape | None:
    weight, shape = node.tensors["weight"], _shape(node)
    if weight.dim() != 2 or not weight.numel():
        raise GraphError(f"its weight is not a matrix, but has shape {tuple(weight.shape)}")
    _check_length(node, "bias", len(weight))
    if shape is None:
        return None
    if not shape or (shape[-1] is not None and shape[-1] != weight.shape[1]):
        raise GraphError(f"it takes {weight.shape[1]} features, and gets {shape[-1] if shape else 1}")
    return (*shape[:-1], len(weight))


def _per_channel(node: Node) -> Shape | None:
    shape = _shape(node)
    channels = len(node.tensors["running_mean"])
    if shape is not None and (not shape or shape[0] not in (None, channels)):
        raise GraphError(f"it takes {channels} channels, and gets {shape[0] if shape else 1}")
    for name in node.tensors:
        _check_length(node, name, channels)
    return shape


def _check_length(node: Node, name: str, length: int) -> None:
    if name in node.tensors and tuple(node.tensors[name].shape) != (length,):
        raise GraphError(f"its {name} has shape {tuple(node.tensors[name].shape)}, not ({length},)")


def _normalized(node: Node) -> Shape | None:
    lrn, shape = node.settings["lrn"], _shape(node)
    if shape is not None and (len(shape) < 2 or (shape[0] is not None and shape[0] % lrn.groups)):
        raise GraphError(f"it cannot normalize maps of shape {shape}")
    return shape


def _pooled(node: Node) -> Shape:
    node.window.check()
    channels, *size = map_of(node)
    return (channels, *node.window.map_size(tuple(size)))


def _adapted(node: Node) -> Shape:
    return (map_of(node)[0], *node.settings["size"])


def _padded(node: Node) -> Shape:
    channels, height, width = map_of(node)
    (top, left), (bottom, right) = node.settings["begin"], node.settings["end"]
    if min(top, left, bottom, right) < 0 or max(top, left, bottom, right) > 1024:
        raise GraphError(f"padding of {node.settings['begin']} and {node.settings['end']} is not supported")
    return (channels, *(None if n is None else n + p for n, p in ((height, top + bottom), (width, left + right))))


def _reshaped(node: Node) -> Shape:
    before, shape = _size(_shape(node)), list(node.settings["shape"])
    if not shape or any(n < -1 or n == 0 for n in shape) or shape.count(-1) > 1:
        raise GraphError(f"a shape of {tuple(shape)} is not supported")
    if -1 in shape and before is not None:
        rest = -math.prod(shape)
        if rest <= 0 or before % rest:
            raise GraphError(f"{before} values do not make up {tuple(shape)}")
        shape[shape.index(-1)] = before // rest
    if before is not None and math.prod(shape) != before:
        raise GraphError(f"{before} values do not make up {tuple(shape)}")
    return tuple(None if n == -1 else n for n in shape)


def _size(shape: Shape | None) -> int | None:
    if shape is None or None in shape:
        return None
    return math.prod(n for n in shape if n is not None)


def _transposed(node: Node) -> Shape | None:
    order = node.settings["order"]
    shape = _shape(node, len(order))
    if sorted(order) != list(range(len(order))):
        raise GraphError(f"it cannot order dimensions by {order}")
    return None if shape is None else tuple(shape[i] for i in order)


def _joined(node: Node) -> Shape | None:
    axis = node.settings["axis"]
    shapes = [before.shape for before in node.inputs]
    if any(shape is None for shape in shapes):
        return None
    first, *others = [list(shape or ()) for shape in shapes]
    for other in others:
        if len(other) != len(first) or axis >= len(first):
            raise GraphError(f"it cannot join {', '.join(map(str, shapes))}")
        for i, length in enumerate(other):
            if i == axis:
                total = first[i]
                first[i] = None if total is None or length is None else total + length
            else:
                first[i] = _common(first[i], length)
    return tuple(first)


def _common(a: int | None, b: int | None) -> int | None:
    if a is not None and b is not None and a != b:
        raise GraphError(f"it cannot join {a} and {b} values")
    return b if a is None else a


def _sliced(node: Node) -> Shape:
    channels, *rest = _shape(node) or (None,)
    start, stop = node.settings["start"], node.settings["stop"]
    if channels is None or not 0 <= start < stop <= channels:
        raise GraphError(f"it cannot take channels {start} to {stop} of {channels}")
    return (stop - start, *rest)


def _combined(node: Node) -> Shape | None:
    """Of two nodes, or of one and a constant, which must not make it larger."""
    shape = _shape(node)
    if len(node.inputs) == 2:
        other = node.inputs[1].shape
        if shape is None or other is None:
            return shape or other
        if len(shape) != len(other):
            raise GraphError(f"it cannot combine {shape} and {other}")
        return tuple(_common(a, b) for a, b in zip(shape, other, strict=True))
    constant = node.tensors["constant"]
    if shape is not None:
        if constant.dim() == len(shape) + 1 and len(constant) == 1:
            node.tensors["constant"] = constant = constant[0]  # one for every image
        if constant.dim() > len(shape):
            raise GraphError(f"its constant of shape {tuple(constant.shape)} has more dimensions than {shape}")
        for a, b in zip(reversed(constant.shape), reversed(shape), strict=False):
            if a != 1 and b is not None and a != b:
                raise GraphError(f"its constant of shape {tuple(constant.shape)} does not fit {shape}")
    return shape


def _along(node: Node) -> Shape | None:
    shape, axis = _shape(node), node.settings["axis"]
    if shape is not None and not 0 <= axis < len(shape):
        raise GraphError(f"it has no dimension {axis + 1}")
    return shape


SHAPES: dict[str, Callable[[Node], Shape | None]] = {
    "Conv": _convolved,
    "Gemm": _multiplied,
    "BatchNormalization": _per_channel,
    "LRN": _normalized,
    "MaxPool": _pooled,
    "AveragePool": _pooled,
    "AdaptiveAveragePool": _adapted,
    "GlobalAveragePool": lambda node: (map_of(node)[0], 1, 1),
    "GlobalMaxPool": lambda node: (map_of(node)[0], 1, 1),
    "Pad": _padded,
    "Flatten": lambda node: (_size(_shape(node)),),
    "Reshape": _reshaped,
    "Transpose": _transposed,
    "Concat": _joined,
    "Slice": _sliced,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _combined),
    "Softmax": _along,
    "LogSoftmax": _along,
    **dict.fromkeys(("Relu", "Clip", "Dropout"), _shape),
}
