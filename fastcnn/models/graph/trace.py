"""Models as graphs: what their forward calls."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ...params import LRNParams
from ..errors import GraphError
from ..layers import GroupedLocalResponseNorm
from .functions import COMPUTED, OF_CONSTANTS, OURS, REARRANGED
from .make import make
from .node import Node, image

_BATCH = 7  # of the images it is called with; no other length of these networks
# Heights and widths to try where neither the file nor the model says for which it is.
SIZES = (224, 227, 299, 256, 192, 160, 128, 112, 96, 64, 48, 32, 28)


class _NotFollowed(GraphError):
    """Not because of the size of the images."""


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
        recorder = Recorder(model, (channels, height, width), size is not None)
        try:
            with evaluating(model), torch.no_grad(), _without_compiled_graphs():
                return Traced(recorder.run(), (height, width))
        except _NotFollowed:
            raise
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


class Recorder(TorchFunctionMode):
    """Makes a node of each function that a model calls with what depends on the image."""

    def __init__(self, model: nn.Module, shape: tuple[int, int, int], is_fixed: bool) -> None:
        super().__init__()
        self.model, self.shape, self.is_fixed = model, shape, is_fixed
        self.names = {module: name for name, module in model.named_modules()}
        self.calls: list[nn.Module] = []  # the modules that run
        self.values: dict[int, tuple[Tensor, Node, int]] = {}  # by the tensor's id, with its version
        self.is_in_place = False  # whether that call writes to its input
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
            raise _NotFollowed(f"the model returns a {type(output).__name__}, not one tensor")
        node = self.node(output)
        if node is None:
            raise _NotFollowed("the output of the model does not depend on the image")
        return node

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = _name(func)
        args, kwargs = self._empty(args), self._empty(kwargs or {})
        if name in OURS:
            with self:
                return OURS[name](*args, **kwargs)
        given = {id(t): self.node(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        inputs = tuple(node for node in given.values() if node is not None)
        if inputs and name in COMPUTED:
            self.is_in_place = _writes_to_its_input(func)
            node = self._handled(COMPUTED[name], args, kwargs, given)
            if node is not None:
                return self._output_of(node, args)
        result = func(*args, **kwargs)
        if inputs and isinstance(result, Tensor | tuple | list):
            results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            made = self._handled(REARRANGED[name], (result, *args), kwargs, given) if name in REARRANGED else None
            for t, node in zip(results, made if isinstance(made, list) else [made] * len(results), strict=True):
                self.set(t, node or Node(f"{name}()", self.path(), inputs, module=self.module()))
        elif name in OF_CONSTANTS and isinstance(result, Tensor) and id(args[0]) in self.constants:
            key, value, _ = self.constants[id(args[0])]
            self.constants[id(result)] = key, func(value, *args[1:], **kwargs), result
        return result

    def _handled(self, function: Any, args: Sequence[Any], kwargs: Any, given: dict[int, Node | None]) -> Any:
        """The node of a call, or nodes; None of one that cannot be told."""
        self.given = given
        try:
            return function(self, *args, **kwargs)
        except (TypeError, AttributeError, ValueError, RuntimeError):  # arguments that the function does not know
            return None
        finally:
            self.given = {}

    def _output_of(self, node: Node, args: Sequence[Any]) -> Tensor:
        """What torch would give, without a call: for the meta device it would import for seconds."""
        input = next(t for t in tree_leaves(args) if self.depends_on_image(t))
        if self.is_in_place:
            if args[0] is not input:
                raise _NotFollowed(f"{node} of the model writes to a constant")
            increment_version(input)
            result = input
        else:
            result = torch.empty(len(input), *self.output_shape, dtype=input.dtype, device="meta")
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
            raise _NotFollowed(f"{node} of the model is changed in place under another name")
        return node

    def depends_on_image(self, value: Any) -> bool:
        return isinstance(value, Tensor) and self.node(value) is not None

    def has_open_shape(self, t: Tensor) -> bool:
        """Whether what the tensor is the output of has another shape for images of another size."""
        node = self.node(t)
        return node is None or node.shape is None or None in node.shape

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


def _name(func: Any) -> str:
    """The name of a function of torch or of ours; that of anything else is none that is known here."""
    name = getattr(func, "__name__", type(func).__name__)
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(func)
    module = getattr(func, "__module__", None) or "torch"
    if module.partition(".")[0] not in ("torch", "fastcnn"):
        return f"{module}.{name}"
    return name.strip("_")


def _writes_to_its_input(func: Any) -> bool:
    """Whether it is one like ``relu_`` or ``__iadd__``."""
    name = func.__name__
    return name.startswith("__i") if name.endswith("__") else name.endswith("_")
