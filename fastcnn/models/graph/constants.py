"""What an ONNX graph computes from constants and shapes alone, as arrays of numpy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from ..errors import GraphError

Array = Any  # numpy.ndarray
_MOST = 1 << 29  # elements of a constant that is made from nothing but its shape


def _given(inputs: Sequence[Array], attributes: dict[str, Any], name: str, index: int, default: Any = None) -> Any:
    """An attribute that later opsets have as an input."""
    if name in attributes:
        return attributes[name]
    return inputs[index].tolist() if len(inputs) > index and inputs[index] is not None else default


def _constant(inputs: Sequence[Array], attributes: dict[str, Any]) -> Array:
    for name, dtype in (("value", None), ("value_float", "float32"), ("value_floats", "float32")):
        if name in attributes:
            return numpy.asarray(attributes[name], dtype)
    for name in ("value_int", "value_ints"):
        if name in attributes:
            return numpy.asarray(attributes[name], "int64")
    raise GraphError(f"constants given as {', '.join(attributes)} are not supported")


def _filled(inputs: Sequence[Array], attributes: dict[str, Any]) -> Array:
    shape = inputs[0].tolist()
    if any(n < 0 for n in shape) or math.prod(shape) > _MOST:
        raise GraphError(f"a constant of shape {shape} is not supported")
    value = attributes.get("value", numpy.zeros(1, "float32"))
    return numpy.broadcast_to(value.reshape(()), shape)


def reshaped(shape: Sequence[int], before: Sequence[Any], allow_zero: int) -> list[Any]:
    """The shape that ``Reshape`` is told to make, where 0 stands for the length that is there."""
    if any(n == 0 and i >= len(before) for i, n in enumerate(shape)) and not allow_zero:
        raise GraphError(f"a shape of {list(before)} cannot become {list(shape)}")
    return [before[i] if n == 0 and not allow_zero else n for i, n in enumerate(shape)]


def _reshape(inputs: Sequence[Array], attributes: dict[str, Any]) -> Array:
    shape = reshaped(inputs[1].tolist(), inputs[0].shape, attributes.get("allowzero", 0))
    return inputs[0].reshape(shape)


def _squeeze(inputs: Sequence[Array], attributes: dict[str, Any]) -> Array:
    axes = _given(inputs, attributes, "axes", 1)
    return numpy.squeeze(inputs[0], None if axes is None else tuple(axes))


def _unsqueeze(inputs: Sequence[Array], attributes: dict[str, Any]) -> Array:
    return numpy.expand_dims(inputs[0], tuple(_given(inputs, attributes, "axes", 1)))


def _slice(inputs: Sequence[Array], attributes: dict[str, Any]) -> Array:
    starts, ends = (_given(inputs, attributes, name, i) for i, name in enumerate(("starts", "ends"), 1))
    axes = _given(inputs, attributes, "axes", 3, list(range(len(starts))))
    steps = _given(inputs, {}, "steps", 4, [1] * len(starts))
    index = [slice(None)] * inputs[0].ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 1:
            raise GraphError("slices backwards are not supported")
        index[axis] = slice(start, end, step)
    return inputs[0][tuple(index)]


def _cast(inputs: Sequence[Array], attributes: dict[str, Any]) -> Array:
    from onnx import TensorProto

    known = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.INT32: "int32"}
    if attributes["to"] not in known:
        raise GraphError(f"a cast to type {attributes['to']} is not supported")
    return inputs[0].astype(known[attributes["to"]])


def _divided(inputs: Sequence[Array], attributes: dict[str, Any]) -> Array:
    a, b = inputs
    if numpy.issubdtype(a.dtype, numpy.floating):
        return a / b
    if (b == 0).any() or (a < 0).any() or (b < 0).any():  # ONNX rounds to zero and numpy does not
        raise GraphError("a division of these integers is not supported")
    return a // b


_FUNCTIONS: dict[str, Callable[[Sequence[Array], dict[str, Any]], Array]] = {
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Identity": lambda inputs, attributes: inputs[0],
    "Reshape": _reshape,
    "Transpose": lambda inputs, attributes: inputs[0].transpose(attributes.get("perm")),
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": lambda inputs, attributes: numpy.concatenate(inputs, attributes["axis"]),
    "Gather": lambda inputs, attributes: numpy.take(inputs[0], inputs[1], attributes.get("axis", 0)),
    "Slice": _slice,
    "Cast": _cast,
    "Add": lambda inputs, attributes: inputs[0] + inputs[1],
    "Sub": lambda inputs, attributes: inputs[0] - inputs[1],
    "Mul": lambda inputs, attributes: inputs[0] * inputs[1],
    "Div": _divided,
}


def evaluated(kind: str, inputs: Sequence[Array], attributes: dict[str, Any]) -> Array | None:
    """What a node computes of constants; None if it is not known here.

    Raises:
        GraphError: it cannot compute it.
    """
    if kind not in _FUNCTIONS:
        return None
    try:
        return _FUNCTIONS[kind](inputs, attributes)
    except GraphError:
        raise
    except Exception as error:  # whatever numpy raises for what does not fit
        raise GraphError(str(error).partition("\n")[0] or type(error).__name__) from None
