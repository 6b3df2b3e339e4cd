"""ONNX files as graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import GraphError
from .constants import evaluated
from .node import Node, image
from .operators import BATCH, OF_CONSTANTS, OPERATORS, name_of

OPSETS = range(7, 26)


@dataclass
class OnnxGraph:
    """What a file computes.

    Attributes:
        image, output: its first and its last node.
        name, producer: of the file.
        batch: how many images it takes; None for any number.
    """

    image: Node
    output: Node
    name: str
    producer: str
    batch: int | None


def read_onnx(path: Path, size: int | None = None) -> OnnxGraph:
    """The graph of a file; ``size`` is the height and width of its images where it leaves them open.

    Raises:
        ImportError: the package onnx is not installed.
        GraphError: it does something that is not supported, or makes no sense.
        Exception: the file is not ONNX; whatever the package raises.
    """
    onnx = import_onnx()
    model = onnx.load(path, load_external_data=False)
    if not model.graph.node:
        raise GraphError("it contains no graph")
    if not 3 <= model.ir_version <= onnx.IR_VERSION:
        raise GraphError(f"its IR version is {model.ir_version}; supported are 3 to {onnx.IR_VERSION}")
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    if opset not in OPSETS:
        raise GraphError(f"its opset is {opset}; supported are {OPSETS[0]} to {OPSETS[-1]}")
    _check_support(model.graph)
    _load_external_data(model, path, onnx)
    _check_types(model, onnx)
    return Reader(model, opset, onnx, size).read()


def _check_support(graph: Any) -> None:
    """Refuse what is not supported, naming all of it."""
    problems = [
        f"{node.op_type} {name_of(node)}: no such operator is supported"
        for node in graph.node
        if node.domain not in ("", "ai.onnx") or node.op_type not in {*OPERATORS, *OF_CONSTANTS}
    ]
    if problems:
        raise GraphError("\n".join(problems))
    if graph.sparse_initializer:
        raise GraphError("it contains sparse weights, which are not supported")
    constants = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constants]
    for what, names in (("inputs", inputs), ("outputs", [value.name for value in graph.output])):
        if len(names) != 1:
            raise GraphError(f"it has {len(names)} {what}, not one: {', '.join(names)}")


def import_onnx() -> Any:
    """The package."""
    try:
        import onnx
    except ImportError:
        raise ImportError("ONNX files need the package onnx: pip install fastcnn[models]") from None
    return onnx


def _load_external_data(model: Any, path: Path, onnx: Any) -> None:
    folder = path.parent.resolve()
    for tensor in _tensors(model.graph):
        if not onnx.external_data_helper.uses_external_data(tensor):
            continue
        places = {entry.key: entry.value for entry in tensor.external_data}
        file = folder / places.get("location", "")
        if not file.resolve().is_relative_to(folder) or not file.is_file():
            raise GraphError(
                f"the values of {tensor.name} are in {places.get('location')!r}, which is not a file in its folder"
            )
        start, length = (int(places.get(key, 0)) for key in ("offset", "length"))
        if start < 0 or length < 0 or start + length > file.stat().st_size:
            raise GraphError(f"the values of {tensor.name} lie beyond the end of {places['location']!r}")
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = onnx.TensorProto.DEFAULT


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _check_types(model: Any, onnx: Any) -> None:
    """Raise what the package onnx raises where operators, attributes, types or shapes do not go together."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {opset.domain: opset.version for opset in model.opset_import}
    for node in model.graph.node:
        onnx.checker.check_node(node, context)
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    for part in ("node", "input", "output", "value_info"):
        getattr(light.graph, part).extend(getattr(model.graph, part))
    for tensor in model.graph.initializer:
        is_shape = tensor.data_type == onnx.TensorProto.INT64
        shown = tensor if is_shape else onnx.TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        light.graph.initializer.append(shown)
    onnx.shape_inference.infer_shapes(light, check_type=True, strict_mode=True)


