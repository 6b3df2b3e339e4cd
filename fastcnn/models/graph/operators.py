"""The operators of ONNX as nodes: each takes the reader, the node of the file, and its attributes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...params import LRNParams
from ..errors import GraphError
from .constants import reshaped
from .make import make
from .node import Node, Pair, Window, pair

if TYPE_CHECKING:
    from .read import Reader

BATCH = 1_000_003  # stands for a batch of any size, and the numbers after it for other lengths that are not known


def _conv(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    tensors, before = r.tensors(node, "weight", "bias"), r.input(node)
    kernel = attributes.setdefault("kernel_shape", list(tensors["weight"].shape[2:]))
    if list(tensors["weight"].shape[2:]) != list(kernel):
        raise GraphError(f"its kernel_shape is {list(kernel)}, its weight {tuple(tensors['weight'].shape)}")
    window = _window(attributes, before, is_pool=False)
    parts = {"tensors": tensors, "keys": r.keys(node, "weight", "bias"), "window": window}
    return make("Conv", before, name=name_of(node), **parts, groups=attributes.get("group", 1))


def _gemm(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    weight, before = r.tensor(node, 1), r.input(node)
    if _flag(attributes, "transA"):
        raise GraphError("its image is transposed")
    if before.shape is not None and len(before.shape) != 1:
        raise GraphError(f"it takes 2 dimensions, and gets {len(before.shape) + 1}")
    if weight.dim() != 2:
        raise GraphError(f"its weight is not a matrix, but has shape {tuple(weight.shape)}")
    weight = weight if _flag(attributes, "transB") else weight.t()
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    tensors = {"weight": weight if alpha == 1 else weight * alpha}
    if r.constant(node, 2) is not None:
        bias = r.tensor(node, 2)
        if bias.numel() not in (1, len(weight)) or (bias.dim() == 2 and len(bias) != 1) or bias.dim() > 2:
            raise GraphError(f"its bias has shape {tuple(bias.shape)}")
        tensors["bias"] = bias.reshape(-1).expand(len(weight)) * beta
    return make("Gemm", before, name=name_of(node), tensors=tensors, keys=r.keys(node, "weight", "bias"))


def _matmul(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    weight = r.tensor(node, 1)
    if weight.dim() != 2:
        raise GraphError(f"its weight is not a matrix, but has shape {tuple(weight.shape)}")
    parts = {"tensors": {"weight": weight.t()}, "keys": r.keys(node, "weight")}
    return make("Gemm", r.input(node), name=name_of(node), **parts)


def _batch_norm(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    if _flag(attributes, "training_mode") or not _flag(attributes, "spatial", 1):
        raise GraphError("only batch norm by stored statistics of each channel is supported")
    epsilon = _shortest(attributes.get("epsilon", 1e-5))
    if not 0 <= epsilon < math.inf:
        raise GraphError(f"its epsilon is {epsilon}")
    names = ("weight", "bias", "running_mean", "running_var")
    return make(
        "BatchNormalization",
        r.input(node),
        name=name_of(node),
        tensors=r.tensors(node, *names),
        keys=r.keys(node, *names),
        epsilon=epsilon,
        momentum=_shortest(attributes.get("momentum", 0.9)),
    )


def _lrn(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    size = attributes["size"]
    if size < 1 or size % 2 == 0:
        raise GraphError(
            f"its size is {size}: an even window looks one channel further ahead in ONNX and one further back in "
            "torch, so that no layer equals it"
        )
    alpha, beta, k = (_shortest(attributes.get(n, d)) for n, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    # with a larger alpha, onnxruntime gives NaN: it slides the window by adding and subtracting, which cancels
    if not (0 < alpha <= 1e6 and 0 < beta <= 1e3 and math.isfinite(k)):
        raise GraphError(f"alpha={alpha}, beta={beta} or bias={k} is out of range")
    return make("LRN", r.input(node), name=name_of(node), lrn=LRNParams(size, alpha, beta, k))


def _max_pool(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    before = r.input(node)
    return make("MaxPool", before, name=name_of(node), window=_window(attributes, before))


def _average_pool(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    before = r.input(node)
    window, include = _window(attributes, before), _flag(attributes, "count_include_pad")
    if window.dilation != (1, 1):
        raise GraphError(f"its dilation is {window.dilation}; torch's average pool has none")
    return make("AveragePool", before, name=name_of(node), window=window, count_include_pad=include)


def _global_pool(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    return make(node.op_type, r.input(node), name=name_of(node))


def _mean(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    before, axes = r.input(node), r.ints(node, attributes, "axes", 1)
    if axes is None or before.shape is None or sorted(r.axis(axis, before) for axis in axes) != [1, 2]:
        raise GraphError(f"only the mean of height and width is supported, not that of dimensions {axes}")
    pooled = make("GlobalAveragePool", before, name=name_of(node))
    return pooled if _flag(attributes, "keepdims", 1) else make("Flatten", pooled, name=name_of(node))


def _pad(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    before, pads = r.input(node), r.ints(node, attributes, "pads", 1)
    value = attributes.get("value", 0.0) if r.opset < 11 else r.constant(node, 2)
    mode = attributes.get("mode", b"constant")
    if mode != b"constant" or pads is None:
        raise GraphError(f"its mode is {mode.decode()!r}; supported is 'constant'")
    axes = r.ints(node, attributes, "axes", 3)
    axes = list(range(len(pads) // 2)) if axes is None else axes
    if len(pads) != 2 * len(axes):
        raise GraphError(f"it has {len(pads)} paddings for {len(axes)} dimensions")
    begin, end = [0, 0, 0, 0], [0, 0, 0, 0]
    for axis, first, last in zip(axes, pads, pads[len(axes) :], strict=False):
        begin[axis], end[axis] = first, last  # axis may be negative, and IndexError is an error too
    if any(begin[:2] + end[:2]) or (before.shape is not None and len(before.shape) != 3):
        raise GraphError("only height and width can be padded")
    value = 0.0 if value is None else float(value)
    return make("Pad", before, name=name_of(node), begin=pair(begin[2:]), end=pair(end[2:]), value=value)


def _dropout(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    training, ratio = r.constant(node, 2), r.constant(node, 1)
    if training is not None and training.any():
        raise GraphError("it drops values, as in training")
    p = attributes.get("ratio", 0.5) if ratio is None else float(ratio)
    if not 0 <= p <= 1:
        raise GraphError(f"its ratio is {p}, not between 0 and 1")
    return make("Dropout", r.input(node), name=name_of(node), p=_shortest(p))


def _relu(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    return make("Relu", r.input(node), name=name_of(node))


def _clip(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    low, high = attributes.get("min"), attributes.get("max")
    if r.opset >= 11:
        low, high = r.constant(node, 1), r.constant(node, 2)
    low, high = (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))
    high = math.inf if high >= torch.finfo(torch.float32).max else high
    if not low < high:
        raise GraphError(f"its minimum {low} is not below its maximum {high}")
    return make("Clip", r.input(node), name=name_of(node), min=low, max=high)


def _flatten(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    before, axis = r.input(node), attributes.get("axis", 1)
    if axis < 0 and before.shape is not None:
        axis += len(before.shape) + 1
    if axis != 1:
        raise GraphError(f"its axis is {axis}; supported is 1")
    return make("Flatten", before, name=name_of(node))


def _reshape(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    before, given = r.input(node), r.ints(node, attributes, "shape", 1)
    if given is None:
        raise GraphError("it is given no shape")
    own = None if before.shape is None else [r.batch or BATCH, *before.shape]
    if _flag(attributes, "allowzero") and 0 in given:
        raise GraphError("an empty output is not supported")
    if 0 in given[1:] and own is None:
        raise GraphError("the number of dimensions is not known")
    batch, *shape = given if own is None else reshaped(given, own, 0)
    if any(n is None or n >= BATCH for n in shape):
        raise GraphError(f"its shape {given} depends on the size of the image")
    if given[0] == 0 or batch == (r.batch or BATCH):
        return make("Reshape", before, name=name_of(node), shape=tuple(shape))
    if batch == -1 and -1 not in shape:  # the batch, if the rest is one sample
        return make("Reshape", before, name=name_of(node), shape=tuple(shape))
    raise GraphError(f"its shape {given} does not leave the batch as it is")


def _squeeze(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    before, axes = r.input(node), r.ints(node, attributes, "axes", 1)
    if before.shape is None or None in before.shape:
        raise GraphError("the shape of its input is not known")
    if axes is None:
        raise GraphError("it names no dimensions")
    gone = {r.axis(axis, before) for axis in axes}
    if any(i >= len(before.shape) or before.shape[i] != 1 for i in gone):
        raise GraphError(f"{before.shape} has no dimensions {axes} of length 1")
    shape = tuple(n for i, n in enumerate(before.shape) if i not in gone)
    return make("Reshape", before, name=name_of(node), shape=shape)


def _unsqueeze(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    before, axes = r.input(node), r.ints(node, attributes, "axes", 1)
    if before.shape is None or None in before.shape or axes is None:
        raise GraphError("the shape of its input is not known")
    rank = len(before.shape) + 1 + len(axes)
    places = sorted(axis + rank if axis < 0 else axis for axis in axes)
    if len(set(places)) < len(places) or not 1 <= places[0] <= places[-1] < rank:
        raise GraphError(f"it cannot insert dimensions {axes}")
    shape = list(before.shape)
    for place in places:
        shape.insert(place - 1, 1)
    return make("Reshape", before, name=name_of(node), shape=tuple(shape))


def _transpose(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    order = attributes.get("perm")
    if not order or order[0] != 0:
        raise GraphError("it moves the batch to another dimension")
    return make("Transpose", r.input(node), name=name_of(node), order=tuple(i - 1 for i in order[1:]))


def _concat(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    inputs = [r.input(node, i) for i in range(len(node.input))]
    return make("Concat", *inputs, name=name_of(node), axis=r.axis(attributes["axis"], inputs[0]))


def _split(r: Reader, node: Any, attributes: dict[str, Any]) -> list[Node]:
    before, lengths = r.input(node), r.ints(node, attributes, "split", 1)
    if r.axis(attributes.get("axis", 0), before) != 0 or not before.shape or before.shape[0] is None:
        raise GraphError("only a known number of channels can be split")
    channels, parts = before.shape[0], len(node.output)
    if lengths is None:
        if attributes.get("num_outputs", parts) != parts or channels % parts:
            raise GraphError(f"{channels} channels cannot be split into {parts} equal parts")
        lengths = [channels // parts] * parts
    if sum(lengths) != channels or len(lengths) != parts:
        raise GraphError(f"{channels} channels do not split into {lengths}")
    starts = [sum(lengths[:i]) for i in range(parts)]
    return [
        make("Slice", before, name=name_of(node), start=start, stop=start + length)
        for start, length in zip(starts, lengths, strict=True)
    ]


def _slice(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    before = r.input(node)
    starts, ends, axes, steps = (
        r.ints(node, attributes, name, i) for i, name in enumerate(("starts", "ends", "axes", "steps"), 1)
    )
    channels = before.shape[0] if before.shape else None
    if channels is None or axes is None or starts is None or ends is None or len(axes) != 1 or steps not in (None, [1]):
        raise GraphError("only a range of a known number of channels can be taken")
    if r.axis(axes[0], before) != 0 or len(starts) != 1 or len(ends) != 1:
        raise GraphError("only channels can be taken")
    start, stop, _ = slice(starts[0], ends[0]).indices(channels)
    return make("Slice", before, name=name_of(node), start=start, stop=stop)


def _arithmetic(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    """Of nodes, or of a node and a constant, which comes second where the order matters."""
    kind, inputs = node.op_type, list(node.input)
    if attributes.get("axis") is not None:
        raise GraphError("its attribute axis is not supported")
    if all(name in r.values for name in inputs):
        total = r.input(node)
        for i in range(1, len(inputs)):
            total = make("Add" if kind == "Sum" else kind, total, r.input(node, i), name=name_of(node))
        return total
    place = next(i for i, name in enumerate(inputs) if name in r.values)
    if len(inputs) != 2 or (place == 1 and kind in ("Sub", "Div")):
        raise GraphError("a constant minus an output, or divided by one, is not supported")
    constant = r.tensor(node, 1 - place)
    parts = {"tensors": {"constant": constant}, "keys": {"constant": inputs[1 - place]}}
    return make("Add" if kind == "Sum" else kind, r.input(node, place), name=name_of(node), **parts)


def _softmax(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    before, is_old = r.input(node), r.opset < 13
    axis = r.axis(attributes.get("axis", 1 if is_old else -1), before)
    if is_old and (before.shape is None or any(n != 1 for n in before.shape[axis + 1 :])):
        # before opset 13 it went over all that follows too
        raise GraphError("a softmax over several dimensions is not supported")
    return make(node.op_type, before, name=name_of(node), axis=axis)


def _identity(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    return r.input(node)


def _cast(r: Reader, node: Any, attributes: dict[str, Any]) -> Node:
    if attributes["to"] != r.onnx.TensorProto.FLOAT:
        raise GraphError("only float32 is supported")
    return r.input(node)


OPERATORS: dict[str, Callable[[Reader, Any, dict[str, Any]], Any]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "LRN": _lrn,
    "Relu": _relu,
    "Clip": _clip,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "ReduceMean": _mean,
    "Pad": _pad,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Sum"), _arithmetic),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    "Identity": _identity,
    "Cast": _cast,
}
# These only compute constants here.
OF_CONSTANTS = ("Constant", "ConstantOfShape", "Gather", "Shape")


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


def name_of(node: Any) -> str:
    return node.name or (node.output[0] if node.output else "")


def _shortest(value: float) -> float:
    """The shortest decimal that rounds to this float32: 1e-4 for 9.999999747378752e-05."""
    return float(f"{value:.7g}")
