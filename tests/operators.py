"""One record for each operator: what it is called with, compared with, and keeps for backward.

The promises of ``operator_promises.py`` and ``kernel_promises.py`` are tested on every record here. A new operator is a
subclass of :class:`Operator`, whose methods say how its ops are called and checked, and lists of cases by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from places import GRADIENTS, Place, Results
from promises import (
    DTYPES,
    FORMATS,
    NARROW,
    Input,
    assert_bitwise,
    assert_same_answer,
    assert_tail_answer,
    at_offsets,
    expected_strides,
    gradients,
    ident,
    in_format,
    inputs,
    integers,
    leaf,
    randn,
    rounding,
    tail_args,
    torch_tail,
)
from torch import Tensor

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams, reference
from fastcnn.params import AugmentParams, BatchNormParams, ConvParams, opmath

INF, NAN = float("inf"), float("nan")
Tensors = Sequence[Tensor | None]


@dataclass(frozen=True)
class Case:
    """A call of an operator.

    Args:
        shapes: of its tensors, input first; None where there is none.
        kwargs: the other arguments.
        frozen: whether all tensors but the input ask for no gradient.
        float32_bias: beside narrow input too.
        format: of the input, where a promise is not for every memory format.
    """

    op: Operator
    name: str
    shapes: tuple[tuple[int, ...] | None, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    frozen: bool = False
    float32_bias: bool = False
    format: torch.memory_format = torch.contiguous_format

    @property
    def id(self) -> str:
        return "-".join(filter(None, (self.op.name, self.name)))

    @property
    def lrn(self) -> LRNParams | None:
        return self.op.tail(self.kwargs).get("lrn")

    @property
    def pool(self) -> PoolParams | None:
        return self.op.tail(self.kwargs).get("pool")

    def __call__(self, *tensors: Tensor | None) -> Any:
        return self.op.function(*tensors, **self.kwargs)

    def counterpart(self, *tensors: Tensor | None) -> Any:
        """Torch's counterpart, which knows no groups of LRN."""
        return self.op.counterpart(*tensors, **{k: v for k, v in self.kwargs.items() if k != "groups" or v != 1})

    def tensors(
        self, dtype: torch.dtype = torch.float32, format: torch.memory_format | None = None, seed: int = 0
    ) -> list[Tensor | None]:
        return self.op.draw(self, dtype, self.format if format is None else format, seed)

    def leaves(self, tensors: Tensors, dtype: torch.dtype | None = None) -> list[Any]:
        """The tensors, those that are trained as leaves."""
        if not self.op.differentiable:
            return list(tensors)
        return [leaf(t, dtype) if i == 0 or not self.frozen else t for i, t in enumerate(tensors)]

    def apart(self) -> list[Tensor | None]:
        """In float64, values that no small step brings to a tie or to the corner of ReLU."""
        return [None if s is None else apart(*s, seed=i) / (11 if i else 1) for i, s in enumerate(self.shapes)]

    def layer(self) -> torch.nn.Module:
        return self.op.layer(self).requires_grad_(not self.frozen)


def asked(tensors: Tensors) -> list[Tensor | None]:
    """Those that a gradient is asked for, None instead of the others."""
    return [t if t is not None and t.requires_grad else None for t in tensors]


def apart(*shape: int, seed: int = 0) -> Tensor:
    values = torch.linspace(-1, 2, torch.Size(shape).numel() + 1, dtype=torch.float64)[1:]
    order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(seed))
    return (values[order] + 1e-3).view(shape)