class Reader:
    """Goes over the nodes in their order, which is one in which they can run."""

    def __init__(self, model: Any, opset: int, onnx: Any, size: int | None) -> None:
        self.size = size
        self.graph, self.producer, self.opset, self.onnx = model.graph, model.producer_name, opset, onnx
        self.constants: dict[str, Any] = {}  # arrays of numpy
        self.values: dict[str, Node] = {}
        self.unknown = BATCH  # the last number that stands for a length that is not known

    def read(self) -> OnnxGraph:
        for tensor in self.graph.initializer:
            self.constants[tensor.name] = self.onnx.numpy_helper.to_array(tensor)
        (given,) = (value for value in self.graph.input if value.name not in self.constants)
        batch, shape = self._image(given)
        self.batch, first = batch, image(shape)
        self.values[given.name] = first
        for node in self.graph.node:
            try:
                self._read(node)
            except GraphError as error:
                text = str(error)
                raise GraphError(text if name_of(node) in text else f"{node.op_type} {name_of(node)}: {text}") from None
        (output,) = self.graph.output
        if output.name not in self.values:
            raise GraphError(f"its output {output.name!r} does not depend on the image")
        return OnnxGraph(first, self.values[output.name], self.graph.name, self.producer, batch)

    def _image(self, given: Any) -> tuple[int | None, tuple[int | None, ...] | None]:
        kind = given.type.tensor_type
        if kind.elem_type != self.onnx.TensorProto.FLOAT:
            raise GraphError(f"its input {given.name!r} is not float32")
        if not kind.HasField("shape"):
            return None, None if self.size is None else (None, self.size, self.size)
        dims = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim]
        if not dims or any(d.HasField("dim_value") and d.dim_value == 0 for d in kind.shape.dim):
            raise GraphError(f"its input {given.name!r} has no dimensions, or one of length 0")
        if len(dims) == 4:
            dims[2:] = [self.size if n is None else n for n in dims[2:]]
        return dims[0], tuple(dims[1:])

    def _read(self, node: Any) -> None:
        attributes = {a.name: self._value(a) for a in node.attribute}
        constants = [self.constants.get(name) for name in node.input]
        if all(value is not None or not name for name, value in zip(node.input, constants, strict=True)):
            value = evaluated(node.op_type, constants, attributes)
            if value is None:
                raise GraphError("it takes only constants, which is not supported")
            self.constants[node.output[0]] = value
        elif node.op_type == "Shape":
            self.constants[node.output[0]] = self._shape(node, attributes)
        elif node.op_type not in OPERATORS:
            raise GraphError("it takes more than constants, which is not supported")
        else:
            made = OPERATORS[node.op_type](self, node, attributes)
            made = made if isinstance(made, list) else [made]
            if any(node.output[len(made) :]) and node.op_type != "Dropout":  # whose mask nobody needs
                raise GraphError(f"its output {node.output[len(made)]!r} is not supported")
            self.values.update(zip(node.output, made, strict=False))

    def _value(self, attribute: Any) -> Any:
        value = self.onnx.helper.get_attribute_value(attribute)
        return self.onnx.numpy_helper.to_array(value) if attribute.HasField("t") else value

    # -- what a node is given -----------------------------------------------------------------------------------------

    def input(self, node: Any, index: int = 0) -> Node:
        name = node.input[index] if index < len(node.input) else ""
        if name in self.values:
            return self.values[name]
        raise GraphError(f"its input {name!r} must come from the image")

    def constant(self, node: Any, index: int) -> Any:
        """An array, None if the input is left out."""
        if index >= len(node.input) or not node.input[index]:
            return None
        if node.input[index] not in self.constants:
            raise GraphError(f"its input {node.input[index]!r} is not a constant")
        return self.constants[node.input[index]]

    def ints(self, node: Any, attributes: dict[str, Any], name: str, index: int) -> list[int] | None:
        """An attribute that later opsets have as an input."""
        if name in attributes:
            return list(attributes[name])
        value = self.constant(node, index)
        return None if value is None else [int(n) for n in value.flatten()]

    def tensor(self, node: Any, index: int) -> Tensor:
        value = self.constant(node, index)
        if value is None:
            raise GraphError(f"its input {index} is missing")
        tensor = torch.from_numpy(value.copy())  # no two nodes share memory
        if tensor.dtype != torch.float32:
            raise GraphError(f"its input {node.input[index]!r} is {tensor.dtype}; only float32 is supported")
        return tensor

    def tensors(self, node: Any, *names: str) -> dict[str, Tensor]:
        """The constants after the node's first input, by these names; those left out at the end are not there."""
        given = node.input
        return {name: self.tensor(node, i) for i, name in enumerate(names, 1) if i < len(given) and given[i]}

    def keys(self, node: Any, *names: str) -> dict[str, str]:
        """What the file calls these constants."""
        return {name: node.input[i] for i, name in enumerate(names, 1) if i < len(node.input) and node.input[i]}

    def axis(self, axis: int, before: Node) -> int:
        """A dimension counted from the batch on, from 0 on in one sample."""
        if axis < 0:
            if before.shape is None:
                raise GraphError(f"its axis is {axis}, and its number of dimensions is not known")
            axis += len(before.shape) + 1
        if axis < 1:
            raise GraphError("operations across the batch are not supported")
        return axis - 1

    def _shape(self, node: Any, attributes: dict[str, Any]) -> Any:
        import numpy

        before = self.input(node)
        if before.shape is None:
            raise GraphError("the number of dimensions is not known")
        lengths = [self.batch or BATCH]
        for length in before.shape:
            if length is None:
                self.unknown += 1
                length = self.unknown
            lengths.append(length)
        return numpy.array(lengths[attributes.get("start", 0) : attributes.get("end", len(lengths))], "int64")
