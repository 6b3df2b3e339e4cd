"""What every operator promises, as checks and inputs that the operators' tests share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastcnn
from fastcnn import LRNParams, PoolParams, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)
FORMATS = (torch.contiguous_format, torch.channels_last)

# What the test that runs has drawn so far, for the report of its failure.
DRAWN: list[str] = []

_FORWARD = {torch.float64: 1e-14, torch.float32: 1e-6}
_BACKWARD = {torch.float64: 1e-13, torch.float32: 5e-6}


def backends_here() -> list[str]:
    """``reference``, and ``cpu-<capability>`` for every CPU capability that was compiled and that this machine has.

    Where Triton's interpreter is on (``TRITON_INTERPRET=1``), only ``triton``: a run of its own.
    """
    if fastcnn.backends.INTERPRETING:
        return ["triton"]
    library = fastcnn.backends._C
    return ["reference", *(f"cpu-{name}" for name in (library.cpu_capabilities() if library else ()))]


@contextmanager
def running_on(backend: str) -> Iterator[None]:
    """Force one of :func:`backends_here`; ``cpu`` alone is the best capability."""
    name, _, capability = backend.partition("-")
    library = fastcnn.backends._C
    with fastcnn.backends.use(name):
        previous = library.cpu_capability() if capability else ""
        try:
            if capability:
                library.set_cpu_capability(capability)
            yield
        finally:
            if capability:
                library.set_cpu_capability(previous)


def ident(value: object) -> str | None:
    """A short test id for a shape, a pool, a dtype or a memory format."""
    if isinstance(value, PoolParams):
        (kh, kw), (sh, sw), (ph, pw), (dh, dw), ceil = value.op_args()
        return f"k{kh}x{kw}s{sh}x{sw}p{ph}x{pw}d{dh}x{dw}" + "ceil" * ceil
    if isinstance(value, LRNParams):
        return f"lrn{value.size}-{value.alpha:g}-{value.beta:g}-{value.k:g}-{value.groups}"
    if isinstance(value, tuple | list):
        return "x".join(map(str, value)) or "()"
    if isinstance(value, torch.dtype | torch.memory_format | torch.layout):
        return str(value).removeprefix("torch.")
    return None if value is None else repr(value)


# -- inputs -----------------------------------------------------------------------------------------------------------


def randn(
    *shape: int,
    dtype: torch.dtype = torch.float32,
    format: torch.memory_format = torch.contiguous_format,
    seed: int = 0,
) -> Tensor:
    """Normal values; ``format`` applies to 4-D shapes and to 5-D ones (as channels_last_3d)."""
    DRAWN.append(f"randn{shape}, {ident(dtype)}, {ident(format)}, seed {seed}")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return in_format(x, format)


def rounding(dtype, tf32=False):
    """What rounding once may change, relative to the number; float32 that is multiplied as TF32 keeps 11 bits.

    torch may multiply in float32 where TF32 is allowed, and does with small tensors.
    """
    return 2**-11 if tf32 and dtype == torch.float32 else torch.finfo(dtype).eps / 2


def integers(*shape: int, dtype: torch.dtype = torch.float32, low: int = -2, high: int = 3, seed: int = 0) -> Tensor:
    """Few different integers, so that windows hold many ties and every sum is exact."""
    DRAWN.append(f"integers{shape}, {ident(dtype)}, {low} to {high - 1}, seed {seed}")
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def huge(*shape: int, format: torch.memory_format) -> Tensor:
    """A bfloat16 tensor of gigabytes that repeats a few thousand values; skips the test where memory is short."""
    if _available_bytes() < 14 * 2**30:
        pytest.skip("needs 14 GiB of free memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # would touch every page twice
    x = torch.empty(shape, dtype=torch.bfloat16, memory_format=format)
    x.as_strided((x.numel() // 2**14, 2**14), (2**14, 1)).copy_(randn(2**14, dtype=torch.bfloat16))
    return x


def _available_bytes() -> int:
    """Memory that can be had without swapping; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def in_format(x: Tensor, format: torch.memory_format) -> Tensor:
    if format == torch.channels_last and x.dim() != 4:
        format = torch.channels_last_3d if x.dim() == 5 else torch.contiguous_format
    return x.contiguous(memory_format=format)


