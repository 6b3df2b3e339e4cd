"""How an optimized module is called: through graphs, or as it is wherever that is not sure to be the same.

TorchDynamo guards what it took for granted when it made a graph, and makes another where that no longer holds. A module
without a graph runs its own forward, and the modules that it calls, having engines of their own, run through theirs.
"""

import os
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .graph import fuse
from .offload import Offloaded
from .plan import Planned
from .report import Entry, NoGraph, Report

try:
    from . import dynamo
except ImportError as error:  # a torch whose private parts are others
    dynamo, _MISSING = None, f"this torch has another TorchDynamo: {error}"  # type: ignore[assignment]

_IN_A_ROW = 8  # calls of one kind of which each made a graph, until the plain forward runs
_KINDS = 256  # of calls that are remembered


@dataclass
class Kind:
    """What is known of the calls with arguments of one kind.

    Args:
        shapes: of the first call with a graph.
        in_a_row: how many of the last calls each made a graph.
        failures: how often there was no graph.
        waiting: calls until the next try.
    """

    shapes: list[torch.Size] | None = None
    in_a_row: int = 0
    failures: int = 0
    waiting: int = 0


class Engine:
    """Runs the calls of one module. It lives in the module, and comes along when that is copied or pickled.

    Args:
        module: whose calls.
        name: path of the module in the model.
        report: of the model.
        inference: see :func:`fastcnn.optimize`.
        dtype: to which floating-point arguments are cast; None: they are not.
        offloaded: where the weights are, if they are not in memory.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        report: Report,
        *,
        inference: bool,
        dtype: torch.dtype | None,
        offloaded: Offloaded | None,
    ) -> None:
        self.offloaded = offloaded
        self.module, self.name, self.report, self.inference, self.dtype = module, name, report, inference, dtype
        self._arm()
        if dynamo is None:
            self._ran_plain(_MISSING)

    def _arm(self) -> None:
        self.graphs = 0  # made so far
        self._ran = False  # a graph, in this call
        self._kinds: dict[Any, Kind] = {}
        self._watched = False  # some kind of call had no graph, or made some in a row
        self._start_anew()
        self.module._compiled_call_impl = self.call
        self.module._fastcnn_engine = self  # type: ignore[assignment]
        self.module._replicate_for_data_parallel = self.replicate  # type: ignore[method-assign]

    def _start_anew(self) -> None:
        """Without graphs."""
        self._compiled: Callable[..., Any] | None = None
        self._planned: list[Planned] = []
        # What graphs take for granted without a guard: the environment, and the methods of classes.
        self._environ = dict(os.environ._data)  # type: ignore[attr-defined]
        self._methods: tuple[tuple[type, str, Any], ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("module", "name", "report", "inference", "dtype")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.offloaded = None  # copies of weights are in memory
        self._arm()

    def replicate(self) -> nn.Module:
        """A replica as :class:`torch.nn.DataParallel` makes it; its forward is the plain one."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        for name in ("_compiled_call_impl", "_fastcnn_engine", "_replicate_for_data_parallel"):
            del replica.__dict__[name]
        self._ran_plain("replicas of DataParallel have no graphs")
        return replica

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What the module is called with."""
        if self.dtype is not None:
            args, kwargs = pytree.tree_map_only(Tensor, self._cast, (args, kwargs))
        if dynamo is None or dynamo.sees_every_call() or (self._watched and self._waits(args, kwargs)):
            return self.module._call_impl(*args, **kwargs)
        if self._environ != os.environ._data or any(vars(c).get(name) is not f for c, name, f in self._methods):  # type: ignore[attr-defined]
            self._start_anew()
        if self._compiled is None:
            self._compiled = self._compile()
        graphs, self._ran = self.graphs, False
        try:
            result = self._compiled(self.module, args, kwargs)
        except NoGraph as no_graph:
            reason = str(no_graph)
        else:
            if self._watched or self.graphs != graphs:
                self._ran_a_graph(args, kwargs, self.graphs != graphs)
            if not self._ran and (why := dynamo.is_off()):
                self._ran_plain(why)
            return result
        result = self.module._call_impl(*args, **kwargs)  # which raises torch's own error, where it was that
        self._had_no_graph(self._kind(args, kwargs), reason)
        return result

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self.dtype) if t.is_floating_point() else t

    def _compile(self) -> Callable[..., Any]:
        engine = weakref.proxy(self)  # what TorchDynamo keeps must not keep the model
        return dynamo.compiled(lambda *graph: engine._backend(*graph), lambda *call: engine._has_new_shapes(*call))

    def _backend(self, graph_module: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        for node in graph_module.graph.nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise NoGraph(f"it calls {node.target.name()}, which a graph cannot run as the forward does")
        names = {name: type(m).__name__ for name, m in self.module.named_modules() if not m._modules}
        entries = fuse(graph_module.graph, names, inference=self.inference)
        self.graphs += 1
        # What TorchDynamo keeps must keep neither the model nor what was made of its weights.
        done = self.offloaded.release if self.offloaded else lambda: None
        self._planned.append(Planned(graph_module, graph_module.graph, inference=self.inference, done=done))
        engine, planned, forward = weakref.proxy(self), weakref.ref(self._planned[-1]), self._planned[-1].forward

        def run(*args: Any) -> Any:
            engine._ran = True
            return (planned() or forward)(*args)

        classes = {cls for m in self.module.modules() for cls in type(m).__mro__ if issubclass(cls, nn.Module)}
        self._methods = tuple(
            (cls, name, value)
            for cls in classes
            for name, value in vars(cls).items()
            if isinstance(value, types.FunctionType) and (cls is not nn.Module or "call" in name)
        )
        self.report.add(self.name, entries)
        return run

    # -- kinds of calls -----------------------------------------------------------------------------------------------

    def _kind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
        def described(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.dim(), x.dtype, x.device, x.requires_grad
            return x if isinstance(x, bool | str | None) else type(x)

        leaves, structure = pytree.tree_flatten((args, kwargs))
        key = self.module.training, torch.is_grad_enabled(), structure, *map(described, leaves)
        if key not in self._kinds and len(self._kinds) == _KINDS:
            self._kinds.clear()
        return self._kinds.setdefault(key, Kind())

    def _has_new_shapes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        kind = self._kind(args, kwargs)
        shapes = [t.shape for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if kind.shapes is None:
            kind.shapes = shapes
        return kind.shapes != shapes

    def _waits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        kind = self._kind(args, kwargs)
        kind.waiting -= 1
        return kind.waiting >= 0

    def _ran_a_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any], made_a_graph: bool) -> None:
        kind = self._kind(args, kwargs)
        kind.in_a_row = kind.in_a_row + 1 if made_a_graph else 0
        if kind.in_a_row >= _IN_A_ROW:
            self._had_no_graph(kind, f"{_IN_A_ROW} calls of one kind in a row each needed a new graph")
        self._watched = any(kind.in_a_row > 1 or kind.waiting > 0 for kind in self._kinds.values())

    def _had_no_graph(self, kind: Kind, reason: str) -> None:
        """Calls of this kind run the plain forward: so many of them until the next try that trying costs little."""
        kind.failures += 1
        kind.waiting = 4 ** min(kind.failures - 1, 10)
        self._watched = True
        self._ran_plain(reason)

    def _ran_plain(self, reason: str) -> None:
        where, what = self.name or type(self.module).__name__, f"forward of {type(self.module).__name__}"
        self.report.plain[where, reason] = Entry(where, what, why_not=reason)
