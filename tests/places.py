"""Where operators run, and how a promise is spread over operators and places.

A promise is a test of ``operator_promises.py`` or ``kernel_promises.py``, marked ``@over(...)``. The folders that keep
it (``ops``, ``arm``, ``interpreter``, ``gpu``, ``simt``) import it into their ``test_promises.py``, which says in
``HERE`` which places they have; ``conftest.py`` then makes a test of it for each place, each case of each operator in
``operators.py``, each dtype and each memory format.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import torch
from promises import backends_here, gradients, ident, recorded_calls, running_on
from torch import Tensor

if TYPE_CHECKING:
    from operators import Case, Operator

_Test = TypeVar("_Test", bound=Callable[..., None])


@dataclass
class Results:
    """What a place makes of the tensors of a case, all on the CPU.

    Args:
        argmax: the offsets in the windows that are kept for backward, where there is a pool.
        dy: the gradient that ``gradients`` are computed from; None where the operator has no gradient.
        gradients: of each tensor, None where it has none; empty where the place or the operator has no backward.
    """

    y: Tensor
    argmax: Tensor | None
    dy: Any
    gradients: list[Tensor | None]

    @property
    def bits(self) -> list[Tensor]:
        return [t for t in (self.y, self.argmax, *self.gradients) if t is not None]


@dataclass(frozen=True)
class Place:
    """The library with one backend forced, on one device; ``name`` is one of :func:`promises.backends_here`'s."""

    name: str
    device: str = "cpu"
    has_autograd = True

    @property
    def is_slow(self) -> bool:
        return self.name == "triton" and self.device == "cpu"

    @contextmanager
    def in_use(self) -> Iterator[Place]:
        with running_on(self.name):
            yield self

    def put(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tensors on the device, and as they lie in memory; those on the CPU themselves."""
        return [t if t is None or self.device == "cpu" else t.to(self.device) for t in tensors]

    def run(self, case: Case, tensors: Sequence[Tensor | None], dy: Tensor | None = None) -> Results:
        """Forward, and backward from ``dy``, or else from what the operator's record draws."""
        if not case.op.differentiable:
            return Results(case(*self.put(tensors)).cpu(), None, None, [])
        ours = case.leaves(self.put(tensors))
        with recorded_calls() if case.pool else nullcontext() as calls:
            y = case(*ours)
        argmax = calls[-1][1][1].reshape(y.shape) if case.pool else None
        dy = case.op.draw_gradient(y) if dy is None else dy
        found = gradients(y, [t if t is not None and t.requires_grad else None for t in ours], *self.put([dy]))
        y, argmax, *found = (None if t is None else t.detach().cpu() for t in (y, argmax, *found))
        return Results(y, argmax, dy.cpu(), found)


@dataclass(frozen=True)
class Places:
    """Those of a folder.

    Args:
        kind: cases that are named ``list@kind`` are for these places instead of those that are named ``list``.
        every: also each capability of a CPU.
        kernels: all but plain PyTorch, where there are others: for long lists of sizes.
        each: each backend once, at its best capability: for what does not depend on kernels.
    """

    kind: str
    every: tuple[Place, ...]
    kernels: tuple[Place, ...] = ()
    each: tuple[Place, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", self.kernels or self.every)
        object.__setattr__(self, "each", self.each or self.every)

    @property
    def best(self) -> tuple[Place, ...]:
        return self.each[-1:]


def on_cpu() -> Places:
    names = backends_here()
    each = dict.fromkeys(name.partition("-")[0] for name in names)
    every, kernels, each = (tuple(map(Place, chosen)) for chosen in (names, names[1:], each))
    return Places("cpu", every, kernels, each)


@dataclass(frozen=True)
class Promise:
    cases: str | Callable[[Operator, str], list[Case]]
    places: str
    parameters: dict[str, Sequence[Any]] = field(default_factory=dict)

    def parametrize(self, metafunc: pytest.Metafunc, here: Places) -> None:
        from operators import OPERATORS

        name, runs = metafunc.function.__name__, []
        for op in OPERATORS:
            if name in op.except_for:
                continue
            wanted = "each" if op.has_no_capabilities and self.places in ("every", "kernels") else self.places
            for place in getattr(here, wanted):
                cases = self.cases(op, here.kind) if callable(self.cases) else op.of(self.cases, here.kind)
                runs += [pytest.param(place, case, id=f"{place.name}-{case.id}") for case in cases]
        metafunc.parametrize(("place", "case"), runs, indirect=True)
        for parameter, values in self.parameters.items():
            metafunc.parametrize(parameter, values, ids=ident)


def over(
    cases: str | Callable[[Operator, str], list[Case]] = "usual",
    places: str = "every",
    *,
    dtypes: Sequence[torch.dtype] = (),
    formats: Sequence[torch.memory_format] = (),
) -> Callable[[_Test], _Test]:
    """A promise over places, cases, dtypes and memory formats.

    Args:
        cases: of every operator: the name of a list of its record, or a function that makes them for a kind of places.
        places: "every", "kernels", "each" or "best" of :class:`Places`.
    """
    parameters = {"dtype": dtypes, "format": formats}

    def mark(test: _Test) -> _Test:
        test.promise = Promise(cases, places, {k: v for k, v in parameters.items() if v})  # type: ignore[attr-defined]
        return test

    return mark


# Promises about gradients.
GRADIENTS = tuple(
    f"test_{name}"
    for name in (
        "gradient_in_any_memory_format",
        "backward_keeps_little",
        "any_subset_of_gradients",
        "gradcheck_and_gradgradcheck",
        "vmap_of_backward",
        "func_transforms_nest",
        "double_backward_is_that_of_torch",
        "checkpointing_and_retained_graphs",
        "change_in_place_before_backward",
    )
)

# What is the same whatever runs in the ops, by the reason.
LEFT_TO_OPS = {
    "tracers, transforms and autograd see the same ops, whatever runs in them: tests/ops": [
        "compile_without_graph_break",
        "compile_with_inductor",
        "export_with_gradients",
        "autocast_keeps_the_dtype_of_the_input",
        "vmap",
        "vmap_of_backward",
        "func_transforms_nest",
        "double_backward_is_that_of_torch",
        "gradcheck_and_gradgradcheck",
        "checkpointing_and_retained_graphs",
        "change_in_place_before_backward",
        "layer_survives_pickling_and_deepcopy",
        "meta_tensors_have_shape_and_strides",
    ],
    "arguments are checked before there is a backend: tests/ops": [
        "wrong_rank_raises_as_torch",
        "other_dtypes_raise",
        "sparse_input_raises",
        "input_that_is_no_tensor_raises_as_torch",
    ],
}


def leave_out(module: dict[str, Any], reasons: dict[str, Sequence[str]]) -> None:
    """Of the promises that a folder imported, those that it does not keep, by the reason."""
    for name in itertools.chain(*reasons.values()):
        del module[f"test_{name}"]
