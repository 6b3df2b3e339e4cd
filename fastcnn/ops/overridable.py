"""Calls of public functions by something that must see torch's own operators, or the call itself, not our kernels."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .onnx import is_exporting

F = TypeVar("F", bound=Callable)


def overridable(*tensors: str, composite: Callable | None = None) -> Callable[[F], F]:
    """Decorate a function so that others may see through it; ``tensors`` are its first parameters.

    - An argument with ``__torch_function__`` gets the call, as from any function of torch: so a Proxy of
      :func:`torch.fx.symbolic_trace` makes a node of it.
    - ``torch.jit.trace``, exports to ONNX, FLOP counters and forward-mode differentiation call ``composite`` in its
      place: the same function in torch's own operators. None: the function consists of such calls.
    """

    count = len(tensors)

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            if torch.compiler.is_compiling():
                to_onnx = composite is not None and torch.compiler.is_exporting() and is_exporting()
                return (composite if to_onnx else function)(*args, **kwargs)
            given = args[:count]
            if kwargs:
                given += tuple([kwargs[name] for name in tensors if name in kwargs])
            if has_torch_function(given):
                return handle_torch_function(call, given, *args, **kwargs)
            if composite is not None and is_seen_through():
                return composite(*args, **kwargs)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def is_seen_through() -> bool:
    """Whether a tracer, a FLOP counter or forward-mode differentiation must see torch's own operators."""
    if forward_ad._current_level >= 0 or torch._C._is_tracing():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in _get_current_dispatch_mode_stack())
