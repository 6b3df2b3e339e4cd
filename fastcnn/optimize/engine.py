"""How an optimized module is called: through graphs by TorchDynamo, or as it is wherever that is not sure to be the same.

TorchDynamo guards whatever it took for granted when it made a graph, and makes another where that no longer holds. Its
stock settings leave gaps, which are closed here. A module without a graph runs its own forward, and the modules that it
calls, which have engines of their own, run through theirs.
"""

import contextlib
import itertools
import logging
import os
import re
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import config, eval_frame, maybe_mark_dynamic, optimize
from torch._dynamo.exc import TorchDynamoException
from torch.autograd import forward_ad
from torch.fx.experimental import _config as fx_config
from torch.nn.modules import module as module_state
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from .graph import fuse
from .report import Entry, Report

# Patched while a graph is made.
_SETTINGS = {
    "skip_nnmodule_hook_guards": False,  # stock: hooks added after the first call do not run
    "trace_numpy": False,  # stock: numpy's random numbers come from torch's generator
    "allow_unspec_int_on_nn_module": True,  # stock: `self.step += 1` makes a graph in every call
    "optimize_ddp": False,  # stock: cuts graphs at the buckets of DistributedDataParallel
    "recompile_limit": 64,  # of a code object, of which every engine has its own
}
_FX_SETTINGS = {"use_duck_shape": False}  # stock: a first square image makes a graph of square images
_IN_A_ROW = 8  # calls of one kind of which each made a graph, until the plain forward runs
_count = itertools.count()


class NoGraph(TorchDynamoException):
    """The plain forward has to run."""


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module._call_impl(*args, **kwargs)


