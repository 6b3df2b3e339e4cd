"""TorchDynamo as the engine needs it. Whatever is private in torch is used here alone.

Its stock settings leave gaps, through which an answer could change. They are closed while a graph is made and, as they
belong to the process, under the lock under which TorchDynamo makes graphs.
"""

import contextlib
import itertools
import logging
import os
import re
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import config, eval_frame, maybe_mark_dynamic, optimize
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import guard_failures, warn_once_cache
from torch.autograd import forward_ad
from torch.nn.modules import module as module_state
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from .report import NoGraph

__all__ = ["Backend", "compiled", "is_off", "sees_every_call"]

Backend = Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]

SETTINGS = {
    "skip_nnmodule_hook_guards": False,  # stock: hooks added after the first call do not run
    "trace_numpy": False,  # stock: numpy's random numbers come from torch's generator
    "allow_unspec_int_on_nn_module": True,  # stock: `self.step += 1` makes a graph in every call
    "optimize_ddp": False,  # stock: cuts graphs at the buckets of DistributedDataParallel
    "skip_tensor_guards_with_matching_dict_tags": False,  # stock: with torch 2.11, requires_grad_() is not seen
    "use_recursive_dict_tags_for_guards": False,  # stock before torch 2.12: the same, and it was withdrawn for crashes
    "recompile_limit": 64,  # of a code object; each engine has its own
}

_count = itertools.count()


def compiled(backend: Backend, has_new_shapes: Callable[[tuple[Any, ...], dict[str, Any]], bool]) -> Callable[..., Any]:
    """A function ``(module, args, kwargs)`` that calls a module through graphs.

    Args:
        backend: makes of a graph what runs in its place.
        has_new_shapes: whether a call of this kind has a graph, but for other shapes. The next graph is then one for
            any shapes; TorchDynamo alone makes one dimension dynamic after the other.

    Raises:
        NoGraph: from the function, before anything has run.
    """
    # TorchDynamo counts graphs, and remembers shapes, by code object and name.
    code = _call.__code__.replace(co_name=f"_call_{next(_count)}")
    function = types.FunctionType(code, dict(globals()))  # to which TorchDynamo adds what it made
    context = optimize(backend, nopython=True)
    if not hasattr(context, "callback"):  # TORCHDYNAMO_DISABLE
        return function
    inner: Callable[..., Any] = context.callback  # type: ignore[assignment]
    guards: list[Any] = []
    weakref.finalize(function, _forget, code, guards).atexit = False

    def callback(frame: Any, *state: Any) -> Any:
        """Called for a frame that no graph fits."""
        if frame.f_code is not code:
            return inner(frame, *state)
        args, kwargs = frame.f_locals["args"], frame.f_locals["kwargs"]
        try:
            with (
                compile_lock,
                config.patch(SETTINGS),
                _disable_current_modes(),
                _marked_dynamic(args, kwargs) if has_new_shapes(args, kwargs) else contextlib.nullcontext(),
                _muted() as warned,
            ):
                found = inner(frame, *state)
        except Exception as error:
            raise NoGraph(_reason(error)) from error
        if any("lru_cache" in str(warning.message) for warning in warned):
            raise NoGraph("it calls a function with functools.lru_cache, which a graph would call every time")
        if found.guarded_code is None:
            raise NoGraph(is_off() or getattr(found, "skip_reason", None) or "TorchDynamo skipped it")
        guards.append(found.guarded_code.guard_manager)
        return found

    callback._torchdynamo_orig_backend = inner  # type: ignore[attr-defined]
    context.callback = callback
    return context(function)


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module._call_impl(*args, **kwargs)


def _forget(code: types.CodeType, guards: list[Any]) -> None:
    """Free what TorchDynamo made for a function that is gone: its graphs, and their guards.

    It lets go of guards only when all that they watch is gone, and torch's own functions never are: a megabyte a model.
    """
    guard_failures.pop(code, None)
    eval_frame.reset_code(code)
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        _, called, *_ = finalizer.peek() or (None, None)
        watching = getattr(getattr(called, "func", None), "__self__", None)
        if any(getattr(watching, "guard_manager", None) is manager for manager in guards):
            finalizer.detach()


@contextlib.contextmanager
def _marked_dynamic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    marked = [(t, dict(vars(t))) for t in leaves if isinstance(t, Tensor)]
    for t, _ in marked:
        maybe_mark_dynamic(t, [i for i in range(t.dim()) if i != 1])  # all but channels
    try:
        yield
    finally:
        for t, attributes in reversed(marked):  # a tensor may be there twice
            vars(t).clear()
            vars(t).update(attributes)


@contextlib.contextmanager
def _muted() -> Iterator[list[warnings.WarningMessage]]:
    """No warning and no logged error of TorchDynamo: whatever is wrong with a call, the plain forward will say."""
    log, already_warned = logging.getLogger("torch._subclasses.fake_tensor"), set(warn_once_cache)
    disabled, log.disabled = log.disabled, True
    warn_once_cache.clear()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield warned
    finally:
        log.disabled = disabled
        warn_once_cache.clear()
        warn_once_cache.update(already_warned)


def _reason(error: BaseException) -> str:
    """What TorchDynamo says, in a sentence, and the line of the model that it speaks of."""
    text = str(getattr(error, "inner_exception", None) or error)
    explained = re.search(r"Explanation: *(.+)", text)
    sentence = (explained.group(1) if explained else text.strip().partition("\n")[0]).partition(". ")[0]
    if not isinstance(error, TorchDynamoException):
        sentence = f"{type(error).__name__}: {sentence}"
    places = re.findall(r'File "([^"]+)", line (\d+), in', text)
    return f"{sentence} ({Path(places[-1][0]).name}:{places[-1][1]})" if places else sentence


def sees_every_call() -> bool:
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


def is_off() -> str:
    """Why TorchDynamo makes no graphs in this process; empty if it does."""
    if config.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        return "TorchDynamo is disabled"
    stance = eval_frame._stance.stance
    return f'torch.compiler.set_stance("{stance}")' if stance in ("force_eager", "eager_on_recompile") else ""
