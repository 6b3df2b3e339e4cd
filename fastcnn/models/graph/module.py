"""Graphs as modules of torch."""

from __future__ import annotations

import math
import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, fx, nn

from ...nn import LocalResponseNorm
from ..errors import GraphError
from .node import Node, Pair, Window, evenly_padded, nodes_of


def build(output: Node, name: str) -> fx.GraphModule:
    """A module that computes what a file's graph does, in evaluation mode.

    Raises:
        GraphError: torch has no layer for an operation.
    """
    builder = _Builder(output)
    module = fx.GraphModule(builder.root, builder.run(), _identifier(name) or "Network")
    return module.eval()


class _Builder:
    def __init__(self, output: Node) -> None:
        self.nodes = nodes_of(output)
        self.names = _names(self.nodes)
        self.root, self.graph = nn.Module(), fx.Graph()
        self.values: dict[Node, fx.Node] = {}

    def run(self) -> fx.Graph:
        for node in self.nodes:
            self.values[node] = self._value(node)
        self.graph.output(self.values[self.nodes[-1]])
        self.graph.lint()
        return self.graph

    def _value(self, node: Node) -> fx.Node:
        if node.kind == "Image":
            return self.graph.placeholder("images")
        if node.kind in _FUNCTIONS:
            return _FUNCTIONS[node.kind](self, node, *(self.values[before] for before in node.inputs))
        value = self.values[node.inputs[0]]
        shared = next((other for other in self.values if _is_shared(node, other)), None)
        if shared is not None:
            return self.graph.call_module(self.names[shared], (value,))
        for suffix, layer in _LAYERS[node.kind](node):
            self.add(self.names[node] + suffix, layer)
            value = self.graph.call_module(self.names[node] + suffix, (value,))
        return value

    def add(self, name: str, layer: nn.Module) -> None:
        *path, last = name.split(".")
        parent = self.root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, layer)

    def constant(self, node: Node) -> fx.Node | float:
        value = node.tensors["constant"]
        if value.numel() == 1:
            return value.item()
        name = f"constant{len(self.root._buffers)}"
        self.root.register_buffer(name, value.clone())
        return self.graph.get_attr(name)

    def combined(self, node: Node, *values: fx.Node) -> fx.Node:
        function = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.truediv}[node.kind]
        return self.graph.call_function(function, values if len(values) == 2 else (*values, self.constant(node)))

    def concatenated(self, node: Node, *values: fx.Node) -> fx.Node:
        return self.graph.call_function(torch.cat, (list(values), node.settings["axis"] + 1))

    def sliced(self, node: Node, value: fx.Node) -> fx.Node:
        part = slice(node.settings["start"], node.settings["stop"])
        return self.graph.call_function(operator.getitem, (value, (slice(None), part)))

    def reshaped(self, node: Node, value: fx.Node) -> fx.Node:
        flat = self.graph.call_function(torch.flatten, (value, 1))
        return self.graph.call_method("unflatten", (flat, 1, node.settings["shape"]))

    def transposed(self, node: Node, value: fx.Node) -> fx.Node:
        return self.graph.call_method("permute", (value, 0, *(i + 1 for i in node.settings["order"])))

    def flattened(self, node: Node, value: fx.Node) -> fx.Node:
        return self.graph.call_function(torch.flatten, (value, 1))


def _is_shared(a: Node, b: Node) -> bool:
    """Whether one module can be both: the file uses the same constants twice."""
    if "weight" not in a.keys or (a.kind, a.keys, a.settings) != (b.kind, b.keys, b.settings):
        return False
    of_layer = "window" not in a.settings or a.window.begin == a.window.end  # and none that pads in front of it
    return of_layer and all(torch.equal(t, b.tensors[name]) for name, t in a.tensors.items())


_FUNCTIONS: dict[str, Callable[..., fx.Node]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _Builder.combined),
    "Concat": _Builder.concatenated,
    "Slice": _Builder.sliced,
    "Reshape": _Builder.reshaped,
    "Transpose": _Builder.transposed,
    "Flatten": _Builder.flattened,
}

# -- layers, each with what its name ends with ------------------------------------------------------------------------

Layers = list[tuple[str, nn.Module]]


def _filled(layer: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """The layer with these parameters and buffers."""
    for name, tensor in tensors.items():
        value = tensor.contiguous()
        if name in layer._parameters:
            layer.register_parameter(name, nn.Parameter(value))
        else:
            layer.register_buffer(name, value)
    return layer


def _evenly(node: Node, fill: float | None) -> tuple[Layers, Window, Pair]:
    """A window that a layer of torch has, its padding, and a layer in front that pads where it cannot itself.

    ``fill`` is what that layer pads with; None: it would not be the same.
    """
    for window in evenly_padded(node):
        if node.kind == "Conv" or all(2 * p <= k for p, k in zip(window.begin, window.kernel, strict=True)):
            return [], window, window.begin
    window = node.window
    if fill is None or window.ceil_mode:
        raise GraphError(f"{node}: torch has no layer that pads like this: {window}")
    (top, left), (bottom, right) = window.begin, window.end
    sides = (left, right, top, bottom)
    return [("_pad", nn.ConstantPad2d(sides, fill) if fill else nn.ZeroPad2d(sides))], window, (0, 0)


def _convolution(node: Node) -> Layers:
    weight, groups = node.tensors["weight"], node.settings["groups"]
    layers, window, padding = _evenly(node, 0.0)
    sizes = (weight.shape[1] * groups, len(weight), window.kernel, window.stride, padding, window.dilation, groups)
    with torch.device("meta"):
        layer = nn.Conv2d(*sizes, bias="bias" in node.tensors)
    return [*layers, ("", _filled(layer, node.tensors))]


def _linear(node: Node) -> Layers:
    weight = node.tensors["weight"]
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], len(weight), bias="bias" in node.tensors)
    return [("", _filled(layer, node.tensors))]


