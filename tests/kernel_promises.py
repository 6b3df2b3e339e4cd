"""What the kernels of an operator promise wherever they run: the same answer, for every size, and as torch's for NaN.

Imported by the ``test_promises.py`` of the folders that keep these promises; see ``places.py``. The lists of sizes are
shorter where kernels are slow.
"""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from operators import (
    ALEXNET_LRN,
    AWKWARD,
    INF,
    NAN,
    NONE,
    POOL,
    POOLS,
    STRONG,
    WIDE,
    conv2d_relu,
    lrn,
    relu_lrn_max_pool2d,
)
from places import over
from promises import DTYPES, FORMATS, assert_bitwise, assert_same_answer, in_format, integers, randn

from fastcnn import LRNParams, PoolParams

# (alpha, beta, k) of LRN over 5 channels
CONSTANTS = [
    (alpha, beta, k)
    for beta in (0.75, 0.5, 1.0, 0.6, 2.0, 0.0, -0.5)
    for alpha, k in ((1e-4, 1.0), (1e-4, 2.0), (3.0, 1.0), (1e3, 2.0), (0.0, 2.0), (1.0, 0.0))
]
FEW_CONSTANTS = [
    (alpha, beta, k)
    for beta in (0.75, 0.5, 1.0, 0.6, 2.0, 0.0, -0.5, 0.3)
    for alpha, k in ((1e-4, 2.0), (1e3, 2.0), (1.0, 0.0))
]
LRNS = [ALEXNET_LRN, LRNParams(5, 1e3, 0.5), LRNParams(4, 3.0, 1.0), LRNParams(2, 1.0, 0.6)]
FEW_LRNS = [LRNParams(2, 1.0, 0.6), LRNParams(9, 0.5, groups=2), LRNParams(40, 9.0)]
EMULATED_LRNS = [
    STRONG,
    LRNParams(5, 0.5, 0.5),
    LRNParams(4, 0.5, 0.6),
    LRNParams(2, 1.0, 1.0),
    LRNParams(3, 0.5),
    LRNParams(99, 9.0),
]
WINDOWS = {  # channels, and windows also even and wider than they are many
    "cpu": [(c, size) for c in (1, 2, 3, 5, 16, 17) for size in (*range(1, c + 4), 1001, 2**40)],
    "interpreter": [(c, size) for c in (5, 24) for size in (1, 2, 3, 4, 6, 11, 16, 17, 40, 2**40)],
}
GROUPS = {  # channels, groups, windows
    "cpu": [(c, g, size) for c, g in ((6, 2), (6, 3), (6, 6), (96, 2), (34, 2), (51, 3)) for size in (1, 2, 3, 5, 40)],
    "interpreter": [(6, 3, 2), (16, 2, 5), (34, 2, 3), (32, 2, 40)],
}
FEW_POOLS = [
    POOL,
    PoolParams(2, 2),
    PoolParams(3, 1, 1),
    PoolParams((2, 3), (1, 2), (1, 0)),
    PoolParams(3, 2, 1, 2, True),
    PoolParams(2, 5),
    PoolParams(2, 3, 1, 2, True),
]
EMULATED_POOLS = [
    POOL,
    PoolParams(2, 2),
    PoolParams(3, 1, 1),
    PoolParams((2, 3), (3, 1), (1, 0)),
    PoolParams(1, 3),
    PoolParams(2, 2, 1, 3),  # windows whose first row is in the padding
    PoolParams(3, 2, 1, 2),
    PoolParams(3, 2, 1, 1, True),
    PoolParams(2, 3, 0, 1, True),
    PoolParams(2, 5),  # rows between windows
    WIDE,
]
POOLED = {
    "cpu": ((2, 17, 12, 13), POOLS),
    "interpreter": ((1, 6, 6, 7), FEW_POOLS),
    "emulator": ((2, 9, 11, 13), EMULATED_POOLS),
}
FAR = [PoolParams(2, 10**9), PoolParams((2, 1), (1, 10**9)), PoolParams(1, 1, 0, 10**9), PoolParams(2, 2**31 - 1, 1)]