def embedded(
    x: Tensor, order: Sequence[int] | None = None, steps: Sequence[int] | None = None, offset: int = 0
) -> Tensor:
    """The values of ``x`` with other strides: dimensions in memory ``order``, ``steps`` apart, from ``offset`` on.

    The memory between and around the values is NaN, or of ones, so that reading it shows.
    """
    order = range(x.dim()) if order is None else order
    steps = [1] * x.dim() if steps is None else steps
    strides, span = [0] * x.dim(), 1
    for d in reversed(order):
        strides[d] = span * steps[d]
        span *= max(x.shape[d], 1) * steps[d]
    memory = torch.full((offset + span + 8,), float("nan") if x.is_floating_point() else 1, dtype=x.dtype)
    view = memory.as_strided(x.shape, strides, offset)
    view.copy_(x)
    return view


def expected_strides(x: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Of an output of this shape: channels_last if the input is channels_last and not also contiguous."""
    format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    keeps = format is not None and x.is_contiguous(memory_format=format) and not x.is_contiguous()
    return torch.empty(*shape, memory_format=format if keeps else torch.contiguous_format).stride()


@dataclass(frozen=True)
class Input:
    """A tensor drawn by hypothesis, described: a failing example prints this and not its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int
    layout: str
    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        x = randn(*self.shape, dtype=self.dtype, seed=self.seed)
        if self.layout == "channels_last":
            return in_format(x, torch.channels_last)
        if self.layout == "any":
            return embedded(x, self.order, self.steps, self.offset)
        if self.layout == "expanded":
            return x.narrow(self.order[0], 0, min(1, x.shape[self.order[0]])).expand(x.shape)
        return x


@st.composite
def inputs(draw: st.DrawFn, shape: Sequence[int]) -> Input:
    """Inputs of this shape, in every dtype and with every kind of strides."""
    rank = len(shape)
    return Input(
        tuple(shape),
        draw(st.sampled_from(DTYPES)),
        draw(st.integers(0, 999)),
        draw(st.sampled_from(["contiguous", "channels_last", "any", "expanded"])),
        tuple(draw(st.permutations(range(rank)))),
        tuple(draw(st.lists(st.integers(1, 2), min_size=rank, max_size=rank))),
        draw(st.integers(0, 3)),
    )


# -- same answer ------------------------------------------------------------------------------------------------------


def assert_same_answer(out: Tensor | None, ref: Tensor | None, *, backward: bool = False) -> None:
    """``out`` is as close to ``ref``, the result in float64, as its dtype promises."""
    assert out is not None
    assert ref is not None
    assert ref.dtype == torch.float64
    assert out.shape == ref.shape, f"shape {tuple(out.shape)} instead of {tuple(ref.shape)}"
    error, size = (out.double() - ref).norm(), ref.norm()
    if out.dtype in NARROW:
        bound = 1.5 * (ref.to(out.dtype).double() - ref).norm()
    else:
        bound = (_BACKWARD if backward else _FORWARD)[out.dtype] * size
    assert error <= bound, (
        f"error {error:.3g} is above {bound:.3g} for a result of norm {size:.3g}; {worst_element(out, ref)}"
    )


def worst_element(out: Tensor, ref: Tensor) -> str:
    """Where the two differ most, what is there, how many elements are NaN, and how both lie in memory."""
    error = (out.double() - ref).abs()
    index = [int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape)]
    there = ", ".join(f"{t[tuple(index)].item():.9g}" for t in (out, ref))
    nans = f"{int(out.isnan().sum())} and {int(ref.isnan().sum())} of {out.numel()} are NaN"
    return f"worst at {index}: {there} expected; {nans}; {ident(out.dtype)} {ident(out.shape)}, strides {out.stride()}"


def assert_bitwise(out: Tensor | None, ref: Tensor | None) -> None:
    """Equal values, NaN equal to NaN."""
    assert out is not None
    assert ref is not None
    torch.testing.assert_close(out, ref, rtol=0, atol=0, equal_nan=True)


def gradients(y: Tensor, inputs: Sequence[Tensor | None], dy: Tensor) -> list[Tensor | None]:
    """Of ``sum(y * dy)``, for each input that is not None."""
    wanted = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], dy))
    return [None if t is None else next(wanted) for t in inputs]


