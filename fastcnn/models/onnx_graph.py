"""ONNX files as lists of steps: what is read of the graphs of AlexNet, CaffeNet, ZFNet, GoogLeNet and VGG."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..params import LRNParams
from .steps import Step, Window, pair

# they move values or are part of every network, and have nothing to compare
PASSED_OVER = {
    *("Relu", "Dropout", "Identity", "Cast", "Concat", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Shape"),
    *("AveragePool", "GlobalAveragePool", "ReduceMean", "Softmax", "LogSoftmax"),
}
ARITHMETIC = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/"}


@dataclass
class OnnxGraph:
    """What a file says.

    Attributes:
        name, producer: of the graph.
        steps: in graph order.
        image_steps: what it does to the image before the first step, as text.
        problems: what these networks do not have or torch cannot do, a line each.
    """

    name: str
    producer: str
    steps: list[Step] = field(default_factory=list)
    image_steps: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_onnx(path: Path) -> OnnxGraph:
    """The steps of an ONNX file, weights as float32 or whatever they are stored as.

    Raises:
        ImportError: the package onnx is not installed.
        Exception: the file is not ONNX; whatever the package raises.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError("reading ONNX files needs the package onnx: pip install fastcnn[models]") from None
    model = onnx.load(path)
    if not model.graph.node:
        raise ValueError("it holds no graph")
    return _Reader(model, onnx).read()