class Operator:
    """What the promises ask of an operator."""

    name: str
    # Lists of cases by name; "list@kind" is for the places of that kind instead of "list",
    # and "usual" where there is none.
    cases: dict[str, list[Case]]
    # Promises that it does not make, and why.
    except_for: dict[str, str] = {}  # noqa: RUF012
    # Whether its C++ kernels are the same for every CPU, so that one capability is enough.
    has_no_capabilities = False
    # Whether the same numbers in other strides give the same bits; torch's own convolutions and sums do not.
    exact = True
    # Whether its bits are the same for every number of threads.
    ignores_threads: Callable[[Place], bool] = lambda self, place: True
    # Whether its tensors have gradients.
    differentiable = True
    # How many inputs hypothesis draws.
    examples = 60
    # Of the tensors that the layer is called with; the others are its parameters.
    layer_inputs = 1
    # Dtypes of the input, those that only torch's counterpart has, and those that are handed on to it.
    input_dtypes: tuple[torch.dtype, ...] = DTYPES
    only_torch_has: tuple[torch.dtype, ...] = ()
    torch_runs: tuple[torch.dtype, ...] = ()
    wrong_ranks: tuple[tuple[int, ...], ...] = ()
    rank_error: tuple[type[Exception], str]
    # Dimensions that vmap takes of its tensors.
    in_dims: tuple[tuple[int | None, ...], ...] = ((0,), (1,), (2,), (-1,))

    def mapped(self, case: Case) -> tuple[tuple[int | None, ...], ...]:
        return self.in_dims

    # Lists without cases where kernels run in an interpreter, for want of time.
    too_slow: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.cases = {**self.make_cases(), **{f"{name}@interpreter": [] for name in self.too_slow}}

    def make_cases(self) -> dict[str, list[Case]]:
        raise NotImplementedError

    def case(self, name: str, *shapes: Any, **options: Any) -> Case:
        of_case = {k: options.pop(k) for k in ("frozen", "float32_bias", "format") if k in options}
        return Case(self, name, shapes, options, **of_case)

    def any_case(self) -> st.SearchStrategy[tuple[Case, Input]]:
        """A case with sizes and arguments that suit each other, and its input."""
        raise NotImplementedError

    def check_any(self, place: Place, case: Case, x: Tensor) -> None:
        """With such an input, whatever its values."""
        self.check(place, case, [x, *case.tensors(x.dtype)[1:]])

    def of(self, name: str, kind: str) -> list[Case]:
        return self.cases.get(f"{name}@{kind}", self.cases.get(name, self.cases["usual"]))

    def in_form(self, case: Case, dtype: torch.dtype | None, format: torch.memory_format | None) -> Case:
        """The case for tests of this dtype and memory format, if they are arguments and not the input's."""
        return case

    def varied(self, case: Case, batch: int, width: int) -> Case:
        """The case with more or fewer pictures, of another width."""
        (_, channels, height, _), *others = case.shapes
        return replace(case, shapes=((batch, channels, height, width), *others))

    def output_strides(self, case: Case, x: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
        return expected_strides(x, shape)

    @property
    def op(self) -> Any:
        return getattr(torch.ops.fastcnn, self.name).default

    @property
    def backward_op(self) -> Any:
        return getattr(torch.ops.fastcnn, f"{self.name}_backward").default

    def function(self, *tensors: Tensor | None, **kwargs: Any) -> Any:
        raise NotImplementedError

    def counterpart(self, *tensors: Tensor | None, **kwargs: Any) -> Any:
        raise NotImplementedError

    def layer(self, case: Case) -> torch.nn.Module:
        raise NotImplementedError

    def tail(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The parts of the tail that it consists of, if it does."""
        return {}

    def also_returns(self, case: Case) -> int:
        """Outputs of its op beside the first that are computed whatever is kept for backward."""
        return 0

    def normalizing(self, shape: Sequence[int], lrn: LRNParams, every_part: bool = False) -> list[Case]:
        """Its cases with this LRN, if it has one; with every choice of the other parts, or only the usual."""
        return []

    def pooling(self, shape: Sequence[int], pool: PoolParams) -> list[Case]:
        """Its cases with this pool and without LRN, if it has a pool."""
        return []

    def draw(self, case: Case, dtype: torch.dtype, format: torch.memory_format, seed: int) -> list[Tensor | None]:
        shape, *others = case.shapes
        wide = torch.float32 if case.float32_bias and dtype in NARROW else dtype
        drawn = [None if s is None else randn(*s, dtype=wide, seed=seed + i) for i, s in enumerate(others, 1)]
        return [randn(*shape, dtype=dtype, format=format, seed=seed), *drawn]

    def draw_gradient(self, y: Tensor) -> Tensor:
        """Mostly of one sign, or little would be left of sums."""
        return 2 + randn(*y.shape, dtype=y.dtype, seed=9)

    def forward_args(self, case: Case, tensors: Tensors) -> tuple[Any, ...]:
        """Of the registered op, so that it keeps what backward needs."""
        raise NotImplementedError

    def backward_args(self, case: Case, tensors: Tensors, kept: tuple[Tensor, ...], dy: Tensor) -> tuple[Any, ...]:
        """Of the registered op of backward, from the outputs of forward."""
        raise NotImplementedError

    def forward(self, case: Case, tensors: Tensors) -> tuple[Tensor, ...]:
        found = self.op(*self.forward_args(case, tensors))
        return found if isinstance(found, tuple) else (found,)

    def backward(self, case: Case, tensors: Tensors, kept: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
        found = self.backward_op(*self.backward_args(case, tensors, kept, dy))
        return found if isinstance(found, tuple) else (found,)

    def check(self, place: Place, case: Case, tensors: Tensors, dy: Tensor | None = None) -> Results | None:
        """Output, its strides, dtype and all gradients, against the reference, as nearly as is promised."""
        raise NotImplementedError

    def agree(self, place: Place, case: Case, tensors: Tensors, dy: Tensor | None = None) -> None:
        """The same where the tensors lie in memory in a way that matters to the reference's accuracy too."""
        self.check(place, case, tensors, dy)

    def keeps(self, case: Case, tensors: Tensors, y: Tensor) -> tuple[list[Tensor], int]:
        """For backward: of the tensors of a call those, themselves, and how many bytes of its own."""
        raise NotImplementedError

    def assert_same(self, place: Place, ours: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
        """The same numbers computed twice, in other ways or strides."""
        for a, b in zip(ours, expected, strict=True):
            if not self.exact:
                torch.testing.assert_close(a, b)
            elif b is not None and b.dim() == 1 and place.name == "reference":  # torch's sum depends on strides
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            elif b is not None:
                assert_bitwise(a, b)


# -- the tail and its parts -------------------------------------------------------------------------------------------

ALEXNET_LRN = LRNParams(5, 1e-4, 0.75, 2.0)
STRONG = LRNParams(5, 0.5, 0.75, 1.0)  # the denominator matters as much as the numerator
POOL = PoolParams(3, 2)
WIDE = PoolParams(17, 1, 8)  # more than 256 places: the argmax takes int32
POOLS = [
    POOL,
    PoolParams(2, 2),
    PoolParams(3, 1),
    PoolParams(3, 1, 1),
    PoolParams(5, 3, 2),
    PoolParams(1),
    PoolParams(1, 3),
    PoolParams((2, 3)),
    PoolParams((1, 3), (2, 1), (0, 1)),
    PoolParams((3, 1), 1, (1, 0)),
    PoolParams(2, 5),
    PoolParams(3, 2, 1),
    PoolParams(3, 2, 1, 2),
    PoolParams((3, 2), 2, 1, (1, 3)),
    PoolParams(2, 2, 1, 3),  # windows whose first row is in the padding
    PoolParams(3, 2, 0, 1, True),
    PoolParams(3, 2, 1, 1, True),
    PoolParams(2, 3, 1, 2, True),
    PoolParams((16, 16), 3, 8),  # the most places that one byte can name
    WIDE,
    PoolParams((1, 257), 1, (0, 128)),
]
GPU_LEAVES_OUT = POOLS[2], POOLS[4], POOLS[5], POOLS[9], POOLS[11], POOLS[14]  # like others, with less time
NONE = {"relu": False, "lrn": None, "pool": None}
STAGE = {"relu": True, "lrn": STRONG, "pool": POOL}
PARTS = [
    {"relu": relu, "lrn": lrn, "pool": pool}
    for relu, lrn, pool in itertools.product((False, True), (None, STRONG), (None, POOL))
]


def parts_id(tail: dict[str, Any]) -> str:
    return "+".join(name for name, part in tail.items() if part) or "copy"


class MemoryBound(Operator):
    """The tail, or a part of it: one check for all, and one call of the emulator."""

    # Their launchers copy what is not dense, and what is around the kernels is that of the C++ ones.
    too_slow = ("parts", "kept", "strides", "opcheck", "dtypes", "misaligned", "one", "images")

    def ignores_threads(self, place: Place) -> bool:
        """Torch's own power and sum, in the reference, differ by where each thread's part ends."""
        return place.name != "reference"

    def check_any(self, place: Place, case: Case, x: Tensor) -> None:
        super().check_any(place, case, x)
        tensors = [x, *case.tensors(x.dtype)[1:]]
        if case.lrn is None or case.lrn.groups == 1:
            expected = case.counterpart(*(t if t is None else t.double() for t in tensors)).to(x.dtype)
            torch.testing.assert_close(case(*tensors), expected)

    def keeps(self, case: Case, tensors: Tensors, y: Tensor) -> tuple[list[Tensor], int]:
        """What it is called with, and the offsets of the maxima: a byte each, if there are but 256."""
        kh, kw = case.pool.op_args()[0] if case.pool else (0, 0)
        size = 0 if not case.pool else 1 if kh * kw <= 256 else 4
        return [t for t in tensors if t is not None], size * y.numel()

    def check(self, place: Place, case: Case, tensors: Tensors, dy: Tensor | None = None) -> Results:
        if case.pool and tensors[0].dim() == 3:
            return self.check_bits_of_torch(place, case, tensors, dy)
        results, (x, bias) = place.run(case, tensors, dy), (*tensors, None)[:2]
        dx, dbias = (*results.gradients, None)[:2]
        self.check_forward_alone(place, case, tensors, results)
        assert_tail_answer(x, bias, results.y, results.argmax, results.dy, dx, dbias, **self.tail(case.kwargs))
        assert results.y.dtype == x.dtype
        assert results.y.stride() == expected_strides(x, results.y.shape)
        return results

    def check_forward_alone(self, place: Place, case: Case, tensors: Tensors, results: Results) -> None:
        """Where nothing is kept for backward, the values are the same."""
        if case.pool and place.has_autograd and not (place.is_slow and case.lrn):
            assert_bitwise(case(*place.put([None if t is None else t.detach() for t in tensors])).cpu(), results.y)

    def before_pool(self, case: Case, tensors: Tensors) -> Tensor:
        """What torch pools."""
        return torch_tail(*tensors, relu=self.tail(case.kwargs)["relu"])

    def check_bits_of_torch(self, place: Place, case: Case, tensors: Tensors, dy: Tensor | None = None) -> Results:
        """Without LRN there is nothing to round: values and offsets equal torch's, and so do gradients of integers."""
        theirs = case.leaves(tensors)
        expected = case.counterpart(*theirs)
        if dy is None:  # in 16 bits small, so that sums are exact
            low, high = (-2, 3) if expected.dtype in NARROW else (1, 62)
            dy = integers(*expected.shape, dtype=expected.dtype, low=low, high=high, seed=1)
        results = place.run(case, tensors, dy)
        self.check_forward_alone(place, case, tensors, results)
        assert_bitwise(results.y, expected.detach())
        assert results.y.stride() == expected_strides(tensors[0], expected.shape)
        if case.pool and not has_empty_windows(case.pool, *tensors[0].shape[-2:]):
            before = self.before_pool(case, tensors)
            _, indices = F.max_pool2d(before, *case.pool.op_args(), return_indices=True)
            assert_bitwise(reference.flat_indices(results.argmax, before.shape[-1], case.pool), indices)
        for ours, gradient in zip(results.gradients, gradients(expected, theirs, dy), strict=True):
            if gradient is not None:
                assert_bitwise(ours, gradient)
        if results.gradients and (tensors[0].dim() == 4 or self is max_pool2d):  # the tail of an image is a composition
            assert results.gradients[0].stride() == expected_strides(tensors[0], tensors[0].shape)
        return results


@st.composite
def pools(draw: st.DrawFn, height: int, width: int) -> PoolParams:
    kernel = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    stride = draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    pool = PoolParams(kernel, stride, padding, draw(st.sampled_from([1, 1, 2, 3])), draw(st.booleans()))
    try:
        pool.output_size(height, width)
    except RuntimeError:  # an empty output
        assume(False)
    return pool


def has_empty_windows(pool: PoolParams, height: int, width: int) -> bool:
    """A dilated window can straddle the whole map; torch then names an offset outside of it."""
    axes = zip((height, width), pool.output_size(height, width), *pool.op_args()[:4], strict=True)
    return not all(
        any(0 <= o * stride - padding + i * dilation < size for i in range(min(kernel, size + padding)))
        for size, out, kernel, stride, padding, dilation in axes
        for o in range(out)
    )


class LRN(MemoryBound):
    name = "lrn"
    function, counterpart = staticmethod(FF.local_response_norm), staticmethod(F.local_response_norm)
    only_torch_has = (torch.int64, torch.uint8)
    wrong_ranks, rank_error = ((3, 4), (3,), ()), (ValueError, r"3D or higher.*\(got {} dimensions\)")

    def tail(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"relu": False, "lrn": LRNParams(**kwargs), "pool": None}

    def layer(self, case: Case) -> torch.nn.Module:
        return fastcnn.nn.LocalResponseNorm(**case.kwargs)

    def forward_args(self, case: Case, tensors: Tensors) -> tuple[Any, ...]:
        return (*tensors, *case.lrn.op_args())

    def backward_args(self, case: Case, tensors: Tensors, kept: tuple[Tensor, ...], dy: Tensor) -> tuple[Any, ...]:
        return (dy, *tensors, *case.lrn.op_args())

    def lrn_case(self, shape: Sequence[int], lrn: LRNParams = STRONG, **options: Any) -> Case:
        return self.case(f"{ident(tuple(shape))}-{ident(lrn)}", tuple(shape), **asdict(lrn), **options)

    def normalizing(self, shape: Sequence[int], lrn: LRNParams, every_part: bool = False) -> list[Case]:
        return [self.lrn_case(shape, lrn)]

    def any_case(self) -> st.SearchStrategy[tuple[Case, Input]]:
        @st.composite
        def cases(draw: st.DrawFn) -> tuple[Case, Input]:
            groups, rank = draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([4, 4, 4, 3, 5]))
            channels = groups * draw(st.integers(1, 20))
            spatial = [draw(st.integers(1, 20)), *(draw(st.integers(1, 4)) for _ in range(rank - 3))]
            shape = [draw(st.integers(0, 3)), channels, *draw(st.permutations(spatial))]
            beta, k = draw(st.sampled_from([0.75, 0.5, 1.0, 0.6, 2.0])), draw(st.sampled_from([1.0, 2.0]))
            lrn = LRNParams(draw(st.integers(1, channels + 3)), draw(st.floats(0, 0.5)), beta, k, groups)
            return self.lrn_case(shape, lrn), draw(inputs(shape))

        return cases()

    def make_cases(self) -> dict[str, list[Case]]:
        of, groups = self.lrn_case, LRNParams(5, 0.5, 0.75, 1.0, 2)
        shapes = (2, 96, 7, 13), (1, 17, 5, 31), (3, 3, 9, 41), (2, 5, 33), (1, 6, 2, 3, 5)
        small = (2, 16, 3, 5), (1, 17, 2, 3), (3, 5, 7), (1, 6, 2, 3, 2), (1, 1, 1, 1)
        others = LRNParams(2, 0.5, 0.6, 2.0), LRNParams(40, 9.0, 0.5, 1.0)
        emulated = (2, 48, 7, 9), (2, 37, 9, 17), (3, 1, 5, 5), (1, 600, 3, 3)
        ranks = (3, 5, 1), (1, 17, 40), (2, 6, 3, 2, 5), (2, 1, 1, 1, 1), (1, 5, 2, 2, 1, 3)
        return {
            "usual": [self.case("", (2, 17, 5, 7), **asdict(STRONG))],
            "usual@interpreter": [of((2, 6, 5, 4))],
            "single": [of((6, 5, 7))],
            "images": [of((6, 5, 7))],
            "answers": [of(shape, lrn) for shape in shapes for lrn in (ALEXNET_LRN, STRONG)]
            + [of(shape, LRNParams(size, 0.5)) for shape in ranks for size in (4, 5)],
            "answers@interpreter": [of(shape) for shape in small],
            "answers@gpu": [of(shape) for shape in ((2, 17, 9, 31), (1, 256, 27, 27), (5, 3, 55, 55))]
            + [of((3, 96, 13, 17), lrn) for lrn in (STRONG, *others)],
            "answers@emulator": [of(shape) for shape in emulated],
            "empty": [of((n, *s)) for n in (0, 1, 3) for s in ((5, 0, 3), (5, 3, 0), (0, 4, 4))]
            + [of((0, 5, 3, 3)), of((0, 1, 1, 1))],
            "strides": [
                of(s) for s in ((2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5), (2, 3, 4, 5, 6), (2, 3, 4))
            ],
            "bits": [
                of(shape, LRNParams(5, 1e-4, beta, 2.0))
                for shape in ((1, 96, 27, 27), (7, 17, 31, 31), (2, 5, 13, 999))
                for beta in (0.75, 0.6)
            ],
            "bits@interpreter": [of((3, 16, 5, 7))],
            "bits@gpu": [of((8, 96, 27, 27))],
            "gradcheck": [
                of(shape, LRNParams(size, 0.5, groups=g), format=format)
                for shape in ((2, 4, 2, 2), (1, 6, 3), (0, 2, 2), (1, 2, 1, 2, 2))
                for size, g in ((1, 1), (2, 2), (3, 1), (4, 1), (9, 2))
                for format in FORMATS
            ],
            "compile": [of((2, 6, 4, 5), groups, format=format) for format in FORMATS],
            "transforms": [of((2, 6, 4, 5))],
            "layer": [of((2, 4, 3, 3), groups)],
        }


class MaxPool2d(MemoryBound):
    """Torch's own, bit for bit."""

    name = "max_pool2d"
    function, counterpart = staticmethod(FF.max_pool2d), staticmethod(F.max_pool2d)
    torch_runs = (torch.int64, torch.uint8)
    wrong_ranks, rank_error = ((), (4,), (4, 4), (2, 3, 4, 4, 4)), (RuntimeError, "3D .*4D")
    except_for = {  # noqa: RUF012
        "test_no_kernel_reads_or_writes_out_of_bounds": "its C++ kernel is that of the tail",
    }

    def ignores_threads(self, place: Place) -> bool:
        return True

    def tail(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        pool = {name: value for name, value in kwargs.items() if name != "return_indices"}
        return {"relu": False, "lrn": None, "pool": PoolParams(**pool)}

    def layer(self, case: Case) -> torch.nn.Module:
        return fastcnn.nn.MaxPool2d(**case.kwargs)

    def draw(self, case: Case, dtype: torch.dtype, format: torch.memory_format, seed: int) -> list[Tensor | None]:
        """Few different values, so that windows hold many ties."""
        return [in_format(integers(*case.shapes[0], dtype=dtype, seed=seed), format)]

    def draw_gradient(self, y: Tensor) -> Tensor:
        """Small integers, so that no order of adding counts."""
        return integers(*y.shape, dtype=y.dtype, seed=1)

    def forward_args(self, case: Case, tensors: Tensors) -> tuple[Any, ...]:
        return (*tensors, *case.pool.op_args(), True)

    def backward_args(self, case: Case, tensors: Tensors, kept: tuple[Tensor, ...], dy: Tensor) -> tuple[Any, ...]:
        (x,), last = tensors, torch.channels_last
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=last)
        return dy, kept[1], list(x.shape[2:]), channels_last, *case.pool.op_args()

    def keeps(self, case: Case, tensors: Tensors, y: Tensor) -> tuple[list[Tensor], int]:
        return [], super().keeps(case, tensors, y)[1]

    def check(self, place: Place, case: Case, tensors: Tensors, dy: Tensor | None = None) -> Results:
        theirs, expected = F.max_pool2d(*tensors, *case.pool.op_args(), return_indices=True)
        results = self.check_bits_of_torch(place, case, tensors, self.draw_gradient(theirs) if dy is None else dy)
        if place.has_autograd:
            y, indices = FF.max_pool2d(*place.put(tensors), *case.pool.op_args(), return_indices=True)
            assert indices.dtype == torch.int64
            assert_bitwise(indices.cpu(), expected)
            assert y.stride() == indices.stride() == results.y.stride()
        return results

    def pool_case(self, shape: Sequence[int], pool: PoolParams = POOL, **options: Any) -> Case:
        return self.case(f"{ident(tuple(shape))}-{ident(pool)}", tuple(shape), **asdict(pool), **options)

    def pooling(self, shape: Sequence[int], pool: PoolParams) -> list[Case]:
        return [self.pool_case(shape, pool)]

    examples = 30

    def any_case(self) -> st.SearchStrategy[tuple[Case, Input]]:
        @st.composite
        def cases(draw: st.DrawFn) -> tuple[Case, Input]:
            shape = [draw(st.integers(1, 3)), *(draw(st.integers(1, top)) for top in (20, 10, 20))]
            pool = draw(pools(*shape[2:]))
            shape = shape[draw(st.integers(0, 1)) :]
            return self.pool_case(shape, pool), draw(inputs(shape))

        return cases()

    def check_any(self, place: Place, case: Case, x: Tensor) -> None:
        """Rounded in several ways, so that there are ties."""
        for levels in (1, 2, 3):
            self.check(place, case, [x.mul(levels).round()])

    def make_cases(self) -> dict[str, list[Case]]:
        of, ceil = self.pool_case, PoolParams(2, 2, 1, 2, True)
        narrow = (1, 1, 3, 3), (3, 1, 5, 4), (1, 7, 3, 70), (2, 33, 70, 3)
        single = [of((5, 9, 11), pool) for pool in (POOL, PoolParams(2, 2, 1, 1, True), WIDE)]
        usual, wide = self.case("", (2, 17, 9, 7), **asdict(POOL)), self.case("int32", (2, 5, 9, 7), **asdict(WIDE))
        return {
            "usual": [usual],
            "parts": [usual, wide],
            "single": single,
            "images": single,
            "answers": [of(shape, pool) for shape in narrow for pool in (POOL, PoolParams(2, 1, 1))],
            "answers@interpreter": [
                of((2, 8, 5, 7), pool)
                for pool in (
                    POOL,
                    PoolParams(2, 2),
                    PoolParams(3, 1, 1),
                    PoolParams((2, 3), (1, 2), (1, 0)),
                    PoolParams(3, 2, 1, 2, True),
                )
            ],
            "answers@gpu": [of((2, 24, 27, 21), pool) for pool in POOLS if pool not in GPU_LEAVES_OUT],
            "answers@emulator": [],  # in "every pool"
            "usual@interpreter": [of((2, 6, 5, 4))],
            "single@interpreter": single[:1],
            "kept": [usual, wide, of((2, 5, 9, 7), PoolParams(16, 4, 8)), *single],
            "empty": [of(shape, pool) for shape in ((0, 5, 9, 7), (0, 1, 3, 3)) for pool in (POOL, WIDE)],
            "strides": [
                of(shape, pool)
                for shape in ((2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 3, 3), (0, 3, 4, 5))
                for pool in (POOL, WIDE)
            ],
            "bits": [of((3, 17, 21, 20), pool) for pool in (PoolParams(3, 1, 1), WIDE)],
            "bits@interpreter": [of((3, 16, 5, 7))],
            "bits@gpu": [of((8, 96, 27, 27))],
            "opcheck": [of((1, 3, 7, 6), ceil), of((1, 3, 7, 6), WIDE)],
            "gradcheck": [of(s, pool) for s in ((2, 1, 3, 4), (1, 4, 3)) for pool in (PoolParams(2, 1), ceil)],
            "compile": [
                self.case(name, (2, 3, 8, 5), kernel_size=3, stride=2, padding=1, return_indices=yes, format=FORMATS[1])
                for name, yes in (("values", False), ("indices", True))
            ],
            "export": [of((2, 6, 9, 8), format=format) for format in FORMATS],
            "transforms": [of((2, 2, 4, 5), PoolParams(3, 2, 1)), of((2, 2, 4, 5), PoolParams(2))],
        }


class ReLULRNMaxPool2d(MemoryBound):
    name = "relu_lrn_max_pool2d"
    layer_inputs = 2
    function, counterpart = staticmethod(FF.relu_lrn_max_pool2d), staticmethod(torch_tail)
    only_torch_has = (torch.int64, torch.uint8)
    wrong_ranks, rank_error = ((3, 4), (3,)), (ValueError, r"\(got {} dimensions\)")
    in_dims = ((0, None), (1, None), (-1, None), (0, 0), (2, 1), (None, 0), (None, -1))

    def tail(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"relu": True, "lrn": None, "pool": None, **kwargs}

    def layer(self, case: Case) -> torch.nn.Module:
        return fastcnn.nn.ReLULRNMaxPool2d(**case.kwargs)

    def forward_args(self, case: Case, tensors: Tensors) -> tuple[Any, ...]:
        return (*tensors, *tail_args(**self.tail(case.kwargs)), case.pool is not None)

    def backward_args(self, case: Case, tensors: Tensors, kept: tuple[Tensor, ...], dy: Tensor) -> tuple[Any, ...]:
        return (dy, *tensors, kept[1], *tail_args(**self.tail(case.kwargs)))

    def stage(self, shape: Sequence[int], tail: dict[str, Any] = STAGE, bias: bool = True, **options: Any) -> Case:
        """A tail, with or without a bias."""
        parts = "relu" * tail.get("relu", True), ident(tail.get("lrn")), ident(tail.get("pool"))
        name = "-".join([ident(tuple(shape)), *filter(None, parts), "bias" if bias else "no_bias"])
        return self.case(name, tuple(shape), (shape[1],) if bias else None, **tail, **options)

    def normalizing(self, shape: Sequence[int], lrn: LRNParams, every_part: bool = False) -> list[Case]:
        if every_part:
            return [self.stage(shape, {**tail, "lrn": lrn}, bias=False) for tail in PARTS if tail["lrn"]]
        fitting = POOL if min(shape[2:]) >= 3 else PoolParams(3, 2, 1)
        return [self.stage(shape, {"lrn": lrn, "pool": fitting})]

    def pooling(self, shape: Sequence[int], pool: PoolParams) -> list[Case]:
        return [self.stage(shape, {"relu": relu, "pool": pool}, bias=relu) for relu in (True, False)]

    def any_case(self) -> st.SearchStrategy[tuple[Case, Input]]:
        @st.composite
        def cases(draw: st.DrawFn) -> tuple[Case, Input]:
            groups = draw(st.sampled_from([1, 1, 2, 3]))
            channels = groups * draw(st.integers(1, 12))
            shape = [draw(st.integers(1, 3)), channels, draw(st.integers(1, 12)), draw(st.integers(1, 20))]
            lrn = pool = None
            if draw(st.booleans()):
                beta = draw(st.sampled_from([0.75, 0.5, 1.0, 0.6]))
                lrn = LRNParams(draw(st.integers(1, channels + 3)), draw(st.floats(0, 0.5)), beta, 2.0, groups)
            if draw(st.sampled_from([True, True, False])):
                pool = draw(pools(*shape[2:]))
                assume(not has_empty_windows(pool, *shape[2:]))
            tail = {"relu": draw(st.booleans()), "lrn": lrn, "pool": pool}
            bias, float32_bias = draw(st.sampled_from([(False, False), (True, False), (True, True)]))
            return self.stage(shape, tail, bias, float32_bias=float32_bias), draw(inputs(shape))

        return cases()

    def check_any(self, place: Place, case: Case, x: Tensor) -> None:
        super().check_any(place, case, x)
        without = replace(case, kwargs={**case.kwargs, "lrn": None})
        for levels in (1, 4):
            tensors = [t if t is None else t.float().mul(levels).round() for t in (x, *case.tensors()[1:])]
            self.check_bits_of_torch(place, without, tensors)

    def make_cases(self) -> dict[str, list[Case]]:
        of, relu_pool, relu_lrn = self.stage, {"relu": True, "pool": POOL}, {"relu": True, "lrn": STRONG}

        def parts(*shape: int, bias: bool = True, tails: Any = PARTS, **options: Any) -> list[Case]:
            return [of(shape, tail, bias, **options) for tail in tails]

        usual = self.case("", (2, 17, 9, 7), (17,), **STAGE)
        cuda = [
            {"lrn": LRNParams(5, 0.5, 0.5, 1.0, 2), "pool": PoolParams(2, 2)},
            {"lrn": LRNParams(4, 0.5, 0.6, 1.0, 2), "pool": PoolParams(2, 2, 1, 3)},
            {"pool": WIDE},
        ]
        return {
            "usual": [usual],
            "parts": parts(2, 17, 9, 7),
            "images": [of((6, 9, 7), relu_pool, bias=False)],
            "single": [of((6, 9, 7), tail, bias=False) for tail in (relu_pool, {"relu": False, "pool": POOL})],
            "answers": [
                *parts(3, 37, 9, 17),
                *parts(3, 37, 9, 17, bias=False),
                *parts(2, 17, 9, 13, float32_bias=True),
            ],
            "answers@interpreter": [*parts(2, 16, 5, 7), of((2, 5, 5, 4), float32_bias=True)],
            "answers@gpu": [
                *parts(3, 96, 13, 17, float32_bias=True),
                *parts(2, 17, 9, 31, tails=(STAGE, relu_pool, relu_lrn, NONE), float32_bias=True),
                *parts(3, 96, 55, 55, tails=(STAGE, relu_pool), float32_bias=True),
                *parts(2, 256, 13, 13, tails=(STAGE,), float32_bias=True),
                *(of(s, t, float32_bias=True) for s in ((2, 36, 13, 17), (1, 2, 19, 7)) for t in cuda),
            ],
            "answers@emulator": [
                *parts(2, 37, 9, 17, float32_bias=True),
                *parts(2, 37, 9, 17, bias=False),
                *parts(2, 48, 7, 9, tails=(STAGE, relu_pool, NONE), float32_bias=True),
            ],
            "usual@interpreter": [of((2, 6, 5, 4))],
            "single@interpreter": [of((3, 5, 4), relu_pool, bias=False)],
            "kept": [of((2, 17, 12, 13), {"lrn": STRONG, "pool": pool}) for pool in (None, POOL, WIDE)],
            "empty": parts(0, 5, 7, 7)
            + [
                case
                for shape in ((2, 5, 0, 3), (2, 5, 3, 0), (2, 0, 3, 3), (0, 0, 0, 0))
                for case in parts(*shape, tails=[tail for tail in PARTS if not tail["pool"]])
            ],
            "strides": [case for s in ((2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 3, 3), (0, 3, 4, 5)) for case in parts(*s)],
            "bits": [
                of(shape, {**tail, "lrn": tail["lrn"] and ALEXNET_LRN})
                for shape in ((1, 96, 27, 27), (7, 17, 31, 31))
                for tail in PARTS
            ],
            "bits@interpreter": [of((3, 16, 5, 7))],
            "bits@gpu": [*parts(8, 96, 27, 27, tails=(STAGE, relu_pool, relu_lrn, NONE, *cuda)), of((16, 96, 55, 55))],
            "opcheck": [*parts(2, 5, 5, 6), of((2, 5, 5, 6), bias=False), of((2, 5, 5, 6), float32_bias=True)],
            "gradcheck": [
                case
                for tail in PARTS
                for bias in (False, True)
                for case in parts(1, 3, 3, 4, bias=bias, tails=[{**tail, "pool": tail["pool"] and PoolParams(2, 1)}])
            ],
            "compile": [
                of((2, 6, 8, 5), tail, format=FORMATS[1])
                for tail in (STAGE, relu_pool, {"relu": False, "lrn": STRONG}, NONE)
            ],
            "export": [of((2, 6, 9, 8), tail) for tail in (STAGE, relu_pool, relu_lrn)],
            "vmap": [of((2, 6, 9, 8), tail) for tail in (STAGE, relu_pool, {"relu": True}, {"relu": False})],
            "transforms": [of((2, 4, 5, 5), tail) for tail in (STAGE, relu_pool)],
            "one": [of((2, 3, 4, 4), {"relu": False, "lrn": STRONG}, bias=False)],
        }


# -- batch norm -------------------------------------------------------------------------------------------------------


def torch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *arguments: Any,
    relu: bool = True,
    relu_first: bool = False,
    pool: PoolParams | None = None,
    **options: Any,
) -> Tensor:
    """The batch norm and what follows it in torch's own operators."""
    y = F.relu(x) if relu and relu_first else x
    y = F.batch_norm(y, running_mean, running_var, *arguments, **options)
    y = F.relu(y) if relu and not relu_first else y
    return y if pool is None else F.max_pool2d(y, *pool.op_args())


def running_statistics(x: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Of the channels of ``x``, the same in every dtype; ``exact`` are small integers and 1, which round nothing."""
    if exact:
        return torch.arange(x.shape[1]).remainder(3).sub(1).to(x), torch.ones(x.shape[1]).to(x)
    eighths = torch.arange(x.shape[1]).remainder(8).div(8)
    return eighths.sub(0.5).to(x), eighths.add(0.5).to(x)


NORMS = [
    {"training": training, "relu": relu, "relu_first": first, "pool": pool}
    for training in (True, False)
    for relu, first in ((True, False), (True, True), (False, False))
    for pool in (None, POOL)
]


class BatchNormReLUMaxPool2d(MemoryBound):
    """Its tensors are input, weight and bias; the running statistics in evaluation follow from the input's channels."""

    name = "batch_norm_relu_max_pool2d"
    only_torch_has = (torch.int64, torch.uint8)
    wrong_ranks, rank_error = ((5,), ()), (IndexError, r"\(got {} dimensions\)")
    in_dims = ((0, None, None), (1, None, None), (-1, 0, None), (None, 0, 0), (None, None, -1), (2, 0, -1))

    @staticmethod
    def _call(function: Callable[..., Tensor], *tensors: Tensor | None, **kwargs: Any) -> Tensor:
        x, weight, bias = (*tensors, None, None)[:3]
        exact = kwargs.pop("exact", False)
        running = (None, None) if kwargs["training"] else running_statistics(x, exact)
        kwargs = {"eps": 0.0, **kwargs} if exact else kwargs
        return function(x, *running, weight, bias, **kwargs)

    def function(self, *tensors: Tensor | None, **kwargs: Any) -> Tensor:
        return self._call(FF.batch_norm_relu_max_pool2d, *tensors, **kwargs)

    def counterpart(self, *tensors: Tensor | None, **kwargs: Any) -> Tensor:
        return self._call(torch_norm, *tensors, **kwargs)

    def tail(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"pool": kwargs.get("pool")}

    def layer(self, case: Case) -> torch.nn.Module:
        options = {name: value for name, value in case.kwargs.items() if name in ("relu", "relu_first", "pool")}
        layer = fastcnn.nn.BatchNormReLUMaxPool2d(case.shapes[0][1], affine=case.shapes[1] is not None, **options)
        return layer.train(case.kwargs["training"])

    def also_returns(self, case: Case) -> int:
        return 2 if case.kwargs["training"] else 0  # the statistics

    def assert_same(self, place: Place, ours: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
        """torch's sums depend on strides, and all follows from sums."""
        if place.name != "reference":
            super().assert_same(place, ours, expected)
            return
        for a, b in zip(ours, expected, strict=True):
            narrow = b is not None and b.dtype in NARROW
            torch.testing.assert_close(a, b, rtol=2e-2 if narrow else 1e-5, atol=2e-2 if narrow else 1e-5)

    def params(self, case: Case) -> tuple[Any, ...]:
        options = {"eps": 0.0 if case.kwargs.get("exact") else 1e-5, **case.kwargs}
        options.pop("exact", None)
        return BatchNormParams(**options).op_args()

    def forward_args(self, case: Case, tensors: Tensors) -> tuple[Any, ...]:
        x, weight, bias = tensors
        training = case.kwargs["training"]
        running = (None, None) if training else running_statistics(x, case.kwargs.get("exact", False))
        return x, *running, weight, bias, *self.params(case), True

    def backward_args(self, case: Case, tensors: Tensors, kept: tuple[Tensor, ...], dy: Tensor) -> tuple[Any, ...]:
        (x, weight, bias), (_, argmax, mean, var) = tensors, kept
        return dy, x, mean, var, weight, bias, argmax, *self.params(case)

    def keeps(self, case: Case, tensors: Tensors, y: Tensor) -> tuple[list[Tensor], int]:
        """Also mean and variance of each channel."""
        kept, argmax = super().keeps(case, tensors, y)
        return kept, argmax + 2 * tensors[0].shape[1] * opmath(y.dtype).itemsize

    def draw(self, case: Case, dtype: torch.dtype, format: torch.memory_format, seed: int) -> list[Tensor | None]:
        """No bias is negative, or a ReLU could leave next to nothing."""
        x, weight, bias = super().draw(case, dtype, format, seed)
        return [x, weight, bias if bias is None else bias.abs()]

    def before_pool(self, case: Case, tensors: Tensors) -> Tensor:
        return self.counterpart(*tensors, **{**case.kwargs, "pool": None})

    def check(self, place: Place, case: Case, tensors: Tensors, dy: Tensor | None = None) -> Results:
        """Of the maxima that were chosen, as those of the tail are checked."""
        results = place.run(case, tensors, dy)
        self.check_forward_alone(place, case, tensors, results)
        wide = [leaf(t, torch.float64) for t in tensors]
        pooled = y = self._call(reference.batch_norm_relu_max_pool2d, *wide, **{**case.kwargs, "pool": None})
        if case.pool is not None:
            y, pooled = at_offsets(y, results.argmax, case.pool), F.max_pool2d(y, *case.pool.op_args())
            assert_same_answer(y.detach().to(opmath(tensors[0].dtype)), pooled.detach())
        assert_same_answer(results.y, pooled.detach())
        assert results.y.dtype == tensors[0].dtype
        assert results.y.stride() == expected_strides(tensors[0], results.y.shape)
        if results.gradients:
            exact = gradients(y, wide, results.dy.double())
            sizes = self.sizes_of_terms(case, wide, results)
            for ours, gradient, size in zip(results.gradients, exact, sizes, strict=True):
                assert (ours is None) == (gradient is None)
                if gradient is None:
                    continue
                if case.kwargs["training"] and gradient.numel() and gradient.abs().max() < 1e-4 * size:
                    torch.testing.assert_close(ours.double(), gradient, rtol=1e-2, atol=2e-6 * size)
                else:
                    assert_same_answer(ours, gradient, backward=True)
        return results

    def sizes_of_terms(self, case: Case, wide: Tensors, results: Results) -> list[float]:
        """Of what the gradients are sums and differences of, which in training may be next to nothing themselves."""
        x, weight, bias = wide
        if not x.numel():
            return [0.0] * 3
        options = {k: v for k, v in case.kwargs.items() if k in ("relu", "relu_first")}
        mean, var = reference.statistics(x.detach(), None, None, BatchNormParams(True, **options))
        y = reference.batch_norm_relu_max_pool2d(x, mean, var, weight, bias, **options)
        y = y if case.pool is None else at_offsets(y, results.argmax, case.pool)
        dy = results.dy.double()
        (terms,) = gradients(y, [x], dy)
        return [terms.abs().max().item(), *[dy.abs().sum().item() / x.shape[1] / 4] * 2]

    def norm_case(
        self, shape: Sequence[int], norm: dict[str, Any], weight: bool = True, bias: bool = True, **options: Any
    ) -> Case:
        parts = ["batch" if norm["training"] else "running", *filter(norm.get, ("relu_first", "relu", "exact"))]
        name = "-".join([ident(tuple(shape)), *parts, *filter(None, [ident(norm.get("pool"))])])
        name += "" if weight and bias else "-not_affine"
        channels = (shape[1],)
        return self.case(
            name, tuple(shape), channels if weight else None, channels if bias else None, **norm, **options
        )

    def pooling(self, shape: Sequence[int], pool: PoolParams) -> list[Case]:
        """In evaluation, so that integers stay integers."""
        exact = {"training": False, "exact": True, "pool": pool}
        return [self.norm_case(shape, {**exact, "relu": relu, "relu_first": not relu}) for relu in (True, False)]

    def any_case(self) -> st.SearchStrategy[tuple[Case, Input]]:
        @st.composite
        def cases(draw: st.DrawFn) -> tuple[Case, Input]:
            shape = [draw(st.integers(1, 3)), *(draw(st.integers(1, top)) for top in (40, 12, 40))]
            pool = draw(pools(*shape[2:])) if draw(st.booleans()) else None
            assume(pool is None or not has_empty_windows(pool, *shape[2:]))
            options = {name: draw(st.booleans()) for name in ("training", "relu", "relu_first")}
            described = draw(inputs(shape))
            # With few values, or the same ones again, almost nothing is left of differences.
            assume(not options["training"] or (shape[0] * shape[2] * shape[3] > 8 and described.layout != "expanded"))
            return self.norm_case(shape, {**options, "pool": pool}, draw(st.booleans()), draw(st.booleans())), described

        return cases()

    def check_any(self, place: Place, case: Case, x: Tensor) -> None:
        self.check(place, case, [x, *case.tensors(x.dtype)[1:]])

    def make_cases(self) -> dict[str, list[Case]]:
        of, trained = self.norm_case, {"training": True, "pool": POOL}
        first = {"training": True, "relu_first": True, "pool": POOL}

        def parts(*shape: int, norms: Any = NORMS, **options: Any) -> list[Case]:
            return [of(shape, norm, **options) for norm in norms]

        usual = self.case("", (2, 17, 9, 7), (17,), (17,), **trained)
        small = [{**norm, "pool": norm["pool"] and PoolParams(2, 1)} for norm in NORMS]
        windows = [
            of((2, 19, 11, 13), {"training": True, "pool": pool})
            for pool in (PoolParams(2), PoolParams(3, 1, 1), PoolParams((2, 3), (3, 1), (1, 0)), PoolParams(2, 5), WIDE)
        ]
        sizes = (2, 64, 14, 14), (3, 1, 5, 5), (1, 3, 70, 67), (2, 100, 3, 2), (1, 16, 1, 40), (4, 8, 2, 1)
        plain = [of(shape, {"training": True, "relu": relu}) for shape in sizes for relu in (False, True)]
        return {
            "usual": [usual],
            "parts": parts(2, 17, 9, 7),
            "images": [],
            "single": [],
            "answers": [
                *parts(3, 37, 9, 17),
                *parts(2, 17, 9, 13, float32_bias=True),
                *parts(2, 32, 8, 8, weight=False, bias=False),
                of((2, 5, 8, 8), trained, weight=False),
                of((2, 5, 8, 8), trained, bias=False),
                *windows,
                *plain,
            ],
            "answers@interpreter": [
                *parts(2, 6, 5, 7),
                of((2, 5, 5, 4), trained, float32_bias=True),
                of((2, 5, 5, 4), trained, weight=False, bias=False),
                of((2, 70, 6, 5), {"training": True, "pool": PoolParams(3, 2, 1, 2)}),
                of((3, 2, 30, 30), {"training": True}),
            ],
            "answers@emulator": [
                *parts(2, 37, 9, 17, float32_bias=True),
                *parts(2, 16, 8, 8, norms=NORMS[:4], weight=False, bias=False),
                of((2, 5, 8, 8), trained, weight=False),
                of((2, 5, 8, 8), trained, bias=False),
                *windows[1:],
                *(of(shape, {"training": True}) for shape in sizes),
            ],
            "answers@gpu": [
                *parts(3, 96, 13, 17, float32_bias=True),
                *parts(2, 17, 9, 31, norms=(trained, first, NORMS[7]), weight=False, bias=False),
                *(of((2, 36, 13, 17), {"training": True, "pool": pool}) for pool in (PoolParams(2), WIDE)),
                *(of(shape, {"training": True}) for shape in (*sizes, (4, 8, 112, 112))),
                of((8, 96, 55, 55), trained),
            ],
            "kept": [of((2, 17, 12, 13), {**trained, "pool": pool}) for pool in (None, POOL, WIDE)],
            "empty@interpreter": [of((0, 5, 7, 7), trained), of((2, 0, 3, 3), {"training": True})],
            "bits@interpreter": [of((3, 16, 5, 7), trained)],
            "usual@interpreter": [of((2, 6, 5, 4), trained)],
            "empty": [
                *parts(0, 5, 7, 7),
                *(
                    case
                    for shape in ((2, 5, 0, 3), (2, 5, 3, 0), (2, 0, 3, 3), (0, 0, 0, 0))
                    for case in parts(*shape, norms=[norm for norm in NORMS if not norm["pool"]])
                ),
            ],
            "strides": [case for s in ((2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 3, 3), (0, 3, 4, 5)) for case in parts(*s)],
            "bits": [case for s in ((1, 96, 27, 27), (7, 17, 31, 31), (3, 64, 56, 56)) for case in parts(*s)],
            "bits@gpu": [*parts(8, 96, 27, 27, norms=NORMS[:8]), of((16, 64, 112, 112), trained)],
            "opcheck": [*parts(2, 5, 5, 6), *parts(2, 5, 5, 6, norms=NORMS[:2], weight=False, bias=False)],
            "gradcheck": [*parts(1, 3, 3, 4, norms=small), *parts(2, 2, 3, 2, norms=small[:6], weight=False)],
            "compile": parts(2, 6, 8, 5, norms=[trained, first, *NORMS[6:8]], format=FORMATS[1]),
            "export": parts(2, 6, 9, 8, norms=[trained, first, *NORMS[6:8]]),
            "vmap": parts(2, 6, 9, 8, norms=[trained, first, *NORMS[6:8]]),
            "transforms": parts(2, 4, 5, 5, norms=[trained, first]),
            "one": [of((2, 3, 4, 4), {"training": True}, weight=False, bias=False)],
        }


# -- convolution ------------------------------------------------------------------------------------------------------

# input, weight, arguments
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "alexnet_conv1": ((2, 3, 35, 35), (16, 3, 11, 11), {"stride": 4, "padding": 2}),
    "alexnet_conv2": ((2, 8, 9, 9), (12, 4, 5, 5), {"padding": 2, "groups": 2}),
    "vgg_conv1_1": ((2, 3, 14, 14), (16, 3, 3, 3), {"padding": 1}),
    "same": ((2, 5, 8, 9), (7, 5, 3, 5), {"padding": "same"}),
    "same_uneven": ((2, 5, 8, 9), (7, 5, 2, 4), {"padding": "same", "dilation": (3, 1)}),
    "valid": ((2, 5, 8, 9), (7, 5, 3, 2), {"padding": "valid", "stride": (2, 3)}),
    "pairs": ((2, 4, 9, 11), (6, 2, 3, 2), {"stride": (1, 2), "padding": (2, 0), "dilation": (1, 2), "groups": 2}),
    "dilation": ((1, 3, 12, 13), (5, 3, 3, 3), {"padding": 2, "dilation": 2}),
    "depthwise": ((2, 6, 7, 7), (12, 1, 3, 3), {"padding": 1, "groups": 6}),
    "1x1": ((2, 6, 5, 7), (3, 6, 1, 1), {}),
    "winograd": ((2, 64, 13, 17), (96, 32, 3, 3), {"padding": 1, "groups": 2}),
    "winograd_uneven": ((1, 32, 14, 15), (80, 32, 3, 3), {"padding": (0, 2)}),
    "winograd_padded": ((2, 32, 12, 11), (48, 32, 3, 3), {"padding": (3, 1)}),
    "winograd_converted": ((2, 48, 10, 13), (64, 48, 3, 3), {"padding": (2, 1)}),
    "one_channel": ((2, 1, 7, 8), (1, 1, 3, 3), {"padding": (1,)}),
    "wide_padding": ((2, 4, 5, 6), (6, 2, 3, 2), {"padding": (3, 1), "groups": 2}),
}
AWKWARD = ["alexnet_conv2", "same_uneven", "pairs"]


class Conv2dReLU(Operator):
    name = "conv2d_relu"
    has_no_capabilities = True
    exact = False
    only_torch_has = (torch.complex64, torch.int64, torch.uint8)
    wrong_ranks, rank_error = ((), (4,), (9, 9), (1, 4, 9, 9, 9)), (RuntimeError, r"conv2d_relu\(\): expected 3D .*4D")
    in_dims = ((0, None, None), (1, None, None), (None, 0, None), (None, None, 0), (0, 0, None), (0, 0, 0), (-1, 1, 1))
    function = staticmethod(FF.conv2d_relu)
    except_for = {  # noqa: RUF012
        "test_autocast_keeps_the_dtype_of_the_input": "it casts as the convolution of torch does",
        "test_no_kernel_reads_or_writes_out_of_bounds": "its C++ kernels have tests of their own",
    }

    def ignores_threads(self, place: Place) -> bool:
        return False

    def counterpart(self, *tensors: Tensor | None, **kwargs: Any) -> Tensor:
        return F.relu(F.conv2d(*tensors, **kwargs))

    def layer(self, case: Case) -> torch.nn.Module:
        outputs, channels, *window = case.shapes[1]
        groups = case.kwargs.get("groups", 1)
        return fastcnn.nn.ConvReLU2d(channels * groups, outputs, window, **case.kwargs)

    def draw(self, case: Case, dtype: torch.dtype, format: torch.memory_format, seed: int) -> list[Tensor | None]:
        """Scaled as in a trained network."""
        shape, weight, bias = case.shapes
        w = randn(*weight, dtype=torch.float64, seed=seed + 1)
        w = (w / (w[0].numel() / 2) ** 0.5).to(dtype).contiguous(memory_format=format)
        b = None if bias is None else randn(*bias, dtype=dtype, seed=seed + 2).div(4)
        return [randn(*shape, dtype=dtype, format=format, seed=seed), w, b]

    def params(self, case: Case, tensors: Tensors) -> tuple[Any, ...]:
        of_conv2d = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        return ConvParams.of(*tensors, *{**of_conv2d, **case.kwargs}.values())[0].op_args()

    def forward_args(self, case: Case, tensors: Tensors) -> tuple[Any, ...]:
        return (*tensors, *self.params(case, tensors), case.frozen)

    def backward_args(self, case: Case, tensors: Tensors, kept: tuple[Tensor, ...], dy: Tensor) -> tuple[Any, ...]:
        x, w, b = tensors
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        needs = [True, not case.frozen, not case.frozen and b is not None]
        y_or_mask, x_or_none = (kept[1], None) if case.frozen else (kept[0], x)
        return dy, y_or_mask, x_or_none, w, list(x.shape), channels_last, *self.params(case, tensors), needs

    def keeps(self, case: Case, tensors: Tensors, y: Tensor) -> tuple[list[Tensor], int]:
        """Of frozen weights a bit an output, which says whether ReLU passes it."""
        x, w, _ = tensors
        return ([w], (y.numel() + 7) // 8) if case.frozen else ([x, w, y], 0)

    def check(self, place: Place, case: Case, tensors: Tensors, dy: Tensor | None = None) -> None:
        """Each error at most twice that of torch, or that of rounding once where torch happens to be exact."""
        theirs, floor = errors(self.counterpart, tensors, case.kwargs, case.frozen), rounding(tensors[0].dtype)

        def run(*args: Any, **kwargs: Any) -> Tensor:
            y = self.function(*args, **kwargs)
            assert y.stride() == expected_strides(tensors[0], y.shape)
            return y

        for _ in range(1 + case.frozen):  # also when frozen weights are met again
            ours = errors(run, tensors, case.kwargs, case.frozen)
            for name, a, b in zip(("output", "input", "weight", "bias"), ours, theirs, strict=False):
                assert a <= max(2 * b, floor), f"{name}: error {a:.3g}, torch's {b:.3g}"

    def agree(self, place: Place, case: Case, tensors: Tensors, dy: Tensor | None = None) -> None:
        theirs = case.leaves(tensors)
        expected = case.counterpart(*theirs)
        if dy is None:  # of small integers, so that no gradient is large
            dy = integers(*expected.shape, dtype=expected.dtype, seed=5) * (expected.detach().abs() > 1e-3)
        results = place.run(case, tensors, dy)
        tolerance = {"rtol": 3e-2, "atol": 3e-2} if expected.dtype in NARROW else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(results.y, expected.detach(), equal_nan=True, **tolerance)
        assert results.y.stride() == expected_strides(tensors[0], expected.shape)
        for ours, gradient in zip(results.gradients, gradients(expected, asked(theirs), dy), strict=True):
            if gradient is not None:
                torch.testing.assert_close(ours, gradient, equal_nan=True, **tolerance)
        assert results.gradients[0].stride() == expected_strides(tensors[0], tensors[0].shape)

    examples = 30

    def any_case(self) -> st.SearchStrategy[tuple[Case, Input]]:
        @st.composite
        def cases(draw: st.DrawFn) -> tuple[Case, Input]:
            groups = draw(st.integers(1, 3))
            channels, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
            kernel, dilation = ([draw(st.integers(1, most)) for _ in "hw"] for most in (3, 2))
            size = [d * (k - 1) + draw(st.integers(1, 6)) for k, d in zip(kernel, dilation, strict=True)]
            stride, padding = (tuple(draw(st.integers(least, most)) for _ in "hw") for least, most in ((1, 3), (0, 2)))
            kwargs = {"stride": stride, "padding": padding, "dilation": tuple(dilation), "groups": groups}
            shape = [draw(st.integers(1, 3)), channels, *size][draw(st.integers(0, 1)) :]
            bias = (outputs,) if draw(st.booleans()) else None
            shapes = tuple(shape), (outputs, channels // groups, *kernel), bias
            return self.case("any", *shapes, **kwargs), draw(inputs(shape))

        return cases()

    def check_any(self, place: Place, case: Case, x: Tensor) -> None:
        """Of small integers: both are exact."""
        others = [None if s is None else integers(*s, dtype=x.dtype, seed=i) for i, s in enumerate(case.shapes) if i]
        tensors = [x.mul(2).round(), *others]
        theirs = case.leaves(tensors)
        expected = case.counterpart(*theirs)
        dy = integers(*expected.shape, dtype=x.dtype, seed=3)
        results = place.run(case, tensors, dy)
        assert_bitwise(results.y, expected.detach())
        assert results.y.stride() == expected_strides(x, expected.shape)
        for ours, gradient in zip(results.gradients, gradients(expected, theirs, dy), strict=True):
            assert (ours is None) == (gradient is None)
            if gradient is not None:
                torch.testing.assert_close(ours, gradient)

    def call(
        self, name: str, dtype: torch.dtype = torch.float32, format: torch.memory_format = torch.contiguous_format
    ) -> tuple[list[Any], dict[str, Any]]:
        """Tensors and arguments of one of the convolutions above."""
        return self.convolution(name).tensors(dtype, format), self.convolution(name).kwargs

    def convolution(self, name: str, bias: bool = True, **options: Any) -> Case:
        shape, weight, kwargs = CONVOLUTIONS[name]
        frozen = "-frozen" * options.get("frozen", False)
        return self.case(
            f"{name}{'' if bias else '-no_bias'}{frozen}",
            shape,
            weight,
            weight[:1] if bias else None,
            **kwargs,
            **options,
        )

    def make_cases(self) -> dict[str, list[Case]]:
        of = self.convolution

        def both(*shapes: Any, name: str = "", **kwargs: Any) -> list[Case]:
            return [
                self.case(f"{name}{kind}", *shapes, **kwargs, frozen=kind == "frozen") for kind in ("trained", "frozen")
            ]

        shape, weight, kwargs = CONVOLUTIONS["pairs"]
        pairs = both(shape, weight, weight[:1], **kwargs)
        padded = {"padding": 1, "groups": 2}

        def alone(case: Case) -> Case:
            return replace(case, name=f"{case.name}-alone", shapes=(case.shapes[0][1:], *case.shapes[1:]))

        answers = [of(name, bias) for name in CONVOLUTIONS for bias in (False, True)]
        kept = [of(name, frozen=True) for name in ("alexnet_conv1", "alexnet_conv2", "one_channel")]
        kept += [alone(case) for case in kept]
        opcheck = (2, 4, 5, 6), (6, 2, 3, 3)
        opchecked = {"stride": (1, 2), "padding": (1, 0), "groups": 2}
        return {
            "usual": pairs,
            "single": [*map(alone, pairs)],
            "answers": [*answers, *(of(name, frozen=True) for name in CONVOLUTIONS)],
            "answers@interpreter": answers,
            "images": [alone(of(name)) for name in CONVOLUTIONS],
            "answers@emulator": [],  # tests/simt/test_conv2d_relu.py, without backward
            "answers@gpu": [],  # tests/gpu/test_conv2d_relu.py, in TF32 and in float32
            "kept": [*kept, of("alexnet_conv1")],
            "empty": [
                case
                for height, width in ((7, 7), (3, 5))
                for case in both((0, 4, height, width), (6, 2, 3, 3), (6,), name=f"{height}x{width}-", **padded)
            ],
            "strides": [
                replace(case, name=f"{ident(shape)}-{outputs}-{case.name}")
                for shape in ((2, 4, 5, 6), (2, 4, 3, 3), (0, 4, 5, 6), (2, 1, 5, 6))
                for outputs in (1, 5)
                for case in both(shape, (outputs, shape[1], 3, 3), None)
            ],
            "bits": [of("alexnet_conv2"), of("alexnet_conv2", frozen=True)],
            "bits@gpu": [],  # tests/gpu/test_conv2d_relu.py, in 16 bits
            "opcheck": [
                case for bias in ((6,), None) for case in both(*opcheck, bias, name="bias-" * bool(bias), **opchecked)
            ],
            "gradcheck": both((1, 4, 3, 3), (4, 2, 2, 3), (4,), padding=(0, 1), groups=2),
            "compile": [
                case
                for padding in (1, "same")
                for case in both(
                    (2, 4, 8, 5), (6, 2, 3, 2), (6,), name=f"{padding}-", padding=padding, groups=2, format=FORMATS[1]
                )
            ],
            "export": both((2, 4, 5, 6), (6, 2, 3, 3), (6,), **padded),
            "vmap": both((2, 4, 4, 5), (6, 2, 3, 3), (6,), **padded),
            "transforms": both((1, 4, 3, 3), (4, 2, 2, 2), (4,), groups=2)[:1],
            "one": pairs[:1],
        }


def errors(run: Callable[..., Tensor], tensors: Tensors, kwargs: dict[str, Any], frozen: bool = False) -> list[float]:
    """Of the output and each gradient, relative to float64; which elements ReLU passes is taken from the output."""
    narrow, wide = ([t if i and frozen else leaf(t) for i, t in enumerate(tensors)] for _ in range(2))
    wide = [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in wide]
    y, z = run(*narrow, **kwargs), F.conv2d(*wide, **kwargs)
    dy = 2 + randn(*y.shape, dtype=y.dtype, seed=9).to(y)
    ours, exact = gradients(y, asked(narrow), dy), gradients(z, asked(wide), dy.double() * ~(y.detach() <= 0))
    pairs = [(y.detach(), F.relu(z).detach()), *((a, b) for a, b in zip(ours, exact, strict=True) if b is not None)]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


# -- augmentation -----------------------------------------------------------------------------------------------------


def resized_rows(x: Tensor, size: int) -> Tensor:
    """By torch, of pictures that are not one pixel wide: of those 2.14 still makes something else."""
    wide = x.expand(-1, -1, -1, 2) if x.shape[3] == 1 else x
    return F.interpolate(wide, (size, wide.shape[3]), mode="bilinear", antialias=True)[..., : x.shape[3]]


class Augment(Operator):
    """Its tensors are pictures, offsets, mirror, mean and, where pictures are resized, sizes."""

    name = "augment"
    differentiable = False
    function = staticmethod(FF.augment)
    layer_inputs = 5
    input_dtypes = (torch.uint8,)
    only_torch_has = (torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64, torch.float32)
    wrong_ranks, rank_error = ((2,), (4, 3), (5, 4, 3), (2, 5, 5, 4, 3)), (RuntimeError, r"\({} dimensions\)")
    except_for = {  # noqa: RUF012
        **dict.fromkeys(GRADIENTS, "it has no gradient"),
        "test_export_with_gradients": "it has no gradient; tests/ops/test_augment.py exports it",
    }
    too_slow = ("opcheck", "dtypes", "misaligned", "empty", "strides")

    def layer(self, case: Case) -> torch.nn.Module:
        return fastcnn.nn.Augment(**case.kwargs)

    def in_form(self, case: Case, dtype: torch.dtype | None, format: torch.memory_format | None) -> Case:
        given = {"dtype": dtype, "memory_format": format}
        return replace(case, kwargs={**case.kwargs, **{k: v for k, v in given.items() if v is not None}})

    def varied(self, case: Case, batch: int, width: int) -> Case:
        (_, height, least, _), *others = case.shapes
        batch += 3  # or torch.compile would take it for the same as the 2 of offsets, or the 3 of colours
        others = [None if s is None else (batch, *s[1:]) for s in others]
        return replace(case, shapes=((batch, height, least + width, 3), *others))

    def mapped(self, case: Case) -> tuple[tuple[int | None, ...], ...]:
        """A size and the offsets in pictures of it are drawn together."""
        sizes = lambda dim: None if case.shapes[4] is None else dim  # noqa: E731
        return (
            (0, 0, 0, 0, sizes(0)),
            (1, 0, 1, -1, sizes(1)),
            (0, None, None, None, None),
            (None, 1, 0, 0, sizes(-1)),
        )

    def output_strides(self, case: Case, x: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
        return torch.empty(*shape, memory_format=case.kwargs.get("memory_format", torch.channels_last)).stride()

    def draw(self, case: Case, dtype: torch.dtype, format: torch.memory_format, seed: int) -> list[Tensor | None]:
        (n, height, width, _), *_, sizes = case.shapes
        crop = case.kwargs["crop"]
        size = torch.tensor([(height, width)] * n, dtype=torch.int64).view(n, 2)
        if sizes is not None:
            size = torch.stack(
                [
                    integers(n, dtype=torch.int64, low=c, high=2 * s + c, seed=seed + i)
                    for i, (c, s) in enumerate(zip(crop, (height, width), strict=True))
                ],
                1,
            )
        room = size - torch.tensor(crop) + 1
        offsets = integers(n, 2, dtype=torch.int64, low=0, high=2**31, seed=seed + 2) % room
        mirror = integers(n, dtype=torch.bool, low=0, high=2, seed=seed + 3)
        mean = integers(n, 3, dtype=torch.float64, low=0, high=2**16, seed=seed + 4).div(256).float()
        pictures = integers(*case.shapes[0], dtype=torch.uint8, low=0, high=256, seed=seed + 5)
        return [pictures, offsets, mirror, mean, None if sizes is None else size]

    def counterpart(self, *tensors: Tensor | None, crop: Any, scale: Any, dtype: Any = None, memory_format: Any = None):
        """Picture by picture, in float64."""
        x, offsets, mirror, mean, sizes = tensors
        results = []
        for i, picture in enumerate(x):
            y = picture.permute(2, 0, 1)[None].double()
            if sizes is not None:
                high, wide = sizes[i].tolist()
                y = resized_rows(resized_rows(y, high).transpose(2, 3), wide).transpose(2, 3)
            (top, left), (height, width) = offsets[i].tolist(), crop
            y = y[0, :, top : top + height, left : left + width]
            y = y.flip(-1) if mirror[i] else y
            results.append((y - mean[i].double().view(3, 1, 1)) * torch.tensor(scale).double().view(3, 1, 1))
        return torch.stack(results) if results else torch.empty(0, 3, *crop, dtype=torch.float64)

    def forward_args(self, case: Case, tensors: Tensors) -> tuple[Any, ...]:
        return (*tensors, *AugmentParams(**case.kwargs).op_args())

    def check(self, place: Place, case: Case, tensors: Tensors, dy: Tensor | None = None) -> Results:
        """Without resizing the very bits of the reference."""
        results = place.run(case, tensors)
        dtype = case.kwargs.get("dtype", torch.float32)
        assert results.y.dtype == dtype
        assert results.y.stride() == self.output_strides(case, tensors[0], results.y.shape)
        exact = reference.augment(*tensors, **{**case.kwargs, "dtype": torch.float64})
        torch.testing.assert_close(exact, case.counterpart(*tensors).contiguous(), rtol=1e-6, atol=1e-5)
        assert_same_answer(results.y, exact)
        if tensors[4] is None:
            assert_bitwise(results.y, reference.augment(*tensors, **case.kwargs))
        return results

    def augment_case(
        self, shape: tuple[int, ...], crop: tuple[int, int], resized: bool = False, **options: Any
    ) -> Case:
        n, name = shape[0], f"{ident(shape)}-{ident(crop)}{'-resized' * resized}"
        shapes = shape, (n, 2), (n,), (n, 3), (n, 2) if resized else None
        return self.case(name, *shapes, crop=crop, scale=(1.0, 0.017, 3.0), **options)

    def any_case(self) -> st.SearchStrategy[tuple[Case, Input]]:
        @st.composite
        def cases(draw: st.DrawFn) -> tuple[Case, Input]:
            shape = draw(st.integers(0, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 70)), 3
            crop = draw(st.integers(1, shape[1])), draw(st.integers(1, shape[2]))
            format = draw(st.sampled_from(FORMATS))
            return self.augment_case(shape, crop, draw(st.booleans()), memory_format=format), draw(inputs(shape))

        return cases()

    def check_any(self, place: Place, case: Case, x: Tensor) -> None:
        """Bytes that lie in memory as these numbers do."""
        memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
        pictures = memory.double().nan_to_num().mul(64).add(128).clamp(0, 255).to(torch.uint8)
        pictures = pictures.as_strided(x.shape, x.stride(), x.storage_offset())
        case = self.in_form(case, x.dtype, None)
        self.check(place, case, [pictures, *case.tensors()[1:]])

    def make_cases(self) -> dict[str, list[Case]]:
        of = self.augment_case

        def both(shape: tuple[int, ...], crop: tuple[int, int]) -> list[Case]:
            return [of(shape, crop, resized) for resized in (False, True)]

        usual = both((3, 40, 36, 3), (29, 31))
        # Crops narrower than a vector, as wide, wider; of the whole picture; of one pixel.
        answers = [
            *both((2, 7, 5, 3), (3, 2)),
            *both((1, 1, 1, 3), (1, 1)),
            *both((2, 9, 16, 3), (9, 16)),
            *both((2, 5, 75, 3), (2, 17)),
            *both((3, 70, 80, 3), (65, 67)),
            of((1, 300, 8, 3), (3, 5), resized=True),
            of((1, 2048, 4, 3), (4, 5), resized=True),
        ]
        return {
            "usual": usual,
            "parts": usual,
            "single": [],
            "images": [],
            "answers": answers,
            "answers@interpreter": [*answers[:8], answers[-1]],
            "answers@gpu": [*answers, *both((16, 256, 256, 3), (227, 227))],
            "empty": both((0, 5, 4, 3), (2, 3)),
            "strides": [*both((2, 4, 5, 3), (3, 2)), *both((1, 4, 5, 3), (1, 1)), *both((0, 4, 5, 3), (3, 2))],
            "bits": both((5, 120, 130, 3), (113, 127)),
            "bits@interpreter": both((2, 12, 13, 3), (7, 9)),
            "bits@gpu": both((32, 256, 256, 3), (227, 227)),
            "vmap": both((2, 6, 7, 3), (4, 5)),
            "compile": [of((2, 6, 7, 3), (4, 5), False), of((2, 6, 7, 3), (4, 5), True)],
            "kept": [],
        }


OPERATORS = [LRN(), MaxPool2d(), ReLULRNMaxPool2d(), BatchNormReLUMaxPool2d(), Conv2dReLU(), Augment()]
lrn, max_pool2d, relu_lrn_max_pool2d, batch_norm_relu_max_pool2d, conv2d_relu, augment = OPERATORS