class Engine:
    """Runs the calls of one module. It lives in the module, and comes along when that is copied or pickled.

    Args:
        module: whose calls.
        name: path of the module in the model.
        report: of the model.
        inference: see :func:`fastcnn.optimize`.
        dtype: to which floating-point arguments are cast; None: they are not.
    """

    def __init__(
        self, module: nn.Module, name: str, report: Report, *, inference: bool, dtype: torch.dtype | None
    ) -> None:
        self.module, self.name, self.report, self.inference, self.dtype = module, name, report, inference, dtype
        self._arm()

    def _arm(self) -> None:
        self._compiled: Callable[..., Any] | None = None
        # What graphs take for granted without a guard: the environment, and the methods of the classes.
        self._environ = dict(os.environ._data)  # type: ignore[attr-defined]
        self._methods: tuple[tuple[type, str, Any], ...] = ()
        self._shapes: dict[Any, list[torch.Size]] = {}  # kind of call -> shapes of the first one
        self._ran = False  # a graph, in this call
        self._in_a_row: dict[Any, int] = {}  # kind of call -> how many of them each made a graph
        self._plain: dict[Any, list[int]] = {}  # kind of call -> how often it had no graph, calls until the next try
        self.graphs = 0
        self.module._compiled_call_impl = self.call  # type: ignore[assignment]
        self.module._fastcnn_engine = self  # type: ignore[assignment]
        self.module._replicate_for_data_parallel = self.replicate  # type: ignore[assignment,method-assign]

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("module", "name", "report", "inference", "dtype")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
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
        if _sees_every_call() or (self._plain and self._is_plain(args, kwargs)):
            return self.module._call_impl(*args, **kwargs)
        if self._environ != os.environ._data or any(vars(cls).get(name) is not value for cls, name, value in self._methods):
            self._arm()
        if self._compiled is None:
            self._compile()
        graphs, self._ran = self.graphs, False
        try:
            result = self._compiled(self.module, args, kwargs)
        except TorchDynamoException as error:
            reason = _reason(error)
        else:
            if self.graphs != graphs:
                self._made_a_graph(args, kwargs)
            elif self._in_a_row:
                self._in_a_row.pop(self._kind(args, kwargs), None)
            if not self._ran and (why := _dynamo_is_off()):
                self._ran_plain(why)
            return result
        result = self.module._call_impl(*args, **kwargs)  # which raises torch's own error, where it was that
        self._has_no_graph(self._kind(args, kwargs), reason)
        return result

    def _cast(self, t: Tensor) -> Tensor:
        return t.to(self.dtype) if t.is_floating_point() else t

    # -- graphs -------------------------------------------------------------------------------------------------------

    def _compile(self) -> None:
        code = _call.__code__.replace(co_name=f"_call_{next(_count)}")  # TorchDynamo counts graphs by code object
        function = types.FunctionType(code, globals())
        context = optimize(self._backend, nopython=True)
        inner = getattr(context, "callback", None)
        if inner is None:  # TORCHDYNAMO_DISABLE
            self._compiled = function
            return

        def callback(frame: Any, *state: Any) -> Any:
            """Called for frames that no graph fits; where none can be made of ours, nothing of it may run."""
            if frame.f_code is not code:
                return inner(frame, *state)
            with config.patch(_SETTINGS), fx_config.patch(_FX_SETTINGS), _disable_current_modes():
                with self._marked_dynamic(**frame.f_locals), _nothing_said() as warned:
                    try:
                        found = inner(frame, *state)
                    except Exception as error:
                        raise NoGraph(_reason(error)) from error
            if any("lru_cache" in str(warning.message) for warning in warned):
                raise NoGraph("it calls a function with functools.lru_cache, which TorchDynamo would call every time")
            if found.guarded_code is None:
                raise NoGraph(getattr(found, "skip_reason", None) or "TorchDynamo skipped it")
            return found

        callback._torchdynamo_orig_backend = inner  # type: ignore[attr-defined]
        context.callback = callback
        self._compiled = context(function)

    def _backend(self, graph_module: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        for node in graph_module.graph.nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise NoGraph(f"it calls {node.target.name()}, which a graph cannot run as the forward does")
        names = {name: type(m).__name__ for name, m in self.module.named_modules() if not m._modules}
        entries = fuse(graph_module.graph, names, inference=self.inference)
        forward = fx.GraphModule(graph_module, graph_module.graph).forward  # the module itself compiles its code later
        self.graphs += 1

        def run(*args: Any) -> Any:
            self._ran = True
            return forward(*args)

        classes = {cls for m in self.module.modules() for cls in type(m).__mro__ if issubclass(cls, nn.Module)}
        self._methods = tuple(
            (cls, name, value)
            for cls in classes
            for name, value in vars(cls).items()
            if isinstance(value, types.FunctionType) and (cls is not nn.Module or "call" in name)
        )
        prefix = f"{self.name}." if self.name else ""
        self.report.add([self._in_model(entry, prefix) for entry in entries])
        return run

    @staticmethod
    def _in_model(entry: Entry, prefix: str) -> Entry:
        where = " + ".join((prefix + path).rstrip(".") for path in entry.where.split(" + "))
        return Entry(where, entry.what, entry.now, entry.why_not)

    @contextlib.contextmanager
    def _marked_dynamic(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Let the second graph of a kind of call be one for all shapes. By itself TorchDynamo takes one step a graph."""
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        shapes = [x.shape for x in tensors]
        known = self._shapes.setdefault(self._kind(args, kwargs), shapes) == shapes
        marked = [] if known else [(t, dict(vars(t))) for t in tensors]
        for t, _ in marked:
            maybe_mark_dynamic(t, [i for i in range(t.dim()) if i != 1])  # but for channels
        try:
            yield
        finally:
            for t, attributes in reversed(marked):  # a tensor may be there twice
                vars(t).clear()
                vars(t).update(attributes)

    # -- calls without a graph ----------------------------------------------------------------------------------------

    def _kind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        described = (
            (x.dim(), x.dtype, x.device, x.requires_grad)
            if isinstance(x, Tensor)
            else x
            if isinstance(x, bool | int | float | str | None)
            else type(x)
            for x in leaves
        )
        return self.module.training, torch.is_grad_enabled(), structure, *described

    def _is_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        waiting = self._plain.get(self._kind(args, kwargs))
        if waiting is None or waiting[1] == 0:
            return False
        waiting[1] -= 1
        return True

    def _made_a_graph(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kind = self._kind(args, kwargs)
        self._in_a_row[kind] = self._in_a_row.get(kind, 0) + 1
        if self._in_a_row[kind] >= _IN_A_ROW:
            self._has_no_graph(kind, f"{_IN_A_ROW} calls of one kind in a row each needed a new graph")

    def _has_no_graph(self, kind: Any, reason: str) -> None:
        """Calls of this kind run the plain forward: so many of them until the next try that trying costs little."""
        failures = self._plain.setdefault(kind, [0, 0])
        failures[0] += 1
        failures[1] = 4 ** failures[0] // 4
        self._ran_plain(reason)

    def _ran_plain(self, reason: str) -> None:
        where, what = self.name or type(self.module).__name__, f"forward of {type(self.module).__name__}"
        self.report.plain[where] = Entry(where, what, why_not=reason)


def _sees_every_call() -> bool:
    """Whether something is on that has to see what the module itself calls: tracing, transforms, global hooks."""
    return bool(
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or fx._symbolic_trace.is_fx_symbolic_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch._C._len_torch_dispatch_stack() and any(m.is_infra_mode() for m in _get_current_dispatch_mode_stack()))
        or module_state._global_forward_hooks
        or module_state._global_forward_pre_hooks
        or module_state._global_backward_hooks
        or module_state._global_backward_pre_hooks
    )


@contextlib.contextmanager
def _nothing_said() -> Iterator[list[warnings.WarningMessage]]:
    """No warning and no logged error of TorchDynamo: whatever is wrong with a call, the plain forward will say."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield warned
    finally:
        log.disabled = disabled


def _dynamo_is_off() -> str:
    if config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TorchDynamo is disabled"
    stance = eval_frame._stance.stance
    return f'torch.compiler.set_stance("{stance}")' if stance in ("force_eager", "eager_on_recompile") else ""


def _reason(error: BaseException) -> str:
    """What TorchDynamo says, in a sentence, and the line of the model that it speaks of."""
    text = str(getattr(error, "inner_exception", None) or error)
    explained = re.search(r"Explanation: *(.+)", text)
    sentence = (explained.group(1) if explained else text.strip().partition("\n")[0]).partition(". ")[0]
    places = re.findall(r'File "([^"]+)", line (\d+), in', text)
    return f"{sentence} ({Path(places[-1][0]).name}:{places[-1][1]})" if places else sentence