def leaf(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """``x`` itself, its memory and strides, as a leaf that asks for its gradient; copied where ``dtype`` differs."""
    return None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()


@contextmanager
def saved_bytes() -> Iterator[dict[str, int]]:
    """Counts the bytes of the different tensors that autograd keeps: ``kept["bytes"]`` once the block has ended."""
    kept: dict[str, int] = {"bytes": 0}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield kept
    kept["bytes"] = sum(storages.values())


@contextmanager
def recorded_calls() -> Iterator[list[tuple[str, Any]]]:
    """Name and output of each op of fastcnn, as it runs."""
    calls: list[tuple[str, Any]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if func.namespace == "fastcnn":
                calls.append((str(func), output))
            return output

    with Record():
        yield calls


# -- the tail ---------------------------------------------------------------------------------------------------------


def tail_args(relu: bool = True, lrn: LRNParams | None = None, pool: PoolParams | None = None) -> tuple[Any, ...]:
    """The parameters of the tail as ``torch.ops.fastcnn.relu_lrn_max_pool2d`` takes them."""
    lrn_args = (lrn.size, lrn.alpha, lrn.beta, lrn.k, lrn.groups) if lrn else (0, 0.0, 0.0, 0.0, 1)
    return (relu, *lrn_args, *(pool.op_args() if pool else ([], [], [], [], False)))


def torch_tail(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = True,
    lrn: LRNParams | None = None,
    pool: PoolParams | None = None,
) -> Tensor:
    """The tail in torch's own operators."""
    y = x if bias is None else x + bias.view(-1, 1, 1)
    y = F.relu(y) if relu else y
    y = F.local_response_norm(y, lrn.size, lrn.alpha, lrn.beta, lrn.k) if lrn else y
    return F.max_pool2d(y, *pool.op_args()) if pool else y


def kept_argmax(x: Tensor, bias: Tensor | None, **tail: Any) -> Tensor:
    """The places of the maxima that forward keeps for backward."""
    return torch.ops.fastcnn.relu_lrn_max_pool2d(x.detach(), bias, *tail_args(**tail), True)[1]


def at_offsets(y: Tensor, argmax: Tensor, pool: PoolParams) -> Tensor:
    """The elements of ``y`` at places ``kh*KW + kw`` of the pool's windows; an error if one is outside of ``y``."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw), _ = pool.op_args()
    place = argmax.long()
    assert ((place >= 0) & (place < kh * kw)).all()
    oh = torch.arange(argmax.shape[-2]).view(-1, 1)
    ow = torch.arange(argmax.shape[-1])
    row, column = oh * sh - ph + place // kw * dh, ow * sw - pw + place % kw * dw
    assert ((row >= 0) & (row < y.shape[-2]) & (column >= 0) & (column < y.shape[-1])).all()
    return y.flatten(2).gather(2, (row * y.shape[-1] + column).flatten(2)).view(argmax.shape)


def assert_tail_answer(
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    argmax: Tensor,
    dy: Tensor,
    dx: Tensor | None,
    dbias: Tensor | None,
    relu: bool = True,
    lrn: LRNParams | None = None,
    pool: PoolParams | None = None,
) -> None:
    """The ops' results against the reference in float64, all on the CPU; without backward, ``dx`` is None.

    Which of two almost equal maxima wins may depend on the dtype. So the argmax is checked by the value it points at,
    and the gradients are those of the elements it points at.
    """
    x64, bias64 = leaf(x, torch.float64), leaf(bias, torch.float64)
    y64 = reference.relu_lrn_max_pool2d(x64, bias64, relu=relu, lrn=lrn)
    pooled64 = reference.relu_lrn_max_pool2d(x64, bias64, relu=relu, lrn=lrn, pool=pool)
    if pool is not None:
        y64 = at_offsets(y64, argmax, pool)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        assert (y64 - pooled64).norm() <= _FORWARD[wide] * pooled64.norm()
    assert_same_answer(y, pooled64.detach())
    if dx is None:
        return
    dx64, dbias64 = gradients(y64, (x64, bias64), dy.double())
    assert_same_answer(dx, dx64, backward=True)
    if bias is not None:
        assert_same_answer(dbias, dbias64, backward=True)
