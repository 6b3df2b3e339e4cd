"""A graph for inference, planned: for each kind of input, what runs every stage is found once.

Between two stages nothing is looked up, and maps that are concatenated are written where they belong.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

from .. import backends
from ..memory_format import is_channels_last
from ..ops import packed
from .graph import value_of
from .inference import Convolution
from .stage import LinearStage, Stage

_PLANS = 64  # of a graph

_PLAIN = (FakeTensor, nn.Parameter, torch.SymInt, int)
_version = Tensor._version.__get__  # type: ignore[attr-defined]


class Planned:
    """The forward of a graph, planned for each kind of input.

    Args:
        module: holds what the graph refers to.
        graph: with fused stages.
        inference: pack the weights, for as long as they stay as they are.
        done: is called when a plan was made.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, *, inference: bool, done: Callable[[], None]) -> None:
        self._done = done
        self.graph_module = fx.GraphModule(module, graph)
        self.forward = self.graph_module.forward
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._is_plain = all(type(value_of(node)) in _PLAIN for node in inputs)
        self._is_dynamic = [_is_dynamic(node) for node in inputs]  # TorchDynamo guards all that is known of the others
        self._is_weight = [inference and _is_weight(node) for node in inputs]
        self._needs_grad = any(isinstance(t, Tensor) and t.requires_grad for t in map(value_of, inputs))
        self._inference = inference
        self._plans: dict[Any, Callable[..., Any] | None] = {}
        self._weights: list[int] = []  # ids; one may be that of another tensor later, hence the references
        self._alive: list[Any] = []
        self._contents: Any = None

    def __call__(self, *args: Any) -> Any:
        if not self._is_plain or not _may_plan() or (self._inference and not self._stay_as_they_are(args)):
            return self.forward(*args)
        dynamic = tuple(x.shape if isinstance(x, Tensor) else x for x in itertools.compress(args, self._is_dynamic))
        key = dynamic, torch.get_num_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
        if key in self._plans:
            return (self._plans[key] or self.forward)(*args)
        if len(self._plans) == _PLANS:
            self._plans.clear()
        first = _FirstRun(self.graph_module)
        result = first.run(*args)
        self._plans[key] = _planned(self.graph_module, first) if first.runs else None
        self._done()
        return result

    def _stay_as_they_are(self, args: tuple[Any, ...]) -> bool:
        """Whether the weights may be packed: nothing asks for gradients, and this call sees them as the last one did."""
        if self._needs_grad and torch.is_grad_enabled():
            return False
        weights = [*itertools.compress(args, self._is_weight)]
        ids = [*map(id, weights)]
        if ids != self._weights:
            if any(map(Tensor.is_inference, weights)):  # whose changes cannot be seen
                return False
            self._weights, self._alive = ids, [weakref.ref(weight, self._forget) for weight in weights]
        contents = packed.generation(), [*map(_version, weights)], [*map(Tensor.data_ptr, weights)], ids
        if contents == self._contents:
            return True
        is_first, self._contents = self._contents is None, contents
        self._plans.clear()
        return is_first

    def _forget(self, _: object) -> None:
        self._weights, self._contents = [], ()


def _is_weight(node: fx.Node) -> bool:
    """Whether stages alone use an input of a graph, and as a parameter."""
    return bool(node.users) and all(
        isinstance(user.target, Stage | LinearStage)
        and node is not user.args[0]
        and node is not user.kwargs.get("addend")
        for user in node.users
    )


def _is_dynamic(node: fx.Node) -> bool:
    value = value_of(node)
    sizes = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
    return any(isinstance(size, torch.SymInt | torch.SymFloat) for size in sizes)


def _may_plan() -> bool:
    """Whether nothing looks on or changes dtypes, and the operators are those of this machine."""
    looked_on = torch._C._len_torch_dispatch_stack() or torch.is_autocast_enabled("cpu")
    return not looked_on and backends.runs_cpu_kernels() and torch.backends.mkldnn.enabled


class _FirstRun(fx.Interpreter):
    """Runs a graph and notes what could run its stages, and which maps are in channels_last."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.runs: dict[fx.Node, Callable[..., Any]] = {}
        self.maps: dict[fx.Node, tuple[torch.Size, torch.dtype]] = {}

    def run_node(self, node: fx.Node) -> Any:
        if not isinstance(node.target, Stage | LinearStage):
            value = super().run_node(node)
        else:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            run = node.target.planned(*args, **kwargs)
            if run is not None:
                self.runs[node] = run
            value = (run or node.target)(*args, **kwargs)
        if isinstance(value, Tensor) and is_channels_last(value):
            self.maps[node] = value.shape, value.dtype
        return value


def _planned(module: fx.GraphModule, first: _FirstRun) -> Callable[..., Any]:
    """The forward of the graph with those runs in place of its stages."""
    graph, new = fx.Graph(), {}  # type: tuple[fx.Graph, dict[fx.Node, fx.Node]]
    joined = dict(_joined(module.graph, first))
    buffers: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node in buffers:
            new[node] = buffers[node]
            continue
        new[node] = graph.node_copy(node, lambda n: new[n])
        if node in first.runs:
            new[node].target = _named(first.runs[node], "run")
        if node in joined:
            cat, channel = joined[node]
            if cat not in buffers:
                shape, dtype = first.maps[cat]
                with graph.inserting_before(new[node]):
                    empty = partial(torch.empty, shape, dtype=dtype, memory_format=torch.channels_last)
                    buffers[cat] = graph.call_function(_named(empty, "empty"))
            new[node].kwargs = {**new[node].kwargs, "out": buffers[cat], "first": channel}
    graph.lint()
    return fx.GraphModule(module, graph).forward


def _named(run: Any, name: str) -> Any:
    """torch.fx writes the calls of functions by name."""
    if not hasattr(run, "__name__"):
        run.__name__ = name
    return run


def _joined(graph: fx.Graph, first: _FirstRun) -> Iterator[tuple[fx.Node, tuple[fx.Node, int]]]:
    """Convolutions that can write into the concatenation of their outputs: which, and from which channel on."""
    for cat in graph.nodes:
        if cat.target not in (torch.cat, torch.concat) or cat not in first.maps or not cat.args:
            continue
        dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
        parts = cat.args[0]
        if dim not in (1, -3) or len(set(parts)) < len(parts) or not all(_can_join(part, cat, first) for part in parts):
            continue
        channels = [first.maps[part][0][1] for part in parts]
        yield from zip(parts, ((cat, sum(channels[:i])) for i in range(len(parts))), strict=True)


def _can_join(node: fx.Node, cat: fx.Node, first: _FirstRun) -> bool:
    run = first.runs.get(node)
    return isinstance(run, Convolution) and run.tail is None and set(node.users) == {cat} and node in first.maps and first.maps[node][1] == first.maps[cat][1]