def every_lrn(op, kind):
    shape, lrns = {
        "cpu": ((2, 36, 7, 9), LRNS),
        "interpreter": ((1, 38, 5, 4), FEW_LRNS),
        "emulator": ((2, 36, 5, 7), EMULATED_LRNS),
    }[kind]
    many = lrns if kind == "interpreter" else [replace(lrn, groups=g) for lrn in lrns for g in (1, 2, 4)]
    return [case for lrn in many for case in op.normalizing(shape, lrn)]


def in_lrn(op, kind, *args, **options):
    """In the interpreter only by lrn, whose code the tail's is."""
    return [] if kind == "interpreter" and op is not lrn else op.normalizing(*args, **options)


def every_constant(op, kind):
    """For the tail not k = 0, which makes NaN of windows that ReLU makes zero."""
    shape, constants = ((2, 17, 3, 4), FEW_CONSTANTS) if kind == "interpreter" else ((2, 17, 3, 9), CONSTANTS)
    constants = [c for c in constants if c[2] or op is lrn]
    return [case for alpha, beta, k in constants for case in in_lrn(op, kind, shape, LRNParams(5, alpha, beta, k))]


def every_window(op, kind):
    shapes = [((2, c, 3, 4 if kind == "interpreter" else 7), size) for c, size in WINDOWS[kind]]
    return [case for s, size in shapes for case in in_lrn(op, kind, s, LRNParams(size, 0.5 * min(size, 40)))]


def every_size(op, kind):
    sizes = itertools.product((1, 2, 3, 5, 16, 17, 48, 96, 100), (1, 2, 7, 13, 15, 16, 17, 31, 55))
    if kind == "emulator":
        sizes = ((9, width) for width in (1, 2, 31, 33, 65))
    return [case for c, w in sizes for case in op.normalizing((2, c, 4, w), STRONG)]


def groups(op, kind):
    return [
        case
        for c, g, size in GROUPS[kind]
        for case in in_lrn(op, kind, (2, c, 3, 5), LRNParams(size, 0.5, groups=g), every_part=kind == "cpu" and c == 34)
    ]


def spoilt(op, kind):
    """Of a pool the windows are 3 x 3."""
    if kind == "emulator":
        return [case for size in (3, 5) for case in op.normalizing((1, 24, 5, 5), LRNParams(size, 0.5))]
    if kind == "interpreter":
        return [case for size in (5, 20) for case in in_lrn(op, kind, (1, 64, 3, 4), LRNParams(size, 0.5))]
    normalizing = [case for size in (1, 2, 5, 8) for case in op.normalizing((2, 36, 13, 18), LRNParams(size, 0.5))]
    alone = [case for case in op.normalizing((2, 36, 13, 18), STRONG, every_part=True) if not case.pool]
    return [*normalizing, *alone[:2], *op.pooling((2, 36, 13, 18), POOL)]


def non_finite(op, kind):
    shape = (1, 20, 5, 7) if kind == "interpreter" else (2, 20, 7, 9)
    betas = (0.75, 0.6) if kind == "interpreter" else (0.5, 0.75, 1.0, 0.6)
    lrns = [LRNParams(5, 0.5, beta, k) for beta in betas for k in (1.0, 0.0)]
    lrns += [LRNParams(3, 0.5, 0.6, 0.0)] if kind == "emulator" else []
    if kind == "interpreter" and op is not lrn:
        lrns = lrns[:1]
    every = kind == "cpu"
    return [c for lrn in lrns for c in op.normalizing(shape, lrn, every_part=every and lrn.beta == 0.75 and lrn.k == 1)]


def every_pool(op, kind):
    shape, pools = POOLED[kind]
    alone = [op.stage(shape, {**NONE, "relu": relu}) for relu in (True, False)] if op is relu_lrn_max_pool2d else []
    return [*alone, *(case for pool in pools for case in op.pooling(shape, pool))]


def every_pool_after_lrn(op, kind):
    shape, pools = POOLED[kind]
    return [op.stage(shape, {"lrn": STRONG, "pool": pool}) for pool in pools] if op is relu_lrn_max_pool2d else []


def without_lrn(op, kind):
    shape = (1, 6, 5, 7) if kind == "interpreter" else (2, 17, 9, 9)
    relu_alone = [relu_lrn_max_pool2d.stage(shape, {"relu": True})] if op is relu_lrn_max_pool2d else []
    return [*relu_alone, *op.pooling(shape, POOL)]


