"""What the functions that a model calls are as nodes: each takes the recorder and the arguments of torch's function.

One that meets arguments it does not know raises; the call then becomes a node of a kind that no file has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...functional import local_response_norm
from ...params import LRNParams, PoolParams
from .make import make
from .node import Node, Window, pair

if TYPE_CHECKING:
    from .trace import Recorder

Function = Callable[..., Any]

# By name: those whose output is computed, and new; and those that only rearrange, which run on the meta device.
COMPUTED: dict[str, Function] = {}
REARRANGED: dict[str, Function] = {}
# Those that leave a constant a constant.
OF_CONSTANTS = ("view", "reshape", "flatten", "squeeze", "unsqueeze", "getitem", "contiguous", "detach")


def computed(*names: str) -> Callable[[Function], Function]:
    return lambda function: COMPUTED.update(dict.fromkeys(names, function)) or function


def rearranged(*names: str) -> Callable[[Function], Function]:
    """Decorate one that takes the output of the call after the recorder."""
    return lambda function: REARRANGED.update(dict.fromkeys(names, function)) or function


# -- layers -----------------------------------------------------------------------------------------------------------


@computed("conv2d")
def _conv2d(
    r: Recorder,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Node:
    kernel, stride, dilation = pair(weight.shape[2:]), pair(stride), pair(dilation)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        begin, end = pair([t // 2 for t in total]), pair([t - t // 2 for t in total])
    else:
        begin = end = (0, 0) if padding == "valid" else pair(padding)
    window = Window(kernel, stride, dilation, begin, end)
    return r.make("Conv", input, tensors={"weight": weight, "bias": bias}, window=window, groups=groups)


@computed("linear")
def _linear(r: Recorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Node:
    return r.make("Gemm", input, tensors={"weight": weight, "bias": bias})


@computed("batch_norm")
def _batch_norm(
    r: Recorder,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Node:
    if training:
        raise TypeError("it normalizes by the batch")
    tensors = {
        "weight": _constant([1.0] * len(running_mean)) if weight is None else weight,
        "bias": _constant([0.0] * len(running_mean)) if bias is None else bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    return r.make("BatchNormalization", input, tensors=tensors, epsilon=eps, momentum=1 - (momentum or 0.0))


@computed("local_response_norm")
def _local_response_norm(
    r: Recorder, input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, groups: int = 1
) -> Node:
    return r.make("LRN", input, lrn=LRNParams(size, alpha, beta, k, groups))


@computed("relu")
def _relu(r: Recorder, input: Tensor, inplace: bool = False) -> Node:
    r.is_in_place |= inplace
    return r.make("Relu", input)


@computed("clamp", "clip")
def _clamp(r: Recorder, input: Tensor, min: float | None = None, max: float | None = None) -> Node:
    low, high = (-math.inf if min is None else float(min)), (math.inf if max is None else float(max))
    return r.make("Clip", input, min=low, max=high)


@computed("hardtanh")
def _hardtanh(r: Recorder, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Node:
    r.is_in_place |= inplace
    return _clamp(r, input, min_val, max_val)


@computed("relu6")
def _relu6(r: Recorder, input: Tensor, inplace: bool = False) -> Node:
    return _hardtanh(r, input, 0.0, 6.0, inplace)


@computed("dropout", "dropout2d", "feature_dropout")
def _dropout(r: Recorder, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Node:
    if training:
        raise TypeError("it drops values")
    r.is_in_place |= inplace
    return r.make("Dropout", input, p=p)


@computed("softmax")
def _softmax(r: Recorder, input: Tensor, dim: int, _stacklevel: int = 3, dtype: Any = None) -> Node:
    return _along(r, "Softmax", input, dim, dtype)


@computed("log_softmax")
def _log_softmax(r: Recorder, input: Tensor, dim: int, _stacklevel: int = 3, dtype: Any = None) -> Node:
    return _along(r, "LogSoftmax", input, dim, dtype)


def _along(r: Recorder, kind: str, input: Tensor, dim: int, dtype: Any) -> Node:
    if dtype not in (None, input.dtype):
        raise TypeError("it changes the dtype")
    return r.make(kind, input, axis=dim % input.dim() - 1)


# -- pools ------------------------------------------------------------------------------------------------------------


@computed("max_pool2d")
def _max_pool2d(
    r: Recorder,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Node:
    if return_indices:
        raise TypeError("it gives indices")
    *lengths, ceil_mode = PoolParams(kernel_size, stride, padding, dilation, ceil_mode).op_args()
    kernel, stride, padding, dilation = map(pair, lengths)
    return r.make("MaxPool", input, window=Window(kernel, stride, dilation, padding, padding, ceil_mode))


@computed("avg_pool2d")
def _avg_pool2d(
    r: Recorder,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: None = None,
) -> Node:
    if divisor_override is not None:
        raise TypeError("it divides by something else")
    kernel, begin = pair(kernel_size), pair(padding)
    window = Window(kernel, pair(stride or kernel), (1, 1), begin, begin, ceil_mode)
    return r.make("AveragePool", input, window=window, count_include_pad=count_include_pad)


@computed("adaptive_avg_pool2d")
def _adaptive_avg_pool2d(r: Recorder, input: Tensor, output_size: Any) -> Node:
    return r.make("AdaptiveAveragePool", input, size=pair(output_size))


@computed("adaptive_max_pool2d")
def _adaptive_max_pool2d(r: Recorder, input: Tensor, output_size: Any, return_indices: bool = False) -> Node:
    if return_indices or pair(output_size) != (1, 1):
        raise TypeError("only the maximum of the whole map is known")
    return r.make("GlobalMaxPool", input)


@computed("mean")
def _mean(r: Recorder, input: Tensor, dim: Sequence[int], keepdim: bool = False) -> Node:
    if input.dim() != 4 or sorted(d % 4 for d in dim) != [2, 3]:
        raise TypeError("only the mean of height and width is known")
    pooled = r.make("GlobalAveragePool", input)
    if keepdim:
        return pooled
    r.output_shape = r.output_shape[:1]
    return make("Flatten", pooled, name=r.path(), module=r.module())


@computed("pad")
def _pad(r: Recorder, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Node:
    if mode != "constant" or len(pad) > 4:
        raise TypeError("only height and width can be padded")
    left, right, top, bottom = (*pad, 0, 0)[:4]
    return r.make("Pad", input, begin=(top, left), end=(bottom, right), value=value or 0.0)


# -- arithmetic -------------------------------------------------------------------------------------------------------


@computed("add", "iadd", "radd")
def _add(r: Recorder, input: Any, other: Any) -> Node:
    return _combined(r, "Add", input, other)


@computed("sub", "isub", "subtract")
def _sub(r: Recorder, input: Any, other: Any) -> Node:
    return _combined(r, "Sub", input, other)


@computed("mul", "imul", "rmul", "multiply")
def _mul(r: Recorder, input: Any, other: Any) -> Node:
    return _combined(r, "Mul", input, other)


@computed("div", "idiv", "divide", "truediv", "itruediv", "true_divide")
def _div(r: Recorder, input: Any, other: Any) -> Node:
    return _combined(r, "Div", input, other)


def _constant(value: float | list[float]) -> Tensor:
    """Whatever the default dtype and device are."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _combined(r: Recorder, kind: str, a: Any, b: Any) -> Node:
    if r.depends_on_image(a) and r.depends_on_image(b):
        return r.make(kind, a, b)
    if r.depends_on_image(b):
        if kind not in ("Add", "Mul"):
            raise TypeError("the constant comes first")
        a, b = b, a
    return r.make(kind, a, tensors={"constant": b if isinstance(b, Tensor) else _constant(float(b))})