def _batch_norm(node: Node) -> Layers:
    rank = len(node.inputs[0].shape or (None, None, None))
    norm = nn.BatchNorm2d if rank == 3 else nn.BatchNorm1d
    if rank not in (1, 2, 3):
        raise GraphError(f"{node}: it takes {rank + 1} dimensions, which is not supported")
    epsilon, momentum = node.settings["epsilon"], node.settings["momentum"]
    return [("", _filled(norm(len(node.tensors["weight"]), epsilon, 1 - momentum), node.tensors))]


def _max_pool(node: Node) -> Layers:
    layers, window, padding = _evenly(node, -math.inf)
    pool = nn.MaxPool2d(window.kernel, window.stride, padding, window.dilation, ceil_mode=window.ceil_mode)
    return [*layers, ("", pool)]


def _average_pool(node: Node) -> Layers:
    include = node.settings["count_include_pad"]
    layers, window, padding = _evenly(node, 0.0 if include else None)
    return [*layers, ("", nn.AvgPool2d(window.kernel, window.stride, padding, window.ceil_mode, include))]


def _padding(node: Node) -> Layers:
    (top, left), (bottom, right) = node.settings["begin"], node.settings["end"]
    value = node.settings["value"]
    return [("", nn.ConstantPad2d((left, right, top, bottom), value))]


def _clip(node: Node) -> Layers:
    low, high = node.settings["min"], node.settings["max"]
    return [("", nn.ReLU6() if (low, high) == (0, 6) else nn.Hardtanh(low, high))]


_LAYERS: dict[str, Callable[[Node], Layers]] = {
    "Conv": _convolution,
    "Gemm": _linear,
    "BatchNormalization": _batch_norm,
    "LRN": lambda node: [("", LocalResponseNorm(**asdict(node.settings["lrn"])))],
    "Relu": lambda node: [("", nn.ReLU())],
    "Clip": _clip,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda node: [("", nn.AdaptiveAvgPool2d(1))],
    "GlobalMaxPool": lambda node: [("", nn.AdaptiveMaxPool2d(1))],
    "Pad": _padding,
    "Dropout": lambda node: [("", nn.Dropout(node.settings["p"]))],
    "Softmax": lambda node: [("", nn.Softmax(node.settings["axis"] + 1))],
    "LogSoftmax": lambda node: [("", nn.LogSoftmax(node.settings["axis"] + 1))],
}

# -- names ------------------------------------------------------------------------------------------------------------

# what exporters put after the name of a layer to name its weight
_ENDINGS = re.compile(r"([._/](weight|kernel|scale|gamma|w|weights)(_0|:0)?|_w_0|_w|_W)$")


def _names(nodes: list[Node]) -> dict[Node, str]:
    """A name for each layer that no other has, and that is no module around another."""
    names = {node: _proposed(node) for node in nodes if node.kind in _LAYERS}
    around = {name[:i] for name in names.values() for i, char in enumerate(name) if char == "."}
    names = {node: f"{name}.{node.kind.lower()}" if name in around else name for node, name in names.items()}
    if around & set(names.values()):
        names = {node: name.replace(".", "_") for node, name in names.items()}
    taken = set(names.values())
    seen: Counter[str] = Counter()
    for node, name in names.items():
        seen[name] += 1
        if seen[name] > 1:
            while (other := f"{name}_{seen[name]}") in taken:
                seen[name] += 1
            names[node] = other
            taken.add(other)
    return names


def _proposed(node: Node) -> str:
    """The name of the weight in the file, or of the node, or what comes after which layer."""
    weight, name = node.keys.get("weight", ""), node.name.removeprefix("node_")
    if weight and not re.match(r"onnx::|\D?\d+$", weight):  # not a number in place of a name
        name = _ENDINGS.sub("", weight)
    elif name.startswith("/") and name.count("/") > 1:
        name = _path(name.split("/")[1:-1])
    elif re.fullmatch(r"\D?\d+|", name):
        name = f"{_layer_before(node)}_{node.kind.lower()}".lstrip("_")
    return ".".join(filter(None, map(_identifier, name.split(".")))) or node.kind.lower()


def _path(parts: list[str]) -> str:
    """Of a module as exporters spell it: features.1.conv for /features/features.1/conv."""
    path = ""
    for part in parts:
        path = part if not path or part.startswith(f"{path}.") else f"{path}.{part}"
    return path


def _layer_before(node: Node) -> str:
    """The name of the last layer with weights in front of a node."""
    while node.inputs and "weight" not in node.inputs[0].keys:
        node = node.inputs[0]
    return _proposed(node.inputs[0]).replace(".", "_") if node.inputs else ""


def _identifier(name: str) -> str:
    name = re.sub(r"\W+", "_", name.strip(" /:"), flags=re.ASCII)
    # not what modules have already
    return f"{name}_" if hasattr(nn.Module, name) or name in ("training", "graph", "code") else name
