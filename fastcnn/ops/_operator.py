"""How an operator is registered: schema, fake, autograd and vmap from one set of functions, three ways to call it.

``torch.library`` alone would do, if every caller compiled. Called eagerly, an ``autograd.Function`` around the op is
cheaper than the op's own autograd kernel, and under ``torch.func`` only a Function with ``setup_context`` works;
exported, a Function would lose its gradient. So all three are built here from one ``setup_context`` and ``backward``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends

_library = torch.library.Library("fastcnn", "DEF")

# Operator -> backend -> its implementation there.
IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}
# Operator -> what its implementation of a backend hands the work to on a device, where that is not the backend itself.
_ENGINES: dict[str, Callable[[str, torch.device], str]] = {}


def define(
    schema: str,
    *,
    implementations: dict[str, Callable[..., Any]],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    vmap: Callable[..., Any],
    engine: Callable[[str, torch.device], str] | None = None,
) -> Callable[..., Any]:
    """Register ``fastcnn::<name>`` and return the function that calls it.

    Args:
        schema: ``name(arguments) -> returns``; the first argument is the tensor whose device picks the backend.
        implementations: backend name -> function of the op's arguments.
        fake: shapes, dtypes and strides of the outputs.
        setup_context: ``(ctx, inputs, output)``, saves what backward needs.
        backward: ``(ctx, *grads)`` -> one gradient (or None) for each argument.
        vmap: as for :func:`torch.library.register_vmap`.
        engine: backend, device -> what really computes, for people; the backend itself if None.
    """
    name = schema[: schema.index("(")]
    qualified = f"fastcnn::{name}"

    def implementation(*args: Any) -> Any:
        return implementations[backends.choose(name, implementations, args[0])](*args)

    IMPLEMENTATIONS[name] = implementations
    if engine is not None:
        _ENGINES[name] = engine
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    torch.library.register_vmap(qualified, vmap, lib=_library)
    op = getattr(torch.ops.fastcnn, name).default

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = op(*args)
            setup_context(ctx, args, output)
            return output

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

    Eager.backward = Transformable.backward = staticmethod(backward)  # type: ignore[method-assign]
    Transformable.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
    Eager.__name__ = Eager.__qualname__ = Transformable.__name__ = Transformable.__qualname__ = name

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if torch._C._are_functorch_transforms_active():
            return Transformable.apply(*args)
        return Eager.apply(*args) if needs_grad(*args) else op(*args)

    return call


def what_runs(name: str, device: str) -> str:
    """What computes the operator on this device as things stand: a backend, or the library that it calls.

    Raises:
        RuntimeError: the backend that is forced cannot run there.
    """
    one = torch.empty(1, device=device)
    small, large = (backends.choose(name, IMPLEMENTATIONS[name], one.expand(n)) for n in (1, 2**24))
    if name in _ENGINES:
        return _ENGINES[name](large, torch.device(device))
    return large if large == small else f"{large}; {small} on small tensors"


def needs_grad(*args: Any) -> bool:
    """Whether autograd will ask for a gradient of an op called with these arguments."""
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def double_backward(
    forward: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor, cotangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Differentiate the gradient of ``forward``, a function in plain PyTorch.

    The first backward is ``d_inputs = J(inputs)^T dy``. Given the ``cotangents`` of its results (None: zero), return
    the gradients of ``dy`` and of each input, themselves differentiable.
    """

    def gradient(dy: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(forward, *inputs)[1](dy)

    filled = tuple(torch.zeros_like(t) if c is None else c for t, c in zip(inputs, cotangents, strict=True))
    return torch.func.vjp(gradient, dy, *inputs)[1](filled)


def fold_batch(x: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """``x`` with the vmapped dimension ``dim`` (None: not mapped) merged into its first."""
    x = x.unsqueeze(0).expand(batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def unfold_batch(x: Tensor, batch_size: int) -> Tensor:
    """Undo :func:`fold_batch` on an output: the vmapped dimension comes first."""
    return x.unflatten(0, (batch_size, x.shape[0] // batch_size))
