"""How an operator is registered: schema, fake, autograd and vmap from one set of functions, three ways to call it.

The functions take the operator's parameters as one object. Only torch sees them one by one: the dispatcher knows no
other arguments than tensors, numbers and lists of numbers.

``torch.library`` alone would do, if every caller compiled. Called eagerly, an ``autograd.Function`` around the op is
cheaper than the op's own autograd kernel, and under ``torch.func`` only a Function with ``setup_context`` works;
exported, a Function would lose its gradient. So all three are built here from one ``setup_context`` and ``backward``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import profiler
from torch.nn import Parameter

from .. import backends

Implementation = Callable[..., Any]  # of the operator's arguments


class Params(Protocol):
    """The parameters of an operator; see :mod:`fastcnn.params`."""

    SCHEMA: ClassVar[str]

    def op_args(self) -> tuple[Any, ...]: ...

    @staticmethod
    def from_op(*args: Any, **kwargs: Any) -> Any: ...


_library = torch.library.Library("fastcnn", "DEF")


def _keys(*names: str) -> int:
    return reduce(or_, (DispatchKeySet(getattr(DispatchKey, name)) for name in names)).raw_repr()


# Dispatch keys, the second of each under inference mode.
_USUAL_THREAD = {_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect")}
_USUAL_TENSOR = {_keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU"), _keys("CPU", "AutocastCPU")}

# Operator -> backend -> its implementation there.
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}
# Operator -> what its implementation of a backend hands the work to on a device, where that is not the backend itself.
_ENGINES: dict[str, Callable[[str, torch.device], str]] = {}


def define(
    schema: str,
    params: type[Params],
    *,
    implementations: dict[str, Implementation],
    fake: Implementation,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
    vmap: Callable[..., Any] | int,
    select: Mapping[str, Callable[..., Implementation]] = MappingProxyType({}),
    engine: Callable[[str, torch.device], str] | None = None,
) -> Callable[..., Any]:
    """Register ``fastcnn::<name>`` and return the function that calls it.

    Throughout, the parameters count as one argument.

    Args:
        schema: ``name(arguments) -> returns``, with ``{params}`` for all of the parameters; the first argument is the
            tensor whose device picks the backend.
        params: the class of the parameters.
        implementations: backend name -> function of the arguments.
        fake: shapes, dtypes and strides of the outputs.
        setup_context: ``(ctx, inputs, output)``, saves what backward needs.
        backward: ``(ctx, *grads)`` -> the gradients of the first arguments; those of the others are None. Without it,
            a tensor that asks for a gradient is refused.
        vmap: as for :func:`torch.library.register_vmap`; or, where the op treats every image alone, how many of its
            first arguments are tensors, whose mapped dimension then joins the batch.
        select: backend name -> its implementation and the arguments -> the function that runs in its place.
        engine: backend, device -> what really computes, for people; the backend itself if None.
    """
    name = schema[: schema.index("(")]
    qualified = f"fastcnn::{name}"
    first = schema[: schema.index("{params}")].count(",")
    last = first + params.SCHEMA.count(",") + 1
    schema = schema.format(params=params.SCHEMA)
    count = schema[: schema.index("->")].count(",") + 1
    from_op = params.from_op
    save = setup_context or _refuse_gradients(schema)

    def gathered(args: Sequence[Any]) -> tuple[Any, ...]:
        return *args[:first], from_op(*args[first:last]), *args[last:]

    def spread(args: Sequence[Any]) -> tuple[Any, ...]:
        return *args[:first], *args[first].op_args(), *args[first + 1 :]

    def implementation(*args: Any) -> Any:
        backend = backends.choose(name, implementations, args[0])
        run = implementations[backend]
        return (select[backend](run, *args) if backend in select else run)(*args)

    def below_autograd(*args: Any) -> Any:
        return implementation(*args) if _needs_no_dispatcher(args) else op(*spread(args))

    def setup_gathered(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save(ctx, gathered(inputs), output)

    def padded_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = backward(ctx, *grads) if backward else ()
        return *found, *(None,) * (count - len(found))

    def vmap_rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        if isinstance(vmap, int):
            tensors = zip(args[:vmap], in_dims, strict=False)
            folded = (None if x is None else fold_batch(x, dim, info.batch_size) for x, dim in tensors)
            outputs = op(*folded, *args[vmap:])
            if isinstance(outputs, Tensor):
                return unfold_batch(outputs, info.batch_size), 0
            return tuple(unfold_batch(y, info.batch_size) for y in outputs), (0,) * len(outputs)
        in_dims = *in_dims, *(None,) * (count - len(in_dims))
        return vmap(info, (*in_dims[:first], None, *in_dims[last:]), *gathered(args))

    IMPLEMENTATIONS[name] = implementations
    if engine is not None:
        _ENGINES[name] = engine
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, lambda *args: implementation(*gathered(args)), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, lambda *args: fake(*gathered(args)), lib=_library)
    torch.library.register_autograd(qualified, padded_backward, setup_context=setup_gathered, lib=_library)
    torch.library.register_vmap(qualified, vmap_rule, lib=_library)
    op = getattr(torch.ops.fastcnn, name).default

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = below_autograd(*args)
            save(ctx, args, output)
            return output

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op(*args)

    # Eager has fewer arguments than the op; autograd ignores the Nones that are left over.
    Eager.backward = Transformable.backward = staticmethod(padded_backward)  # type: ignore[method-assign]
    Transformable.setup_context = staticmethod(setup_gathered)  # type: ignore[method-assign]
    Eager.__name__ = Eager.__qualname__ = Transformable.__name__ = Transformable.__qualname__ = name

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*spread(args))
        if torch._C._are_functorch_transforms_active():
            return Transformable.apply(*spread(args))
        return Eager.apply(*args) if needs_grad(*args) else below_autograd(*args)

    return call


def _needs_no_dispatcher(args: Sequence[Any]) -> bool:
    """Whether below autograd the dispatcher would only call the implementation, which alone takes half the time.

    Its keys tell: modes and tracers add theirs to the thread's; meta tensors, functional and zero ones have others.
    """
    if torch._C._dispatch_tls_local_include_set().raw_repr() not in _USUAL_THREAD or profiler._is_profiler_enabled:
        return False
    for a in args:
        if isinstance(a, Tensor) and not (
            type(a) in (Tensor, Parameter) and torch._C._dispatch_keys(a).raw_repr() in _USUAL_TENSOR
        ):
            return False
    return True


def _refuse_gradients(schema: str) -> Callable[..., None]:
    """The ``setup_context`` of an operator without a derivative."""
    name, _, rest = schema.partition("(")
    arguments = [argument.split()[-1] for argument in rest[: rest.index(")")].split(", ")]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        for argument, value, needed in zip(arguments, inputs, ctx.needs_input_grad, strict=False):
            if needed and isinstance(value, Tensor):
                raise RuntimeError(
                    f"{name}(): it is not differentiable with respect to argument '{argument}', which cannot have "
                    "requires_grad True"
                )

    return setup_context


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
    if torch.is_grad_enabled():
        for a in args:
            if isinstance(a, Tensor) and a.requires_grad:  # under inference mode grad may be enabled
                return torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
    return False


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


def one_by_one(
    op: Callable[..., tuple[Tensor, ...]], info: Any, in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A vmap rule: call ``op`` for each element of the batch, and stack what it returns."""

    def element(i: int) -> tuple[Tensor, ...]:
        return op(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=False)))

    columns = zip(*(element(i) for i in range(info.batch_size)), strict=True)
    results = tuple(torch.stack(column) for column in columns)
    return results, (0,) * len(results)