# -- same answer ------------------------------------------------------------------------------------------------------


@over("answers", dtypes=DTYPES, formats=FORMATS)
def test_same_answer(place, case, dtype, format):
    case.op.check(place, case, case.tensors(dtype, format))


@over("images", dtypes=DTYPES)
def test_same_answer_of_a_single_image(place, case, dtype):
    case.op.check(place, case, case.tensors(dtype))


@over(every_lrn, formats=FORMATS)
def test_same_answer_for_every_lrn(place, case, format):
    for dtype in [torch.bfloat16] if place.is_slow else [torch.float32, torch.float64, torch.bfloat16]:
        case.op.check(place, case, case.tensors(dtype, format))


@over(every_constant, formats=FORMATS)
def test_same_answer_for_every_constant_of_lrn(place, case, format):
    for dtype in (torch.float32, torch.float64):
        case.op.check(place, case, case.tensors(dtype, format))


@over(every_pool_after_lrn, "kernels", formats=FORMATS)
def test_same_answer_for_every_pool_after_lrn(place, case, format):
    """In 16 bits of few values: AVX-512 has a power of 13 bits for them, by which near-ties may go either way."""
    case.op.check(place, case, case.tensors(format=format))
    few = replace(case, shapes=((1, 3, 7, 9), (3,)))
    case.op.check(place, few, few.tensors(torch.bfloat16, format))


@over(
    lambda op, kind: [c for b in (0.5, 0.75, 1.0, 0.6) for c in op.normalizing((2, 20, 5, 9), LRNParams(5, 1e-4, b, 2))]
)
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_same_answer_for_small_and_large_values(place, case, scale):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        case.op.check(place, case, [t if t is None else scale * t for t in case.tensors(dtype)])


@over(lambda op, kind: op.normalizing((2, 20, 9, 9), ALEXNET_LRN), formats=FORMATS)
def test_float16_squares_do_not_overflow(place, case, format):
    case.op.check(place, case, [t if t is None else t.mul(1e4).half() for t in case.tensors(format=format)])


@over(every_size, "kernels", formats=FORMATS)
def test_every_channel_count_and_width(place, case, format):
    case.op.check(place, case, case.tensors(format=format))


@over(every_window, "kernels", formats=FORMATS)
def test_every_window_also_even_and_wider_than_the_channels(place, case, format):
    results = case.op.check(place, case, case.tensors(format=format))
    if case.lrn.size <= 40:
        torch.testing.assert_close(results.y, case.counterpart(*case.tensors(format=format)))