@computed("cat", "concat", "concatenate")
def _cat(r: Recorder, tensors: Sequence[Tensor], dim: int = 0) -> Node:
    axis = dim % tensors[0].dim() - 1
    if axis < 0:
        raise TypeError("it joins batches")
    return r.make("Concat", *tensors, axis=axis)


# -- what moves values ------------------------------------------------------------------------------------------------


@rearranged("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten")
def _reshape(r: Recorder, output: Tensor, input: Tensor, *shape: Any, **others: Any) -> Node:
    if len(output) != len(input) or output.dtype != input.dtype:
        raise TypeError("the batch becomes another, or the dtype")
    if r.is_fixed or not r.has_open_shape(input):
        return r.make("Reshape", input, shape=tuple(output.shape[1:]))
    if output.dim() != 2:
        raise TypeError("the shape depends on the size of the image")
    return r.make("Flatten", input)


@rearranged("permute")
def _permute(r: Recorder, output: Tensor, input: Tensor, *dims: Any) -> Node:
    order = [d % input.dim() for d in (dims[0] if isinstance(dims[0], tuple | list) else dims)]
    if order[0] != 0:
        raise TypeError("the batch moves")
    return r.make("Transpose", input, order=tuple(d - 1 for d in order[1:]))


@rearranged("transpose")
def _transpose(r: Recorder, output: Tensor, input: Tensor, dim0: int, dim1: int) -> Node:
    order = list(range(input.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(r, output, input, order)


@rearranged("split", "chunk")
def _split(r: Recorder, output: Sequence[Tensor], input: Tensor, size: Any, dim: int = 0) -> list[Node]:
    if dim % input.dim() != 1:
        raise TypeError("only channels can be split")
    ends = [sum(part.shape[1] for part in output[: i + 1]) for i in range(len(output))]
    return [r.make("Slice", input, start=end - part.shape[1], stop=end) for part, end in zip(output, ends, strict=True)]


@rearranged("getitem")
def _getitem(r: Recorder, output: Tensor, input: Tensor, index: tuple[slice, slice]) -> Node:
    whole, channels = index
    start, stop, step = channels.indices(input.shape[1])
    if whole != slice(None) or step != 1:
        raise TypeError("only a range of channels can be taken")
    return r.make("Slice", input, start=start, stop=stop)


@rearranged("contiguous", "clone", "detach", "to", "float", "double", "half", "requires_grad")
def _same(r: Recorder, output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Node | None:
    """Only how the values are stored."""
    return r.node(input) if output.dtype == input.dtype and output.shape == input.shape else None


# -- our own functions are what they consist of -----------------------------------------------------------------------


def _stage(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any, **tail: Any) -> Tensor:
    return _tail(torch.conv2d(x, weight, bias, *arguments), **tail)


def _conv2d_relu(*args: Any, **kwargs: Any) -> Tensor:
    return torch.relu(torch.conv2d(*args, **kwargs))


def _tail(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    lrn: LRNParams | None = None,
    pool: PoolParams | None = None,
) -> Tensor:
    y = input if bias is None else input + bias.view(1, -1, 1, 1)
    y = torch.relu(y) if relu else y
    if lrn is not None:
        y = local_response_norm(y, lrn.size, lrn.alpha, lrn.beta, lrn.k, groups=lrn.groups)
    return y if pool is None else F.max_pool2d(y, *pool.op_args())


OURS: dict[str, Callable[..., Tensor]] = {
    "run_stage": _stage,
    "conv2d_relu": _conv2d_relu,
    "relu_lrn_max_pool2d": _tail,
}
