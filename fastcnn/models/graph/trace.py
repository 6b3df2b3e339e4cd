"""Models as graphs: what their forward calls."""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...params import LRNParams, PoolParams
from ..errors import GraphError
from ..layers import GroupedLocalResponseNorm
from .node import Node, Window, image, make, pair

_BATCH = 7  # of the images it is called with; no other length of these networks
# Heights and widths to try where neither the file nor the model says for which it is.
SIZES = (224, 227, 299, 256, 192, 160, 128, 112, 96, 64, 48, 32, 28)


class Traced(NamedTuple):
    """The output of a model's graph, and the height and width of the images with which it was called."""

    output: Node
    size: tuple[int, int]


def trace(model: nn.Module, channels: int, size: tuple[int, int] | None) -> Traced:
    """The graph of what a model calls in evaluation mode; nothing is computed.

    Args:
        channels: of the images.
        size: their height and width; None for any that the model takes, of which its graph then knows nothing.

    Raises:
        GraphError: the model does not take such images, or does what a graph cannot show.
    """
    problems = []
    for height, width in [size] if size else [(n, n) for n in SIZES]:
        recorder = _Recorder(model, (channels, height, width), size is not None)
        try:
            with evaluating(model), torch.no_grad(), _without_compiled_graphs():
                return Traced(recorder.run(), (height, width))
        except Exception as error:  # whatever the model raises
            problems.append(f"{channels}x{height}x{width}: {str(error).partition(chr(10))[0] or type(error).__name__}")
    raise GraphError(f"the model does not take images of {problems[0]}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; its modules then have the modes that they had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _without_compiled_graphs() -> AbstractContextManager[Any]:
    """In which a model that is compiled runs its functions, which can be seen."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Recorder(TorchFunctionMode):
    """Makes a node of each function that a model calls with what depends on the image."""

    def __init__(self, model: nn.Module, shape: tuple[int, int, int], is_fixed: bool) -> None:
        super().__init__()
        self.model, self.shape, self.is_fixed = model, shape, is_fixed
        self.names = {module: name for name, module in model.named_modules()}
        self.calls: list[nn.Module] = []  # the modules that run
        self.values: dict[int, tuple[Tensor, Node, int]] = {}  # by the tensor's id, with its version
        self.inplace = False  # that call writes to its input
        self.output_shape: Any = None  # of that call for one image of the size that is tried
        self.empty: dict[int, tuple[Tensor, Tensor]] = {}  # by a constant's id, with what stands for it
        self.constants: dict[int, tuple[str | None, Tensor, Tensor]] = {}  # by the id of that: key, constant, itself
        self.given: dict[int, Node | None] = {}  # of a call that is recorded, as its arguments were before it

    def run(self) -> Node:
        first = next((t for t in self.model.state_dict().values() if t.is_floating_point()), torch.empty(0))
        x = torch.empty(_BATCH, *self.shape, dtype=first.dtype, device="meta")
        self.set(x, image(self.shape if self.is_fixed else (self.shape[0], None, None)))
        with self._tensors_replaced(), self._modules_noted(), self, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using `torch.compile")  # that there are hooks
            output = self.model(x)
        return self._output(output)

    @contextmanager
    def _tensors_replaced(self) -> Iterator[None]:
        """In which the model has none of its own parameters and buffers.

        :func:`torch.func.functional_call` would leave a module that is registered twice without them.
        """
        saved = self.model.state_dict(keep_vars=True)
        for key, t in saved.items():
            self.constant(t, key)
        owners = [tensors for module in self.model.modules() for tensors in (module._parameters, module._buffers)]
        before: list[dict[str, Any]] = [dict(tensors) for tensors in owners]
        try:
            for tensors in owners:
                for name, t in tensors.items():
                    tensors[name] = None if t is None else self.constant(t)  # type: ignore[assignment]
            yield
        finally:
            for tensors, own in zip(owners, before, strict=True):
                tensors.update(own)

    @contextmanager
    def _modules_noted(self) -> Iterator[None]:
        """In which it is known which module runs. By global hooks, as an optimized model then calls its modules."""
        thread = threading.get_ident()

        def entered(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread and module in self.names:
                self.calls.append(module)

        def left(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread and module in self.names:
                if isinstance(module, GroupedLocalResponseNorm) and isinstance(output, Tensor):
                    lrn = LRNParams(module.size, module.alpha, module.beta, module.k, module.groups)
                    self.set(output, self.make("LRN", args[0], lrn=lrn))
                self.calls.pop()

        hooks = [register_module_forward_pre_hook(entered), register_module_forward_hook(left)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _output(self, output: Any) -> Node:
        if not isinstance(output, Tensor):
            raise GraphError(f"the model gives a {type(output).__name__}, not one tensor")
        node = self.node(output)
        if node is None:
            raise GraphError("the output of the model does not depend on the image")
        return node

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = _name(func)
        args, kwargs = self._empty(args), self._empty(kwargs or {})
        if name in _STAGES:
            with self:
                return _STAGES[name](*args, **kwargs)
        given = {id(t): self.node(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        inputs = tuple(node for node in given.values() if node is not None)
        if inputs and name in _OF_KNOWN_SHAPE:
            self.inplace = func.__name__.endswith("_") and not func.__name__.endswith("__")
            node = self._handled(name, None, args, kwargs, given)
            if node is not None:
                return self._output_of(node, next(t for t in tree_leaves(args) if id(t) in self.values))
        result = func(*args, **kwargs)
        if inputs and isinstance(result, Tensor | tuple | list):
            results = [t for t in (result if isinstance(result, tuple | list) else [result]) if isinstance(t, Tensor)]
            made = self._handled(name, result, args, kwargs, given)
            for t, node in zip(results, made if isinstance(made, list) else [made] * len(results), strict=True):
                self.set(t, node or Node(f"{name}()", self.path(), inputs, module=self.module()))
        elif name in _OF_SHAPE and isinstance(result, Tensor) and id(args[0]) in self.constants:
            key, value, _ = self.constants[id(args[0])]
            self.constants[id(result)] = key, func(value, *args[1:], **kwargs), result
        return result

    def _handled(self, name: str, result: Any, args: Any, kwargs: Any, given: dict[int, Node | None]) -> Any:
        """The node of a call, or nodes; None of one that cannot be told."""
        self.given = given
        try:
            return _HANDLERS[name](self, result, *args, **kwargs) if name in _HANDLERS else None
        except (TypeError, AttributeError, ValueError, RuntimeError):  # arguments that the handler does not know
            return None
        finally:
            self.given = {}

    def _output_of(self, node: Node, input: Tensor) -> Tensor:
        """What torch would give, without a call: for the meta device it would import for seconds."""
        if self.inplace:
            increment_version(input)
            result = input
        else:
            result = torch.empty(input.shape[0], *self.output_shape, dtype=input.dtype, device="meta")
        self.set(result, node)
        return result

    def _empty(self, arguments: Any) -> Any:
        """The same on the meta device, where nothing is computed."""
        return tree_map_only(Tensor, lambda t: t if t.is_meta else self.constant(t), arguments)

    def constant(self, t: Tensor, key: str | None = None) -> Tensor:
        """What stands for a tensor of the model."""
        if id(t) not in self.empty:
            empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            self.empty[id(t)] = t, empty
            self.constants[id(empty)] = key, t.detach(), empty
        return self.empty[id(t)][1]

    # -- values -------------------------------------------------------------------------------------------------------

    def set(self, t: Tensor, node: Node) -> None:
        self.values[id(t)] = (t, node, t._version)

    def node(self, t: Tensor) -> Node | None:
        """What the tensor is the output of; None for constants."""
        if id(t) in self.given:
            return self.given[id(t)]
        if id(t) not in self.values:
            return None
        _, node, version = self.values[id(t)]
        if t._version != version:
            raise GraphError(f"{node} of the model is changed in place under another name")
        return node

    def module(self) -> nn.Module | None:
        return self.calls[-1] if self.calls else None

    def path(self) -> str:
        return self.names[self.calls[-1]] if self.calls else ""

    def make(
        self, kind: str, *inputs: Tensor, tensors: Mapping[str, Tensor | None] | None = None, **settings: Any
    ) -> Node:
        nodes = [self.node(t) for t in inputs]
        if any(node is None for node in nodes):
            raise TypeError("an input does not depend on the image")
        given = {name: t for name, t in (tensors or {}).items() if t is not None}
        values, keys = {}, {}
        for name, t in given.items():
            if self.node(t) is not None:
                raise TypeError(f"{name} depends on the image")
            if t.is_meta and id(t) not in self.constants:
                raise TypeError(f"{name} is computed")
            key, values[name], _ = self.constants.get(id(t), (None, t, t))
            if key is not None:
                keys[name] = key
        nodes_given: list[Any] = nodes
        parts = {"name": self.path(), "module": self.module(), "tensors": values, "keys": keys, **settings}
        known = make(kind, *(image(tuple(t.shape[1:])) for t in inputs), **{**parts, "tensors": dict(values)})
        self.output_shape = known.shape
        return make(kind, *nodes_given, **parts)

    # -- functions ----------------------------------------------------------------------------------------------------

    def conv2d(
        self,
        y: Tensor,
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
        return self.make("Conv", input, tensors={"weight": weight, "bias": bias}, window=window, groups=groups)

    def linear(self, y: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Node:
        return self.make("Gemm", input, tensors={"weight": weight, "bias": bias})

    def batch_norm(
        self,
        y: Tensor,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Node:
        if training or running_mean is None or running_var is None:
            raise TypeError("it normalizes by the batch")
        channels = len(running_mean)
        tensors = {
            "weight": torch.ones(channels) if weight is None else weight,
            "bias": torch.zeros(channels) if bias is None else bias,
            "running_mean": running_mean,
            "running_var": running_var,
        }
        return self.make("BatchNormalization", input, tensors=tensors, epsilon=eps, momentum=1 - (momentum or 0.0))

    def relu(self, y: Tensor, input: Tensor, inplace: bool = False) -> Node:
        self.inplace |= inplace
        return self.make("Relu", input)

    def clip(self, y: Tensor, input: Tensor, min: Any = None, max: Any = None, inplace: bool = False) -> Node:
        self.inplace |= inplace
        low, high = (-math.inf if min is None else float(min)), (math.inf if max is None else float(max))
        return self.make("Clip", input, min=low, max=high)

    def hardtanh(
        self, y: Any, input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
    ) -> Node:
        return self.clip(y, input, min_val, max_val, inplace)

    def relu6(self, y: Tensor, input: Tensor, inplace: bool = False) -> Node:
        self.inplace |= inplace
        return self.make("Clip", input, min=0.0, max=6.0)

    def dropout(self, y: Tensor, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Node:
        if training:
            raise TypeError("it drops values")
        self.inplace |= inplace
        return self.make("Dropout", input, p=p)

    def lrn(
        self,
        y: Tensor,
        input: Tensor,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        groups: int = 1,
    ) -> Node:
        return self.make("LRN", input, lrn=LRNParams(size, alpha, beta, k, groups))

    def max_pool2d(
        self,
        y: Any,
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
        kernel, stride, padding, dilation, ceil_mode = PoolParams(
            kernel_size, stride, padding, dilation, ceil_mode
        ).op_args()
        begin = pair(padding)
        window = Window(pair(kernel), pair(stride), pair(dilation), begin, begin, ceil_mode)
        return self.make("MaxPool", input, window=window)

    def avg_pool2d(
        self,
        y: Tensor,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: Any = None,
    ) -> Node:
        if divisor_override is not None:
            raise TypeError("it divides by something else")
        kernel, begin = pair(kernel_size), pair(padding)
        stride = kernel if stride is None or stride == () else pair(stride)
        window = Window(kernel, stride, (1, 1), begin, begin, ceil_mode)
        return self.make("AveragePool", input, window=window, count_include_pad=count_include_pad)

    def adaptive_avg_pool2d(self, y: Tensor, input: Tensor, output_size: Any) -> Node:
        size = output_size if isinstance(output_size, tuple | list) else (output_size, output_size)
        if None in size:
            raise TypeError("it leaves a length as it is")
        return self.make("AdaptiveAveragePool", input, size=tuple(size))

    def adaptive_max_pool2d(self, y: Any, input: Tensor, output_size: Any, return_indices: bool = False) -> Node:
        if return_indices or pair(output_size) != (1, 1):
            raise TypeError("only the maximum of the whole map is known")
        return self.make("GlobalMaxPool", input)

    def mean(self, y: Tensor, input: Tensor, dim: Any = None, keepdim: bool = False) -> Node:
        if input.dim() != 4 or sorted(d % 4 for d in dim) != [2, 3]:
            raise TypeError("only the mean of height and width is known")
        pooled = self.make("GlobalAveragePool", input)
        if keepdim:
            return pooled
        self.output_shape = self.output_shape[:1]
        return make("Flatten", pooled, name=self.path(), module=self.module())

    def reshape(self, y: Tensor, input: Tensor, *shape: Any, **others: Any) -> Node:
        if y.shape[0] != _BATCH or (shape and isinstance(shape[0], torch.dtype)):
            raise TypeError("the batch becomes another")
        if not self.is_fixed and y.dim() == 2:
            return self.make("Flatten", input)
        before = self.node(input)
        if not self.is_fixed and (before is None or before.shape is None or None in before.shape):
            raise TypeError("the shape depends on the size of the image")
        return self.make("Reshape", input, shape=tuple(y.shape[1:]))

    def permute(self, y: Tensor, input: Tensor, *dims: Any) -> Node:
        order = [d % y.dim() for d in (dims[0] if isinstance(dims[0], tuple | list) else dims)]
        if order[0] != 0:
            raise TypeError("the batch moves")
        return self.make("Transpose", input, order=tuple(d - 1 for d in order[1:]))

    def transpose(self, y: Tensor, input: Tensor, dim0: int, dim1: int) -> Node:
        order = list(range(y.dim()))
        a, b = dim0 % y.dim(), dim1 % y.dim()
        order[a], order[b] = b, a
        return self.permute(y, input, order)

    def cat(self, y: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Node:
        axis = dim % tensors[0].dim() - 1
        if axis < 0:
            raise TypeError("it joins batches")
        return self.make("Concat", *tensors, axis=axis)

    def split(self, y: Sequence[Tensor], input: Tensor, size: Any, dim: int = 0) -> list[Node | None]:
        if dim % input.dim() != 1:
            raise TypeError("only channels can be split")
        nodes, start = [], 0
        for part in y:
            nodes.append(self.make("Slice", input, start=start, stop=start + part.shape[1]))
            start += part.shape[1]
        return nodes  # type: ignore[return-value]

    def pad(
        self, y: Tensor, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
    ) -> Node:
        if mode != "constant" or len(pad) > 4:
            raise TypeError("only height and width can be padded")
        left, right, top, bottom = (*pad, 0, 0)[:4]
        return self.make("Pad", input, begin=(top, left), end=(bottom, right), value=value or 0.0)

    def softmax(self, y: Any, input: Tensor, dim: int, _stacklevel: int = 3, dtype: Any = None) -> Node:
        return self._softmax("Softmax", input, dim, dtype)

    def log_softmax(self, y: Any, input: Tensor, dim: int, _stacklevel: int = 3, dtype: Any = None) -> Node:
        return self._softmax("LogSoftmax", input, dim, dtype)

    def _softmax(self, kind: str, input: Tensor, dim: int, dtype: Any) -> Node:
        if dtype not in (None, input.dtype):
            raise TypeError("it changes the dtype")
        return self.make(kind, input, axis=dim % input.dim() - 1)

    def add(self, y: Tensor, input: Any, other: Any) -> Node:
        return self._combined("Add", input, other)

    def sub(self, y: Tensor, input: Any, other: Any) -> Node:
        return self._combined("Sub", input, other)

    def mul(self, y: Tensor, input: Any, other: Any) -> Node:
        return self._combined("Mul", input, other)

    def div(self, y: Tensor, input: Any, other: Any) -> Node:
        return self._combined("Div", input, other)

    def _combined(self, kind: str, a: Any, b: Any) -> Node:
        if isinstance(b, Tensor) and self.node(b) is not None:
            if isinstance(a, Tensor) and self.node(a) is not None:
                return self.make(kind, a, b)
            if kind not in ("Add", "Mul"):
                raise TypeError("a constant comes first")
            a, b = b, a
        if not isinstance(b, Tensor):
            b = torch.tensor(float(b))
        return self.make(kind, a, tensors={"constant": b})

    def same(self, y: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Node:
        """What changes nothing, or only how the values are stored."""
        node = self.node(input)
        if node is None or y.dtype != input.dtype or y.shape != input.shape:
            raise TypeError("it changes values")
        return node


_HANDLERS: dict[str, Callable[..., Any]] = {
    "conv2d": _Recorder.conv2d,
    "linear": _Recorder.linear,
    "batch_norm": _Recorder.batch_norm,
    "local_response_norm": _Recorder.lrn,
    "relu": _Recorder.relu,
    "relu6": _Recorder.relu6,
    **dict.fromkeys(("clamp", "clip"), _Recorder.clip),
    "hardtanh": _Recorder.hardtanh,
    "dropout": _Recorder.dropout,
    "feature_dropout": _Recorder.dropout,
    "dropout2d": _Recorder.dropout,
    "max_pool2d": _Recorder.max_pool2d,
    "avg_pool2d": _Recorder.avg_pool2d,
    "adaptive_avg_pool2d": _Recorder.adaptive_avg_pool2d,
    "adaptive_max_pool2d": _Recorder.adaptive_max_pool2d,
    "mean": _Recorder.mean,
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze", "unsqueeze", "unflatten"), _Recorder.reshape),
    "permute": _Recorder.permute,
    "transpose": _Recorder.transpose,
    **dict.fromkeys(("cat", "concat", "concatenate"), _Recorder.cat),
    **dict.fromkeys(("split", "chunk"), _Recorder.split),
    "pad": _Recorder.pad,
    "softmax": _Recorder.softmax,
    "log_softmax": _Recorder.log_softmax,
    **dict.fromkeys(("add", "iadd", "radd"), _Recorder.add),
    **dict.fromkeys(("sub", "isub", "subtract"), _Recorder.sub),
    **dict.fromkeys(("mul", "imul", "rmul", "multiply"), _Recorder.mul),
    **dict.fromkeys(("div", "idiv", "truediv", "itruediv", "divide", "true_divide"), _Recorder.div),
    **dict.fromkeys(
        ("contiguous", "clone", "detach", "to", "float", "double", "half", "requires_grad"), _Recorder.same
    ),
    "identity": _Recorder.same,
}


# of which the shape of the output is that of the node
_OF_KNOWN_SHAPE = {
    *("conv2d", "linear", "batch_norm", "local_response_norm", "relu", "relu6", "clamp", "clip", "hardtanh", "dropout"),
    *("feature_dropout", "dropout2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean"),
    *(
        "cat",
        "concat",
        "concatenate",
        "pad",
        "softmax",
        "log_softmax",
        "add",
        "radd",
        "iadd",
        "sub",
        "isub",
        "mul",
        "rmul",
        "imul",
        "div",
        "truediv",
    ),
}


# -- our own functions are what they consist of -----------------------------------------------------------------------


def _run_stage(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *arguments: Any,
    relu: bool = True,
    lrn: LRNParams | None = None,
    pool: PoolParams | None = None,
) -> Tensor:
    return _tail(torch.conv2d(x, weight, bias, *arguments), None, relu=relu, lrn=lrn, pool=pool)


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
        y = _lrn_function(y, lrn.size, lrn.alpha, lrn.beta, lrn.k, groups=lrn.groups)
    return y if pool is None else F.max_pool2d(y, *pool.op_args())


def _lrn_function(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    from ... import functional

    return functional.local_response_norm(input, *args, **kwargs)


_OF_SHAPE = ("view", "reshape", "flatten", "squeeze", "unsqueeze", "getitem", "contiguous", "detach")
_STAGES: dict[str, Callable[..., Tensor]] = {
    "run_stage": _run_stage,
    "conv2d_relu": _conv2d_relu,
    "relu_lrn_max_pool2d": _tail,
}


def _name(func: Any) -> str:
    """The name of a function of torch or of ours; that of anything else is none that is known here."""
    name = getattr(func, "__name__", type(func).__name__)
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket | ModuleType):
        return str(func)
    module = getattr(func, "__module__", None) or "torch"
    if module.partition(".")[0] not in ("torch", "fastcnn"):
        return f"{module}.{name}"
    return name.strip("_")
