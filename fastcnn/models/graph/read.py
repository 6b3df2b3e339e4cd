"""ONNX files as graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...params import LRNParams
from ..errors import GraphError
from .constants import evaluated, reshaped
from .node import Node, Pair, Window, image, make, pair

OPSETS = range(7, 26)
_BATCH = 1_000_003  # stands for a batch of any size, and the numbers after it for other lengths that are not known


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
    try:
        import onnx
    except ImportError:
        raise ImportError("ONNX files need the package onnx: pip install fastcnn[models]") from None
    model = onnx.load(path, load_external_data=False)
    if not model.graph.node:
        raise GraphError("it holds no graph")
    if not 3 <= model.ir_version <= onnx.IR_VERSION:
        raise GraphError(f"its IR version is {model.ir_version}; supported are 3 to {onnx.IR_VERSION}")
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    opset = opsets.get("", opsets.get("ai.onnx", 0))
    if opset not in OPSETS:
        raise GraphError(f"its opset is {opset}; supported are {OPSETS[0]} to {OPSETS[-1]}")
    _load_external_data(model, path, onnx)
    _check_types(model, onnx)
    return _Reader(model, opset, onnx, size).read()


def _load_external_data(model: Any, path: Path, onnx: Any) -> None:
    folder = path.parent.resolve()
    for tensor in _tensors(model.graph):
        if not onnx.external_data_helper.uses_external_data(tensor):
            continue
        places = {entry.key: entry.value for entry in tensor.external_data}
        file = folder / places.get("location", "")
        if not file.resolve().is_relative_to(folder) or not file.is_file():
            raise GraphError(f"the values of {tensor.name} are in {places.get('location')!r}, no file of its folder")
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


class _Reader:
    """Goes over the nodes in their order, which is one in which they can run."""

    def __init__(self, model: Any, opset: int, onnx: Any, size: int | None) -> None:
        self.size = size
        self.graph, self.producer, self.opset, self.onnx = model.graph, model.producer_name, opset, onnx
        self.constants: dict[str, Any] = {}  # arrays of numpy
        self.values: dict[str, Node] = {}
        self.lengths: list[int] = []  # of the symbols for what is not known

    def read(self) -> OnnxGraph:
        self._check()
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
                raise GraphError(text if _name(node) in text else f"{node.op_type} {_name(node)}: {text}") from None
        (output,) = self.graph.output
        if output.name not in self.values:
            raise GraphError(f"its output {output.name!r} does not depend on the image")
        return OnnxGraph(first, self.values[output.name], self.graph.name, self.producer, batch)

    def _check(self) -> None:
        """Refuse what is not supported, naming all of it."""
        problems = [
            f"{node.op_type} {_name(node)}: no such operator is supported"
            for node in self.graph.node
            if node.domain not in ("", "ai.onnx") or node.op_type not in {**_READERS, **_OF_CONSTANTS}
        ]
        if problems:
            raise GraphError("\n  ".join(problems))
        if self.graph.sparse_initializer:
            raise GraphError("it holds sparse weights, which are not supported")
        constants = {tensor.name for tensor in self.graph.initializer}
        inputs = [value.name for value in self.graph.input if value.name not in constants]
        for what, names in (("inputs", inputs), ("outputs", [value.name for value in self.graph.output])):
            if len(names) != 1:
                raise GraphError(f"it has {len(names)} {what}, not one: {', '.join(names)}")

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
                raise GraphError("it computes of constants only, which is not supported")
            self.constants[node.output[0]] = value
        elif node.op_type == "Shape":
            self.constants[node.output[0]] = self._shape(node, attributes)
        elif node.op_type not in _READERS:
            raise GraphError("it computes of something else than constants, which is not supported")
        elif node.op_type == "Split":
            for name, piece in zip(node.output, self._split(node, attributes), strict=True):
                self.values[name] = piece
        else:
            if any(node.output[1:]) and node.op_type != "Dropout":
                raise GraphError(f"its output {node.output[1]!r} is not supported")
            self.values[node.output[0]] = _READERS[node.op_type](self, node, attributes)

    def _value(self, attribute: Any) -> Any:
        value = self.onnx.helper.get_attribute_value(attribute)
        return self.onnx.numpy_helper.to_array(value) if attribute.HasField("t") else value

    # -- what a node is given -----------------------------------------------------------------------------------------

    def _input(self, node: Any, index: int = 0) -> Node:
        name = node.input[index] if index < len(node.input) else ""
        if name in self.values:
            return self.values[name]
        raise GraphError(f"its input {name!r} must come from the image")

    def _constant(self, node: Any, index: int) -> Any:
        """An array, None if the input is left out."""
        if index >= len(node.input) or not node.input[index]:
            return None
        if node.input[index] not in self.constants:
            raise GraphError(f"its input {node.input[index]!r} is not a constant")
        return self.constants[node.input[index]]

    def _list(self, node: Any, attributes: dict[str, Any], name: str, index: int) -> list[int] | None:
        """An attribute that later opsets have as an input."""
        if name in attributes:
            return list(attributes[name])
        value = self._constant(node, index)
        return None if value is None else [int(n) for n in value.flatten()]

    def _tensor(self, node: Any, index: int) -> Tensor:
        value = self._constant(node, index)
        if value is None:
            raise GraphError(f"its input {index} is missing")
        tensor = torch.from_numpy(value.copy() if not value.flags.writeable else value)
        if tensor.dtype != torch.float32:
            raise GraphError(f"its input {node.input[index]!r} is {tensor.dtype}; only float32 is supported")
        return tensor

    def _tensors(self, node: Any, *names: str) -> dict[str, Tensor]:
        """The constants after the node's first input, by these names; those left out at the end are not there."""
        given = node.input
        return {name: self._tensor(node, i) for i, name in enumerate(names, 1) if i < len(given) and given[i]}

    def _keys(self, node: Any, *names: str) -> dict[str, str]:
        """What the file calls these constants."""
        return {name: node.input[i] for i, name in enumerate(names, 1) if i < len(node.input) and node.input[i]}

    def _axis(self, axis: int, before: Node) -> int:
        """A dimension counted from the batch on, from 0 on in one sample."""
        if axis < 0:
            if before.shape is None:
                raise GraphError(f"which dimension {axis} is cannot be told")
            axis += len(before.shape) + 1
        if axis < 1:
            raise GraphError("what goes across the batch is not supported")
        return axis - 1

    def _shape(self, node: Any, attributes: dict[str, Any]) -> Any:
        import numpy

        before = self._input(node)
        if before.shape is None:
            raise GraphError("the number of dimensions is not known")
        lengths = [self.batch or _BATCH]
        for length in before.shape:
            if length is None:
                self.lengths.append(0)
                length = _BATCH + len(self.lengths)
            lengths.append(length)
        return numpy.array(lengths[attributes.get("start", 0) : attributes.get("end", len(lengths))], "int64")

    # -- the operators ------------------------------------------------------------------------------------------------

    def _conv(self, node: Any, attributes: dict[str, Any]) -> Node:
        tensors, before = self._tensors(node, "weight", "bias"), self._input(node)
        kernel = attributes.setdefault("kernel_shape", list(tensors["weight"].shape[2:]))
        if list(tensors["weight"].shape[2:]) != list(kernel):
            raise GraphError(f"its kernel_shape is {list(kernel)}, its weight {tuple(tensors['weight'].shape)}")
        window = _window(attributes, before, is_pool=False)
        parts = {"tensors": tensors, "keys": self._keys(node, "weight", "bias"), "window": window}
        return make("Conv", before, name=_name(node), **parts, groups=attributes.get("group", 1))

    def _gemm(self, node: Any, attributes: dict[str, Any]) -> Node:
        weight, before = self._tensor(node, 1), self._input(node)
        if _flag(attributes, "transA"):
            raise GraphError("its image is transposed")
        if before.shape is not None and len(before.shape) != 1:
            raise GraphError(f"it takes 2 dimensions, and gets {len(before.shape) + 1}")
        if weight.dim() != 2:
            raise GraphError(f"its weight is no matrix, but of shape {tuple(weight.shape)}")
        weight = weight if _flag(attributes, "transB") else weight.t()
        alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
        tensors = {"weight": weight if alpha == 1 else weight * alpha}
        if self._constant(node, 2) is not None:
            bias = self._tensor(node, 2)
            if bias.numel() not in (1, len(weight)) or (bias.dim() == 2 and len(bias) != 1) or bias.dim() > 2:
                raise GraphError(f"its third input is of shape {tuple(bias.shape)}")
            tensors["bias"] = bias.reshape(-1).expand(len(weight)) * beta
        return make("Gemm", before, name=_name(node), tensors=tensors, keys=self._keys(node, "weight", "bias"))

    def _matmul(self, node: Any, attributes: dict[str, Any]) -> Node:
        weight = self._tensor(node, 1)
        if weight.dim() != 2:
            raise GraphError(f"its weight is no matrix, but of shape {tuple(weight.shape)}")
        parts = {"tensors": {"weight": weight.t()}, "keys": self._keys(node, "weight")}
        return make("Gemm", self._input(node), name=_name(node), **parts)

    def _batch_norm(self, node: Any, attributes: dict[str, Any]) -> Node:
        if _flag(attributes, "training_mode") or not _flag(attributes, "spatial", 1):
            raise GraphError("only batch norm by stored statistics of each channel is supported")
        epsilon = _shortest(attributes.get("epsilon", 1e-5))
        if not 0 <= epsilon < math.inf:
            raise GraphError(f"epsilon={epsilon} makes no sense")
        names = ("weight", "bias", "running_mean", "running_var")
        return make(
            "BatchNormalization",
            self._input(node),
            name=_name(node),
            tensors=self._tensors(node, *names),
            keys=self._keys(node, *names),
            epsilon=epsilon,
            momentum=_shortest(attributes.get("momentum", 0.9)),
        )

    def _lrn(self, node: Any, attributes: dict[str, Any]) -> Node:
        size = attributes["size"]
        if size < 1 or size % 2 == 0:
            raise GraphError(
                f"its size is {size}: an even window looks one channel further ahead in ONNX and one further back in "
                "torch, so that no layer equals it"
            )
        alpha, beta, k = (_shortest(attributes.get(n, d)) for n, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
        if not (0 < alpha < math.inf and 0 < beta < math.inf and math.isfinite(k)):
            raise GraphError(f"alpha={alpha}, beta={beta}, bias={k} make no sense")
        return make("LRN", self._input(node), name=_name(node), lrn=LRNParams(size, alpha, beta, k))

    def _max_pool(self, node: Any, attributes: dict[str, Any]) -> Node:
        before = self._input(node)
        return make("MaxPool", before, name=_name(node), window=_window(attributes, before))

    def _average_pool(self, node: Any, attributes: dict[str, Any]) -> Node:
        before = self._input(node)
        window, include = _window(attributes, before), _flag(attributes, "count_include_pad")
        if window.dilation != (1, 1):
            raise GraphError(f"its dilation is {window.dilation}, which torch's has not")
        return make("AveragePool", before, name=_name(node), window=window, count_include_pad=include)

    def _global_pool(self, node: Any, attributes: dict[str, Any]) -> Node:
        return make(node.op_type, self._input(node), name=_name(node))

    def _mean(self, node: Any, attributes: dict[str, Any]) -> Node:
        before, axes = self._input(node), self._list(node, attributes, "axes", 1)
        if axes is None or before.shape is None or sorted(self._axis(axis, before) for axis in axes) != [1, 2]:
            raise GraphError(f"only the mean of height and width is supported, not that of dimensions {axes}")
        pooled = make("GlobalAveragePool", before, name=_name(node))
        return pooled if _flag(attributes, "keepdims", 1) else make("Flatten", pooled, name=_name(node))

    def _pad(self, node: Any, attributes: dict[str, Any]) -> Node:
        before, pads = self._input(node), self._list(node, attributes, "pads", 1)
        value = attributes.get("value", 0.0) if self.opset < 11 else self._constant(node, 2)
        mode = attributes.get("mode", b"constant")
        if mode != b"constant" or pads is None:
            raise GraphError(f"its mode is {mode.decode()!r}; supported is 'constant'")
        axes = self._list(node, attributes, "axes", 3)
        axes = list(range(len(pads) // 2)) if axes is None else axes
        if len(pads) != 2 * len(axes):
            raise GraphError(f"it has {len(pads)} paddings for {len(axes)} dimensions")
        begin, end = [0, 0, 0, 0], [0, 0, 0, 0]
        for axis, first, last in zip(axes, pads, pads[len(axes) :], strict=False):
            begin[axis], end[axis] = first, last  # axis may be negative, and IndexError is an error too
        if any(begin[:2] + end[:2]) or (before.shape is not None and len(before.shape) != 3):
            raise GraphError("only height and width can be padded")
        value = 0.0 if value is None else float(value)
        return make("Pad", before, name=_name(node), begin=pair(begin[2:]), end=pair(end[2:]), value=value)

    def _dropout(self, node: Any, attributes: dict[str, Any]) -> Node:
        training, ratio = self._constant(node, 2), self._constant(node, 1)
        if training is not None and training.any():
            raise GraphError("it drops values, as in training")
        p = attributes.get("ratio", 0.5) if ratio is None else float(ratio)
        if not 0 <= p <= 1:
            raise GraphError(f"its ratio is {p}, not between 0 and 1")
        return make("Dropout", self._input(node), name=_name(node), p=_shortest(p))

    def _relu(self, node: Any, attributes: dict[str, Any]) -> Node:
        return make("Relu", self._input(node), name=_name(node))

    def _clip(self, node: Any, attributes: dict[str, Any]) -> Node:
        low, high = attributes.get("min"), attributes.get("max")
        if self.opset >= 11:
            low, high = self._constant(node, 1), self._constant(node, 2)
        low, high = (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))
        high = math.inf if high >= torch.finfo(torch.float32).max else high
        if not low < high:
            raise GraphError(f"it leaves nothing between {low} and {high}")
        return make("Clip", self._input(node), name=_name(node), min=low, max=high)

    def _flatten(self, node: Any, attributes: dict[str, Any]) -> Node:
        before, axis = self._input(node), attributes.get("axis", 1)
        if axis < 0 and before.shape is not None:
            axis += len(before.shape) + 1
        if axis != 1:
            raise GraphError(f"its axis is {axis}; supported is 1")
        return make("Flatten", before, name=_name(node))

    def _reshape(self, node: Any, attributes: dict[str, Any]) -> Node:
        before, given = self._input(node), self._list(node, attributes, "shape", 1)
        if given is None:
            raise GraphError("it is given no shape")
        own = None if before.shape is None else [self.batch or _BATCH, *before.shape]
        if _flag(attributes, "allowzero") and 0 in given:
            raise GraphError("an empty output is not supported")
        if 0 in given[1:] and own is None:
            raise GraphError("the number of dimensions is not known")
        batch, *shape = given if own is None else reshaped(given, own, 0)
        if any(n is None or n >= _BATCH for n in shape):
            raise GraphError(f"its shape {given} depends on the size of the image")
        if given[0] == 0 or batch == (self.batch or _BATCH):
            return make("Reshape", before, name=_name(node), shape=tuple(shape))
        if batch == -1 and -1 not in shape:  # the batch, if the rest is one sample
            return make("Reshape", before, name=_name(node), shape=tuple(shape))
        raise GraphError(f"its shape {given} does not leave the batch as it is")

    def _squeeze(self, node: Any, attributes: dict[str, Any]) -> Node:
        before, axes = self._input(node), self._list(node, attributes, "axes", 1)
        if before.shape is None or None in before.shape:
            raise GraphError("the shape of its input is not known")
        if axes is None:
            raise GraphError("it names no dimensions")
        gone = {self._axis(axis, before) for axis in axes}
        if any(i >= len(before.shape) or before.shape[i] != 1 for i in gone):
            raise GraphError(f"{before.shape} has no dimensions {axes} of length 1")
        shape = tuple(n for i, n in enumerate(before.shape) if i not in gone)
        return make("Reshape", before, name=_name(node), shape=shape)

    def _unsqueeze(self, node: Any, attributes: dict[str, Any]) -> Node:
        before, axes = self._input(node), self._list(node, attributes, "axes", 1)
        if before.shape is None or None in before.shape or axes is None:
            raise GraphError("the shape of its input is not known")
        rank = len(before.shape) + 1 + len(axes)
        places = sorted(axis + rank if axis < 0 else axis for axis in axes)
        if len(set(places)) < len(places) or not 1 <= places[0] <= places[-1] < rank:
            raise GraphError(f"it cannot insert dimensions {axes}")
        shape = list(before.shape)
        for place in places:
            shape.insert(place - 1, 1)
        return make("Reshape", before, name=_name(node), shape=tuple(shape))

    def _transpose(self, node: Any, attributes: dict[str, Any]) -> Node:
        order = attributes.get("perm")
        if not order or order[0] != 0:
            raise GraphError("it moves the batch to another dimension")
        return make("Transpose", self._input(node), name=_name(node), order=tuple(i - 1 for i in order[1:]))

    def _concat(self, node: Any, attributes: dict[str, Any]) -> Node:
        inputs = [self._input(node, i) for i in range(len(node.input))]
        return make("Concat", *inputs, name=_name(node), axis=self._axis(attributes["axis"], inputs[0]))

    def _split(self, node: Any, attributes: dict[str, Any]) -> list[Node]:
        before, lengths = self._input(node), self._list(node, attributes, "split", 1)
        if self._axis(attributes.get("axis", 0), before) != 0 or not before.shape or before.shape[0] is None:
            raise GraphError("only a known number of channels can be split")
        channels, parts = before.shape[0], len(node.output)
        if lengths is None:
            if attributes.get("num_outputs", parts) != parts or channels % parts:
                raise GraphError(f"{channels} channels are not to be had from {parts} parts")
            lengths = [channels // parts] * parts
        if sum(lengths) != channels or len(lengths) != parts:
            raise GraphError(f"{channels} channels do not split into {lengths}")
        starts = [sum(lengths[:i]) for i in range(parts)]
        return [
            make("Slice", before, name=_name(node), start=start, stop=start + length)
            for start, length in zip(starts, lengths, strict=True)
        ]

    def _slice(self, node: Any, attributes: dict[str, Any]) -> Node:
        before = self._input(node)
        starts, ends, axes, steps = (
            self._list(node, attributes, name, i) for i, name in enumerate(("starts", "ends", "axes", "steps"), 1)
        )
        channels = before.shape[0] if before.shape else None
        if (
            channels is None
            or axes is None
            or starts is None
            or ends is None
            or len(axes) != 1
            or steps not in (None, [1])
        ):
            raise GraphError("only a range of a known number of channels can be taken")
        if self._axis(axes[0], before) != 0 or len(starts) != 1 or len(ends) != 1:
            raise GraphError("only channels can be taken")
        start, stop, _ = slice(starts[0], ends[0]).indices(channels)
        return make("Slice", before, name=_name(node), start=start, stop=stop)

    def _arithmetic(self, node: Any, attributes: dict[str, Any]) -> Node:
        """Of nodes, or of a node and a constant, which comes second where the order matters."""
        kind, inputs = node.op_type, list(node.input)
        if attributes.get("axis") is not None:
            raise GraphError("its attribute axis is not supported")
        if all(name in self.values for name in inputs):
            total = self._input(node)
            for i in range(1, len(inputs)):
                total = make("Add" if kind == "Sum" else kind, total, self._input(node, i), name=_name(node))
            return total
        place = next(i for i, name in enumerate(inputs) if name in self.values)
        if len(inputs) != 2 or (place == 1 and kind in ("Sub", "Div")):
            raise GraphError("a constant minus or by an output is not supported")
        constant = self._tensor(node, 1 - place)
        parts = {"tensors": {"constant": constant}, "keys": {"constant": inputs[1 - place]}}
        return make("Add" if kind == "Sum" else kind, self._input(node, place), name=_name(node), **parts)

    def _softmax(self, node: Any, attributes: dict[str, Any]) -> Node:
        before, is_old = self._input(node), self.opset < 13
        axis = self._axis(attributes.get("axis", 1 if is_old else -1), before)
        if is_old and (before.shape is None or any(n != 1 for n in before.shape[axis + 1 :])):
            # before opset 13 it went over all that follows too
            raise GraphError("a softmax over several dimensions is not supported")
        return make(node.op_type, before, name=_name(node), axis=axis)

    def _identity(self, node: Any, attributes: dict[str, Any]) -> Node:
        return self._input(node)

    def _cast(self, node: Any, attributes: dict[str, Any]) -> Node:
        if attributes["to"] != self.onnx.TensorProto.FLOAT:
            raise GraphError("only float32 is supported")
        return self._input(node)


_READERS: dict[str, Callable[[_Reader, Any, dict[str, Any]], Any]] = {
    "Conv": _Reader._conv,
    "Gemm": _Reader._gemm,
    "MatMul": _Reader._matmul,
    "BatchNormalization": _Reader._batch_norm,
    "LRN": _Reader._lrn,
    "Relu": _Reader._relu,
    "Clip": _Reader._clip,
    "MaxPool": _Reader._max_pool,
    "AveragePool": _Reader._average_pool,
    "GlobalAveragePool": _Reader._global_pool,
    "GlobalMaxPool": _Reader._global_pool,
    "ReduceMean": _Reader._mean,
    "Pad": _Reader._pad,
    "Dropout": _Reader._dropout,
    "Flatten": _Reader._flatten,
    "Reshape": _Reader._reshape,
    "Squeeze": _Reader._squeeze,
    "Unsqueeze": _Reader._unsqueeze,
    "Transpose": _Reader._transpose,
    "Concat": _Reader._concat,
    "Split": _Reader._split,
    "Slice": _Reader._slice,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Sum"), _Reader._arithmetic),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _Reader._softmax),
    "Identity": _Reader._identity,
    "Cast": _Reader._cast,
}
_OF_CONSTANTS = dict.fromkeys(("Constant", "ConstantOfShape", "Gather", "Shape"))


def _window(attributes: dict[str, Any], before: Node, is_pool: bool = True) -> Window:
    kernel = tuple(attributes["kernel_shape"])
    given = {name: list(attributes.get(name, [1] * len(kernel))) for name in ("strides", "dilations")}
    pads = list(attributes.get("pads", [0] * 2 * len(kernel)))
    if len(kernel) != 2 or len(pads) != 4 or any(len(value) != 2 for value in given.values()):
        raise GraphError(f"its window has {len(kernel)} dimensions, not 2")
    stride, dilation = pair(given["strides"]), pair(given["dilations"])
    auto_pad = attributes.get("auto_pad", b"NOTSET").decode()
    begin, end = pair(pads[:2]), pair(pads[2:])
    if auto_pad != "NOTSET" and ("pads" in attributes or dilation != (1, 1)):
        raise GraphError(f"auto_pad={auto_pad} beside pads or dilations is not supported")
    if auto_pad == "VALID":
        begin = end = (0, 0)
    elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        if is_pool and any(k < s for k, s in zip(kernel, stride, strict=True)):
            raise GraphError(f"auto_pad={auto_pad} of a window that is smaller than its stride is not supported")
        begin, end = _same(pair(kernel), stride, before, auto_pad == "SAME_LOWER")
    elif auto_pad != "NOTSET":
        raise GraphError(f"auto_pad={auto_pad} is not supported")
    return Window(pair(kernel), stride, dilation, begin, end, _flag(attributes, "ceil_mode"))


def _same(kernel: Pair, stride: Pair, before: Node, lower: bool) -> tuple[Pair, Pair]:
    """Padding at the beginning and at the end, so that the map is as large as its input, divided by the stride."""
    begin, end = [], []
    for i in range(2):
        total = kernel[i] - stride[i]
        if stride[i] > 1:
            length = before.shape[1 + i] if before.shape is not None and len(before.shape) == 3 else None
            if length is None:
                raise GraphError("auto_pad with a stride depends on the size of the map, which is not known")
            total = (-(-length // stride[i]) - 1) * stride[i] + kernel[i] - length
        less, more = max(total, 0) // 2, max(total, 0) - max(total, 0) // 2
        begin.append(more if lower else less)
        end.append(less if lower else more)
    return pair(begin), pair(end)


def _flag(attributes: dict[str, Any], name: str, default: int = 0) -> bool:
    """An attribute that is 0 or 1; what others mean depends on who reads them."""
    value = attributes.get(name, default)
    if value not in (0, 1):
        raise GraphError(f"its {name} is {value}, neither 0 nor 1")
    return bool(value)


def _name(node: Any) -> str:
    return node.name or (node.output[0] if node.output else "")


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to this float32: 1e-4 for 9.999999747378752e-05."""
    return float(f"{value:.7g}")