class _Reader:
    """Goes over the nodes in their order, which is the order in which they run."""

    def __init__(self, model: Any, onnx: Any) -> None:
        self.nodes, self.onnx = model.graph.node, onnx
        self.graph = OnnxGraph(model.graph.name, model.producer_name)
        self.constants = {t.name: _tensor(onnx, t) for t in model.graph.initializer}
        self.products: set[str] = set()  # matrix products, whose bias comes with the next node
        self.scale = 1.0

    def read(self) -> OnnxGraph:
        for node in self.nodes:
            attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
            if not self._is_constant(node, attributes):
                self._read(node, attributes)
        return self.graph

    def _is_constant(self, node: Any, attributes: dict[str, Any]) -> bool:
        """Whether the node only gives or reshapes weights; remembers them."""
        inputs = [self.constants.get(name) for name in node.input]
        known = node.op_type in ("Constant", "ConstantOfShape", "Reshape", "Transpose", "Identity")
        if not known or any(value is None for value in inputs):
            return False
        self.constants[node.output[0]] = self._evaluated(node.op_type, inputs, attributes)
        return True

    def _evaluated(self, kind: str, inputs: list[Any], attributes: dict[str, Any]) -> Tensor:
        if kind == "Constant":
            value = next(iter(attributes.values()))
            return _tensor(self.onnx, value) if hasattr(value, "data_type") else torch.as_tensor(value)
        if kind == "ConstantOfShape":
            value = _tensor(self.onnx, attributes["value"]) if "value" in attributes else torch.zeros(1)
            return value.expand(inputs[0].tolist())
        if kind == "Reshape":
            shape = [inputs[0].shape[i] if n == 0 else n for i, n in enumerate(inputs[1].tolist())]
            return inputs[0].reshape(shape)
        if kind == "Transpose":
            return inputs[0].permute(*attributes.get("perm", reversed(range(inputs[0].dim()))))
        return inputs[0]

    def _read(self, node: Any, attributes: dict[str, Any]) -> None:
        readers: dict[str, Callable[[Any, dict[str, Any]], Step]] = {
            "Conv": self._convolution,
            "Gemm": self._gemm,
            "MatMul": self._gemm,
            "BatchNormalization": self._batch_norm,
            "LRN": self._lrn,
            "MaxPool": self._pool,
        }
        if node.op_type in readers:
            try:
                self.graph.steps.append(readers[node.op_type](node, attributes))
            except _Unreadable as problem:
                self.graph.problems.append(f"{node.op_type} {_name(node)}: {problem}")
        elif node.op_type in ARITHMETIC and self._arithmetic(node):
            pass
        elif node.op_type not in PASSED_OVER:
            self.graph.problems.append(f"{node.op_type} {_name(node)}: these networks have no such operator")

    def _arithmetic(self, node: Any) -> bool:
        """A bias, the scale of a dropout, or what is done to the image: whether the node is one of these."""
        value = next((self.constants[name] for name in node.input if name in self.constants), None)
        if value is None:
            return False
        steps = self.graph.steps
        if not steps:
            values = value.flatten() if value.numel() <= 3 else value.float().flatten(-2).mean(-1).flatten()
            self.graph.image_steps.append(f"{ARITHMETIC[node.op_type]} {', '.join(f'{v:g}' for v in values.tolist())}")
        elif node.op_type == "Add" and self.products.intersection(node.input):
            last = steps.pop()
            bias = value.flatten().expand(len(last.tensors["weight"]))
            steps.append(Step(last.kind, last.name, {**last.tensors, "bias": bias}, input_scale=last.input_scale))
        elif node.op_type in ("Mul", "Div") and value.numel() == 1:
            self.scale *= value.item() if node.op_type == "Mul" else 1 / value.item()
        else:
            return False
        return True

    def _constant(self, node: Any, index: int) -> Tensor:
        if node.input[index] not in self.constants:
            raise _Unreadable(f"its input {node.input[index]!r} is not a constant")
        return self.constants[node.input[index]]

    def _tensors(self, node: Any, *names: str) -> dict[str, Tensor]:
        """The constants behind the node's first input, by these names; those left out at the end are not there."""
        return {name: self._constant(node, i) for i, name in enumerate(names[: len(node.input) - 1], 1)}

    def _take_scale(self) -> float:
        scale, self.scale = self.scale, 1.0
        return scale

    def _convolution(self, node: Any, attributes: dict[str, Any]) -> Step:
        tensors = self._tensors(node, "weight", "bias")
        window = _window({"kernel_shape": tensors["weight"].shape[2:], **attributes})
        groups = attributes.get("group", 1)
        return Step("convolution", _name(node), tensors, window, groups, input_scale=self._take_scale())

    def _gemm(self, node: Any, attributes: dict[str, Any]) -> Step:
        weight = self._constant(node, 1)
        if attributes.get("transA"):
            raise _Unreadable("its image is transposed")
        weight = (weight if attributes.get("transB") else weight.t()) * attributes.get("alpha", 1.0)
        tensors = {"weight": weight}
        if len(node.input) > 2:
            tensors["bias"] = self._constant(node, 2).flatten().expand(len(weight)) * attributes.get("beta", 1.0)
        self.products.add(node.output[0])
        return Step("fully connected", _name(node), tensors, input_scale=self._take_scale())

    def _batch_norm(self, node: Any, attributes: dict[str, Any]) -> Step:
        return Step("batch norm", _name(node), self._tensors(node, "weight", "bias", "running_mean", "running_var"))

    def _lrn(self, node: Any, attributes: dict[str, Any]) -> Step:
        size = attributes["size"]
        if size % 2 == 0:
            raise _Unreadable(
                f"its size {size} is even: ONNX then looks one channel further ahead and torch one further back, so "
                "that no layer equals it"
            )
        alpha, beta, k = (_shortest(attributes.get(n, d)) for n, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
        return Step("LRN", _name(node), lrn=LRNParams(size, alpha, beta, k))

    def _pool(self, node: Any, attributes: dict[str, Any]) -> Step:
        return Step("max-pool", _name(node), window=_window(attributes))


class _Unreadable(Exception):
    """A node that has no counterpart in torch."""


def _window(attributes: dict[str, Any]) -> Window:
    auto_pad = attributes.get("auto_pad", b"NOTSET").decode()
    if auto_pad not in ("NOTSET", "VALID"):
        raise _Unreadable(f"auto_pad={auto_pad} is not supported")
    kernel = tuple(attributes["kernel_shape"])
    if len(kernel) != 2:
        raise _Unreadable(f"it has {len(kernel)} dimensions, not 2")
    pads = attributes.get("pads", [0, 0, 0, 0])
    stride, dilation = (pair(attributes.get(name, 1)) for name in ("strides", "dilations"))
    return Window(pair(kernel), stride, pair(pads[:2]), dilation, pair(pads[2:]), bool(attributes.get("ceil_mode")))


def _tensor(onnx: Any, proto: Any) -> Tensor:
    return torch.from_numpy(onnx.numpy_helper.to_array(proto).copy())


def _name(node: Any) -> str:
    """Of its weight, which the published files name after the layer, or else of its output."""
    return node.input[1] if len(node.input) > 1 else node.output[0]


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to this float32: 1e-4 for 9.999999747378752e-05."""
    return float(f"{value:.7g}")
