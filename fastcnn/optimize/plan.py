"""Plans of a graph: what runs each stage is decided once for each kind of input.

Nothing is looked up between two stages. In inference, convolutions write straight into the concatenation of their
outputs.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from .. import backends
from ..memory_format import is_channels_last
from ..ops import packed
from .graph import value_of
from .inference import Convolution, empty
from .stage import LinearStage, Stage

Run = Callable[..., Any]
Plans = dict[Any, Run]  # by kind of input

_MOST_PLANS = 64  # of a graph
_PLAIN = (FakeTensor, nn.Parameter, torch.SymInt, int)
_version = Tensor._version.__get__  # type: ignore[attr-defined]


class Planned:
    """The forward of a graph, planned for each kind of input.

    Args:
        module: holds what the graph refers to.
        graph: with fused stages.
        inference: pack weights, for as long as they stay as they are.
        done: is called after a plan was made.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, *, inference: bool, done: Callable[[], None]) -> None:
        self._module, self._inference, self._done = fx.GraphModule(module, graph), inference, done
        self.forward: Run = self._module.forward
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        values = [*map(value_of, inputs)]
        self._is_plain = all(type(value) in _PLAIN for value in values)
        self._is_dynamic = [*map(_is_dynamic, values)]  # TorchDynamo guards all that is known of the others
        self._is_weight = [inference and bool(_stages_of(node)) for node in inputs]
        self._needs_grad = any(isinstance(value, Tensor) and value.requires_grad for value in values)
        # The ids of the weights are theirs while the references live.
        self._weights: tuple[list[int], list[Any]] = [], []
        self._plans: tuple[Any, Plans] = None, {}  # for weights with these contents

    def __call__(self, *args: Any) -> Any:
        plans = self._plans_for(args) if self._is_plain and _may_plan() else None
        if plans is None:
            return self.forward(*args)
        dynamic = itertools.compress(args, self._is_dynamic)
        kinds = tuple((x.shape, x.stride()) if isinstance(x, Tensor) else x for x in dynamic)
        key = kinds, torch.get_num_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
        run = plans.get(key)
        if run is not None:
            return run(*args)
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        weights = {node for node, is_weight in zip(_inputs(self._module), self._is_weight, strict=True) if is_weight}
        first = _FirstRun(self._module, weights if self._inference else None)
        result = first.run(*args)
        plans[key] = first.plan() if first.runs else self.forward
        self._done()
        return result

    def _plans_for(self, args: Sequence[Any]) -> Plans | None:
        """Where the plans are, for inference with these weights; None if this call should not be planned."""
        if not self._inference:
            return self._plans[1]
        if self._needs_grad and torch.is_grad_enabled():
            return None
        weights = [*itertools.compress(args, self._is_weight)]
        ids = [*map(id, weights)]
        if ids != self._weights[0]:
            if any(map(Tensor.is_inference, weights)):  # whose changes cannot be seen
                return None
            self._weights = ids, [weakref.ref(weight, self._forget) for weight in weights]
        contents = packed.generation(), ids, [*map(_version, weights)], [*map(Tensor.data_ptr, weights)]
        known, plans = self._plans
        if contents != known:
            plans = {}
            self._plans = contents, plans
            if known is not None:  # weights that change in every call are not packed
                return None
        return plans

    def _forget(self, _: object) -> None:
        self._weights, self._plans = ([], []), ((), {})


def _inputs(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _parameters(stage: fx.Node) -> list[fx.Node]:
    leaves = pytree.tree_leaves((stage.args[1:], stage.kwargs.get("norm")))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def _stages_of(node: fx.Node) -> list[fx.Node]:
    """The stages that have the node as a parameter."""
    return [user for user in node.users if isinstance(user.target, Stage | LinearStage) and node in _parameters(user)]


def _is_dynamic(value: Any) -> bool:
    sizes = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
    return any(isinstance(size, torch.SymInt) for size in sizes)


def _may_plan() -> bool:
    """Whether no dispatch mode or autocast is active, and the C++ kernels and oneDNN may run."""
    if torch._C._len_torch_dispatch_stack() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return False
    return backends.runs_cpu_kernels() and bool(torch.backends.mkldnn.enabled)


class _FirstRun(fx.Interpreter):
    """Runs a graph, and notes what is to run its stages, and which maps are in channels_last.

    Args:
        module: with the graph.
        weights: the inputs that do not change; without them nothing is packed.
    """

    def __init__(self, module: fx.GraphModule, weights: set[fx.Node] | None) -> None:
        super().__init__(module)
        self.extra_traceback = False  # errors are those of the forward
        self.weights = weights
        self.runs: dict[fx.Node, Run] = {}
        self.maps: dict[fx.Node, tuple[torch.Size, torch.dtype]] = {}

    def run_node(self, n: fx.Node) -> Any:
        if not isinstance(n.target, Stage | LinearStage):
            value = super().run_node(n)
        else:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            may_pack = self.weights is None or self.weights.issuperset(_parameters(n))
            run = n.target.planned(*args, **kwargs) if may_pack else None
            if run is not None:
                self.runs[n] = run
            value = (run or n.target)(*args, **kwargs)
        if isinstance(value, Tensor) and is_channels_last(value):
            self.maps[n] = value.shape, value.dtype
        return value

    def plan(self) -> Run:
        """The forward of the graph with those runs in the place of its stages."""
        graph, new = fx.Graph(), {}  # type: tuple[fx.Graph, dict[fx.Node, fx.Node]]
        joined, buffers = dict(self._joined()), {}  # type: tuple[dict[fx.Node, Any], dict[fx.Node, fx.Node]]
        for node in self.module.graph.nodes:  # type: ignore[union-attr]
            if node in buffers:
                new[node] = buffers[node]
                continue
            if node in joined and joined[node][0] not in buffers:
                cat = joined[node][0]
                buffers[cat] = graph.call_function(_named(partial(empty, *self.maps[cat]), "empty"))
            new[node] = graph.node_copy(node, lambda n: new[n])
            if node in self.runs:
                new[node].target = _named(self.runs[node], "run")
            if node in joined:
                cat, channel = joined[node]
                new[node].kwargs = {**new[node].kwargs, "out": buffers[cat], "first": channel}
        graph.lint()
        # Not a GraphModule, whose source torch would keep forever.
        code = graph.python_code("self")
        names = dict(code.globals)
        exec(code.src, names)
        return partial(names["forward"], self.module)

    def _joined(self) -> Iterator[tuple[fx.Node, tuple[fx.Node, int]]]:
        """Convolutions that can write into the concatenation of their outputs: which, and from which channel on."""
        for cat in self.module.graph.nodes:  # type: ignore[union-attr]
            if cat.target not in (torch.cat, torch.concat) or cat not in self.maps or not cat.args:
                continue
            parts, dim = cat.args[0], cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
            if dim not in (1, -3) or len(set(parts)) < len(parts) or not all(self._joins(p, cat) for p in parts):
                continue
            channels = [self.maps[part][0][1] for part in parts]
            for i, part in enumerate(parts):
                yield part, (cat, sum(channels[:i]))

    def _joins(self, part: fx.Node, cat: fx.Node) -> bool:
        run = self.runs.get(part)
        is_alone = isinstance(run, Convolution) and run.tail is None and set(part.users) == {cat}
        return is_alone and part in self.maps and self.maps[part][1] == self.maps[cat][1]


def _named(run: Any, name: str) -> Any:
    """torch.fx writes the calls of functions by name."""
    if not hasattr(run, "__name__"):
        run.__name__ = name
    return run
