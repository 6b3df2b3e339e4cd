"""Nodes in one normal form, however exporters and models spell the same operation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ..errors import GraphError
from .node import Node, Window
from .shapes import SHAPES, map_of


def _normal_window(node: Node) -> Node:
    """Padding in front of a window, of what the window pads with itself, is part of it."""
    pad = node.inputs[0]
    fill = -math.inf if node.kind == "MaxPool" else 0.0
    if pad.kind != "Pad" or pad.settings["value"] != fill:
        return node
    window = node.window
    begin, end = (
        (a[0] + b[0], a[1] + b[1])
        for a, b in ((window.begin, pad.settings["begin"]), (window.end, pad.settings["end"]))
    )
    node.settings["window"] = replace(window, begin=begin, end=end)
    node.inputs, node.merged = pad.inputs, pad
    try:
        node.shape = SHAPES[node.kind](node)
    except GraphError:  # more than a window pads with
        node.settings["window"], node.inputs, node.merged = window, (pad,), None
    return node


def _normal_average(node: Node) -> Node:
    """The average of one window around the whole map is that of the map, whatever its size."""
    window, size = node.window, map_of(node)[1:]
    if replace(window, ceil_mode=False) == Window((1, 1)):  # as torch exports an adaptive average that changes nothing
        return node.inputs[0]
    if node.shape is None or node.shape[1:] != (1, 1) or None in size:
        return node
    counts_padding = node.settings["count_include_pad"] and window.kernel != size
    around = all(
        kernel >= begin + length
        for kernel, begin, length in zip(window.kernel, window.begin, size, strict=True)
        if length is not None
    )
    return replace(node, kind="GlobalAveragePool", settings={}) if around and not counts_padding else node


def _normal_adaptive(node: Node) -> Node:
    size, before = node.settings["size"], map_of(node)[1:]
    if size == (1, 1):
        return replace(node, kind="GlobalAveragePool", settings={})
    if size == before:
        return node.inputs[0]
    if None in before or any(b % s for b, s in zip(before, size, strict=True)):
        return node
    kernel = tuple(b // s for b, s in zip(before, size, strict=True))
    settings = {"window": Window(kernel, kernel), "count_include_pad": False}
    return replace(node, kind="AveragePool", settings=settings)


def _normal_pad(node: Node) -> Node:
    return node if any(node.settings["begin"] + node.settings["end"]) else node.inputs[0]


def _normal_flatten(node: Node) -> Node:
    before = node.inputs[0]
    return before if before.shape is not None and len(before.shape) == 1 else node


def _normal_reshape(node: Node) -> Node:
    before = node.inputs[0]
    if before.shape is not None and None not in before.shape and before.shape == node.shape:
        return before
    if node.shape is not None and len(node.shape) == 1:
        return _normal_flatten(replace(node, kind="Flatten", settings={}))
    node.settings["shape"] = node.shape
    return node


def _normal_transpose(node: Node) -> Node:
    order = tuple(node.settings["order"])
    return node.inputs[0] if order == tuple(range(len(order))) else node


def _normal_concat(node: Node) -> Node:
    """LRN on each of equal parts of the channels is LRN in groups."""
    norms = node.inputs
    if len(norms) == 1:
        return norms[0]
    parts = [norm.inputs[0] for norm in norms if norm.kind == "LRN" and norm.inputs[0].kind == "Slice"]
    if len(parts) < len(norms) or node.settings["axis"] != 0 or node.shape is None:
        return node
    (lrn, *other_lrns), (before, *other_inputs) = (
        {norm.settings["lrn"] for norm in norms},
        {p.inputs[0] for p in parts},
    )
    size = (node.shape[0] or 0) // len(parts)
    ranges = [(i * size, (i + 1) * size) for i in range(len(parts))]
    is_split = [(part.settings["start"], part.settings["stop"]) for part in parts] == ranges
    is_whole = before.shape is not None and before.shape[0] == node.shape[0]
    if other_lrns or other_inputs or lrn.groups != 1 or not is_split or not is_whole:
        return node
    settings = {"lrn": replace(lrn, groups=len(parts))}
    return replace(norms[0], inputs=(before,), settings=settings, shape=node.shape)


def _normal_clip(node: Node) -> Node:
    low, high = node.settings["min"], node.settings["max"]
    return replace(node, kind="Relu", settings={}) if low == 0 and high == math.inf else node


def _normal_add(node: Node) -> Node:
    """What is added to each output of a convolution or a matrix product without a bias is its bias."""
    before = node.inputs[0]
    if len(node.inputs) == 2 or before.kind not in ("Conv", "Gemm", "BatchNormalization"):
        return node
    values = _by_channel(node)
    if before.kind == "BatchNormalization":
        if values is None or before.module is not None:
            return node
        return replace(before, tensors={**before.tensors, "bias": before.tensors["bias"] + values})
    if values is None or "bias" in before.tensors:
        return node
    keys = dict(before.keys)
    if "constant" in node.keys:
        if node.tensors["constant"].numel() != values.numel():
            return node
        keys["bias"] = node.keys["constant"]
    return replace(before, tensors={**before.tensors, "bias": values}, keys=keys)


def _normal_mul(node: Node) -> Node:
    """What multiplies each channel of a batch norm is part of it."""
    before, values = node.inputs[0], _by_channel(node) if len(node.inputs) == 1 else None
    if values is None or before.kind != "BatchNormalization" or before.module is not None:
        return node
    scaled = {name: before.tensors[name] * values for name in ("weight", "bias")}
    return replace(before, tensors={**before.tensors, **scaled})


def _by_channel(node: Node) -> Tensor | None:
    """The constant as one value per channel, if it is that."""
    constant, before = node.tensors["constant"], node.inputs[0]
    if before.shape is None or before.shape[0] is None:
        return None
    shape = (before.shape[0],) + (1,) * (len(before.shape) - 1)
    if constant.dim() > len(shape) or any(
        a not in (1, b) for a, b in zip(reversed(constant.shape), reversed(shape), strict=False)
    ):
        return None
    if before.kind == "BatchNormalization" and constant.numel() == 1 and before.shape[0] != 1:
        return None  # a scale of the whole map is one
    return constant.expand(shape).reshape(-1)


NORMAL: dict[str, Callable[[Node], Node]] = {
    "Conv": _normal_window,
    "MaxPool": _normal_window,
    "AveragePool": _normal_average,
    "AdaptiveAveragePool": _normal_adaptive,
    "Pad": _normal_pad,
    "Flatten": _normal_flatten,
    "Reshape": _normal_reshape,
    "Transpose": _normal_transpose,
    "Concat": _normal_concat,
    "Clip": _normal_clip,
    "Add": _normal_add,
    "Mul": _normal_mul,
}
