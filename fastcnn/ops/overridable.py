"""Calls of public functions by something that must see torch's own operators, or the call itself, not our kernels."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from .onnx import is_exporting

F = TypeVar("F", bound=Callable)


def overridable(composite: Callable | None = None) -> Callable[[F], F]:
    """Decorate a function of tensors so that others may see through it.

    - An argument with ``__torch_function__`` gets the call, as from any function of torch: so a Proxy of
      :func:`torch.fx.symbolic_trace` makes a node of it.
    - ``torch.jit.trace``, exports to ONNX and forward-mode differentiation call ``composite`` in its place: the same
      function in torch's own operators. None: the function consists of such calls.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            if torch.compiler.is_compiling():
                to_onnx = composite is not None and torch.compiler.is_exporting() and is_exporting()
                return (composite if to_onnx else function)(*args, **kwargs)
            if has_torch_function(args) or (kwargs and has_torch_function(tuple(kwargs.values()))):
                return handle_torch_function(call, (*args, *kwargs.values()), *args, **kwargs)
            if composite is not None and (forward_ad._current_level >= 0 or torch.jit.is_tracing()):
                return composite(*args, **kwargs)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
