"""Graphs as ONNX files of plain nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from ..errors import GraphError
from .node import Node, nodes_of
from .read import import_onnx

OPSET, IR_VERSION = 17, 8


def onnx_model(output: Node, name: str, version: str) -> Any:
    """A ``ModelProto`` that computes what a model's graph does, for any number of images.

    Raises:
        GraphError: ONNX has no operator for an operation.
    """
    return _Writer(output).run(name, version)


class _Writer:
    def __init__(self, output: Node) -> None:
        self.onnx, self.output = import_onnx(), output
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.names: dict[Node, str] = {}
        self.taken = {"image", "logits"}

    def run(self, name: str, version: str) -> Any:
        helper, nodes = self.onnx.helper, nodes_of(self.output)
        self.of_module = Counter(node.name for node in nodes)
        for node in nodes:
            if node.kind == "Image":
                self.names[node] = "image"
                continue
            if node.kind not in _WRITERS:
                raise GraphError(f"{node} of the model has no known counterpart in ONNX")
            self.names[node] = "logits" if node is self.output else self._name(node)
            _WRITERS[node.kind](self, node)
        values = [
            helper.make_tensor_value_info(self.names[node], self.onnx.TensorProto.FLOAT, ["batch", *(node.shape or ())])
            for node in (nodes[0], self.output)
        ]
        tensors = [self.onnx.numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, name, values[:1], values[1:], tensors)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="fastcnn",
            producer_version=version,
        )
        self.onnx.checker.check_model(model, full_check=True)
        return model

    def _name(self, node: Node) -> str:
        """That of its module, and where this calls more than one what it is as well."""
        is_alone = node.name and (self.of_module[node.name] == 1 or node.kind in ("Conv", "Gemm"))
        name = base = node.name if is_alone else f"{node.name}_{node.kind.lower()}".lstrip("_")
        count = 1
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name

    def constant(self, node: Node, name: str, value: Tensor | Any = None) -> str:
        """The name of a tensor of the node, which becomes a constant of the graph: the model's where it has one."""
        key = node.keys.get(name, f"{self.names[node]}.{name}")
        array = node.tensors[name] if value is None else value
        if isinstance(array, Tensor):
            array = array.detach().to("cpu", torch.float32).contiguous().numpy()
        self.constants[key] = array
        return key

    def add(self, node: Node, kind: str, *constants: str, **attributes: Any) -> None:
        inputs, output = [*(self.names[before] for before in node.inputs), *constants], self.names[node]
        self._add(kind, inputs, [output], attributes, self._name(node) if node is self.output else output)

    def _add(
        self, kind: str, inputs: list[str], outputs: list[str], attributes: dict[str, Any], name: str = ""
    ) -> None:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, outputs, name or outputs[0], **attributes))

    def weighted(self, node: Node) -> None:
        attributes = {**_window(node), "group": node.settings["groups"]} if node.kind == "Conv" else {"transB": 1}
        if node.kind == "Gemm" and len(node.shape or (0,)) != 1:
            raise GraphError(f"{node} of the model goes over maps; Gemm takes rows")
        self.add(
            node, node.kind, *(self.constant(node, n) for n in ("weight", "bias") if n in node.tensors), **attributes
        )

    def batch_norm(self, node: Node) -> None:
        names = ("weight", "bias", "running_mean", "running_var")
        settings = {name: float(node.settings[name]) for name in ("epsilon", "momentum")}
        self.add(node, node.kind, *(self.constant(node, name) for name in names), **settings)

    def lrn(self, node: Node) -> None:
        lrn = node.settings["lrn"]
        if lrn.size % 2 == 0:
            raise GraphError(
                f"{node} of the model: its size {lrn.size} is even: ONNX's window then lies one channel further ahead"
            )
        attributes = {"size": lrn.size, "alpha": float(lrn.alpha), "beta": float(lrn.beta), "bias": float(lrn.k)}
        if lrn.groups == 1:
            self.add(node, "LRN", **attributes)
            return
        name, before = self.names[node], self.names[node.inputs[0]]
        parts, norms = ([f"{name}.{kind}{i}" for i in range(lrn.groups)] for kind in ("part", "norm"))
        self._add("Split", [before], parts, {"axis": 1})
        for part, norm in zip(parts, norms, strict=True):
            self._add("LRN", [part], [norm], attributes)
        self._add("Concat", norms, [name], {"axis": 1})

    def pooled(self, node: Node) -> None:
        attributes = {**_window(node), "ceil_mode": int(node.window.ceil_mode)}
        if node.kind == "AveragePool":
            attributes["count_include_pad"] = int(node.settings["count_include_pad"])
            del attributes["dilations"]
        self.add(node, node.kind, **attributes)

    def same(self, node: Node) -> None:
        self.add(node, node.kind)

    def combined(self, node: Node) -> None:
        self.add(node, node.kind, *([self.constant(node, "constant")] if len(node.inputs) == 1 else []))

    def clip(self, node: Node) -> None:
        limits = (numpy.array(node.settings[name], "float32") for name in ("min", "max"))
        self.add(node, "Clip", *(self.constant(node, n, v) for n, v in zip(("min", "max"), limits, strict=True)))

    def padded(self, node: Node) -> None:
        begin, end = node.settings["begin"], node.settings["end"]
        pads = self.constant(node, "pads", numpy.array([0, 0, *begin, 0, 0, *end], "int64"))
        value = self.constant(node, "value", numpy.array(node.settings["value"], "float32"))
        self.add(node, "Pad", pads, value)

    def reshaped(self, node: Node) -> None:
        shape = numpy.array([0, *node.settings["shape"]], "int64")
        self.add(node, "Reshape", self.constant(node, "shape", shape))

    def axis(self, node: Node) -> None:
        self.add(node, node.kind, axis=node.settings["axis"] + 1)

    def transposed(self, node: Node) -> None:
        self.add(node, "Transpose", perm=[0, *(i + 1 for i in node.settings["order"])])

    def sliced(self, node: Node) -> None:
        values = {"starts": node.settings["start"], "ends": node.settings["stop"], "axes": 1}
        self.add(node, "Slice", *(self.constant(node, n, numpy.array([v], "int64")) for n, v in values.items()))

    def dropout(self, node: Node) -> None:
        ratio = self.constant(node, "ratio", numpy.array(node.settings["p"], "float32"))
        self.add(node, "Dropout", ratio)


def _window(node: Node) -> dict[str, Any]:
    window = node.window
    return {
        "kernel_shape": window.kernel,
        "strides": window.stride,
        "dilations": window.dilation,
        "pads": [*window.begin, *window.end],
    }


_WRITERS: dict[str, Callable[[_Writer, Node], None]] = {
    "Conv": _Writer.weighted,
    "Gemm": _Writer.weighted,
    "BatchNormalization": _Writer.batch_norm,
    "LRN": _Writer.lrn,
    "MaxPool": _Writer.pooled,
    "AveragePool": _Writer.pooled,
    **dict.fromkeys(("Relu", "GlobalAveragePool", "GlobalMaxPool", "Flatten"), _Writer.same),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _Writer.combined),
    **dict.fromkeys(("Concat", "Softmax", "LogSoftmax"), _Writer.axis),
    "Clip": _Writer.clip,
    "Pad": _Writer.padded,
    "Reshape": _Writer.reshaped,
    "Transpose": _Writer.transposed,
    "Slice": _Writer.sliced,
    "Dropout": _Writer.dropout,
}