@over(groups, formats=FORMATS)
def test_groups_do_not_see_each_other(place, case, format):
    """Whatever is in one, the others keep every bit."""
    tensors = case.tensors(format=format)
    results = case.op.check(place, case, tensors)
    kept = slice(tensors[0].shape[1] // case.lrn.groups, None)
    for value in (1e20, INF, NAN):
        spoilt = [tensors[0].clone(memory_format=torch.preserve_format), *tensors[1:]]
        spoilt[0][:, : kept.start] = value
        for ours, before in zip(place.run(case, spoilt, results.dy).bits, results.bits, strict=True):
            if before.dim() == 4:
                assert_bitwise(ours[:, kept], before[:, kept])


def relu_of_many(op, kind):
    shape = (2, 5, 31, 33) if kind == "interpreter" else (4, 5, 61, 67)
    return [op.stage(shape, {"relu": True}, float32_bias=True)] if op is relu_lrn_max_pool2d else []


@over(relu_of_many, dtypes=DTYPES, formats=FORMATS)
def test_bias_gradient_of_many_terms(place, case, dtype, format):
    """A sum of 16-bit values in 16 bits, or of many float32 in one accumulator, would be far off."""
    x, bias = case.tensors(dtype, format)
    *_, dbias = place.run(case, [x, bias], torch.ones_like(x)).gradients
    assert_same_answer(dbias, (x.double() + bias.double().view(-1, 1, 1) > 0).sum((0, 2, 3)).double())


@over("one")
def test_any_input_gets_the_same_answer(place, case):
    @settings(max_examples=case.op.examples)
    @given(case.op.any_case())
    def check(drawn):
        found, described = drawn
        case.op.check_any(place, found, described.tensor())

    check()


# -- ties, NaN and inf ------------------------------------------------------------------------------------------------


@over(every_pool, formats=FORMATS)
def test_ties_go_to_the_first_element_like_torch(place, case, format):
    def check(low, high, dtype):
        tensors = [
            t if t is None else integers(*t.shape, dtype=dtype, low=low, high=high, seed=i)
            for i, t in enumerate(case.tensors())
        ]
        case.op.check_bits_of_torch(place, case, [in_format(tensors[0], format), *tensors[1:]])

    for dtype in [torch.float32] if place.is_slow else DTYPES:
        check(-2, 3, dtype)
    if not place.is_slow:
        check(-3, 1, torch.float64)  # mostly zero after ReLU
        check(0, 1, torch.float32)  # constant


@over(every_pool, "kernels", dtypes=[torch.float32, torch.bfloat16], formats=FORMATS)
def test_nan_and_infinities_like_torch(place, case, dtype, format):
    """Through values and, by the last NaN of a window, through gradients; ReLU passes both."""
    shape, bias = case.shapes[0], [None] * (len(case.shapes) - 1)
    few, many = integers(*shape, dtype=dtype), integers(*shape, dtype=dtype)
    few[0, 0, 0, 0] = few[0, 3, 5, 5] = few[-1, -1, -1, -1] = few[-1, shape[1] // 2, 5, :] = NAN
    many[integers(*shape, low=0, high=3, seed=1) == 0] = NAN
    infinite = integers(*shape, dtype=dtype)
    infinite[integers(*shape, low=0, high=4, seed=1) == 0] = INF
    infinite[integers(*shape, low=0, high=4, seed=2) == 0] = -INF
    infinite[-1, : shape[1] // 2] = -INF
    both = infinite.clone()
    both[integers(*shape, low=0, high=4, seed=3) == 0] = NAN
    both[-1, 0] = -INF
    alike = [torch.full(shape, value, dtype=dtype) for value in (NAN, -INF)]
    for x in [both] if place.is_slow else [few, many, infinite, both, *alike]:
        case.op.check_bits_of_torch(place, case, [in_format(x, format), *bias])


@over(lambda op, kind: [case for pool in FAR for case in op.pooling((2, 5, 4, 6), pool)], formats=FORMATS)
def test_stride_and_dilation_far_beyond_the_map(place, case, format):
    x, *bias = [t if t is None else integers(*t.shape, seed=i) for i, t in enumerate(case.tensors())]
    case.op.check_bits_of_torch(place, case, [in_format(x, format), *bias])


@over(without_lrn, formats=FORMATS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_non_finite_gradients_go_where_those_of_torch_go(place, case, format, value):
    tensors = [t if t is None else integers(*t.shape, seed=i) for i, t in enumerate(case.tensors())]
    tensors[0] = in_format(tensors[0], format)
    dy = integers(*case.counterpart(*tensors).shape, seed=2)
    dy[integers(*dy.shape, low=0, high=9, seed=3) == 0] = value
    case.op.check_bits_of_torch(place, case, tensors, dy)


@over(non_finite, formats=FORMATS)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e20])
def test_non_finite_values_through_lrn_like_torch(place, case, value, format):
    """Also where k = 0 and a window of zeros divides by 0."""
    for dtype in [torch.float32] if place.is_slow else [torch.float32, torch.float64]:
        tensors = case.tensors(dtype, format)
        x = tensors[0]
        x[0, 0, 0, 0] = x[0, 7, 1, 1] = x[-1, -1, -1, -1] = value
        x[0, :, 1, 2] = 0
        expected = case.counterpart(*tensors)
        y = case(*tensors) if place.is_slow else place.run(case, tensors, torch.ones_like(expected)).y
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@over(spoilt, dtypes=[torch.float32, torch.bfloat16, torch.float64], formats=FORMATS)
@pytest.mark.parametrize("value", [1e20, INF, NAN])
def test_one_huge_value_does_not_spoil_its_neighbours(place, case, value, dtype, format):
    """Neither forward nor backward, neither as input nor as gradient: out of its windows' reach not one bit changes."""
    tensors, pooled = case.tensors(dtype, format)[:1] + [None] * (len(case.shapes) - 1), case.pool is not None
    x, size = tensors[0], min(case.lrn.size, x_channels(case)) if case.lrn else 1
    clean = place.run(case, tensors, randn(*case(*tensors).shape, dtype=dtype, seed=1))
    before, after = size // 2, (size - 1) // 2
    _, channels, height, width = x.shape
    spots = [(0, 0, 0), (13, 1, 7), (17, height - 1, width - 1), (channels - 1, 1, width - 2)]
    for c, h, w in spots[2:3] if place.is_slow else spots:
        c, w = min(c, channels - 1), min(w, width - 1)
        spoilt, dy = x.clone(memory_format=torch.preserve_format), clean.dy.clone()
        spoilt[-1, c, h, w] = value
        oh, ow = (min(h // 2, dy.shape[2] - 1), min(w // 2, dy.shape[3] - 1)) if pooled else (h, w)
        dy[-1, c, oh, ow] = value
        by_x, by_dy = place.run(case, [spoilt, *tensors[1:]], clean.dy), place.run(case, tensors, dy)

        def spared(t, first, last, at):
            """Without the channels, and the pixels that a pool's windows reach."""
            t, (h, w), reach = t.clone(), at, 2 if pooled else 0
            rows, columns = (slice(max(i - reach, 0), i + reach + 1) for i in (h, w))
            t[-1, max(c - first, 0) : c + last + 1, rows, columns] = 0  # noqa: B023
            return t

        # channel d sees the values of d - before ... d + after, its gradient those of all the windows that hold d
        assert_bitwise(spared(by_x.y, after, before, (oh, ow)), spared(clean.y, after, before, (oh, ow)))
        reach = 2 * (size - 1) if pooled else size - 1  # another maximum may win, whose gradient reaches as far again
        dx, dx_by_x, dx_by_dy = (r.gradients[0] for r in (clean, by_x, by_dy))
        assert_bitwise(spared(dx_by_x, reach, reach, (h, w)), spared(dx, reach, reach, (h, w)))
        middle = (2 * oh + 1, 2 * ow + 1) if pooled else (h, w)
        assert_bitwise(spared(dx_by_dy, before, after, middle), spared(dx, before, after, middle))


def x_channels(case):
    return case.shapes[0][1]


# -- convolution ------------------------------------------------------------------------------------------------------


def convolutions(op, kind):
    return [op.convolution(name) for name in ("alexnet_conv1", *AWKWARD)] if op is conv2d_relu else []


@over(convolutions, "each", dtypes=DTYPES, formats=FORMATS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_non_finite_values_propagate_as_in_torch(place, case, dtype, format, value):
    for i in range(3):  # in input, weight and bias
        tensors, without = case.tensors(dtype, format), replace(case, kwargs={**case.kwargs, "padding": 0})
        tensors[i][(0,) * tensors[i].dim()] = value
        # in Triton's kernel, whether weights meet the zeros of the padding differs, as in torch's
        run = without if i == 1 and place.name == "triton" else case
        # with AMX, oneDNN's bfloat16 convolution spreads NaN to outputs whose windows do not meet it; Triton's does not
        y = run(*tensors)
        expected = run.counterpart(*([t.float() for t in tensors] if place.name == "triton" else tensors))
        assert_bitwise(y.isnan(), expected.isnan())
        assert_bitwise(y.isinf(), expected.isinf())


def depthwise(op, kind):
    shapes = (2, 3, 2, 8), (3, 1, 1, 1), (3,)
    frozen = (False, True) if op is conv2d_relu else ()
    return [op.case("frozen" if f else "trained", *shapes, groups=3, frozen=f) for f in frozen]


@over(depthwise, "each", dtypes=DTYPES, formats=FORMATS)
def test_relu_passes_the_gradient_of_all_but_values_up_to_zero(place, case, dtype, format):
    """Also that of NaN, and not that of zeros of either sign, as torch."""
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, 2.0], dtype=dtype).repeat(2, 3, 2, 1)
    tensors = [in_format(values, format), torch.ones(3, 1, 1, 1, dtype=dtype), torch.zeros(3, dtype=dtype)]
    results = place.run(case, tensors, torch.ones_like(values))
    dx = results.gradients[0]
    assert_bitwise(dx, torch.tensor([1, 1, 0, 0, 0, 1, 0, 1], dtype=dtype).expand_as(dx))
    assert_bitwise(results.y, F.relu(values))
