"""The CUDA kernels keep the operators' promises, as far as a CPU can tell: every one under the sanitizers."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from promises import (
    DTYPES,
    FORMATS,
    NARROW,
    assert_bitwise,
    assert_same_answer,
    at_offsets,
    gradients,
    ident,
    integers,
    leaf,
    randn,
)

from fastcnn import LRNParams, PoolParams, reference
from fastcnn.params import opmath

LRN = LRNParams(5, 0.5, 0.75, 1.0)  # the denominator matters as much as the numerator
POOL = PoolParams(3, 2)
LRNS = [
    LRN,
    LRNParams(5, 0.5, 0.5),
    LRNParams(4, 0.5, 0.6),
    LRNParams(2, 1.0, 1.0),
    LRNParams(3, 0.5),
    LRNParams(99, 9.0),
]
POOLS = [
    PoolParams(2, 2),
    PoolParams(3, 1, 1),
    PoolParams((2, 3), (3, 1), (1, 0)),
    PoolParams(1, 3),
    PoolParams(2, 2, 1, 3),  # windows whose first row is in the padding
    PoolParams(3, 2, 1, 2),
    PoolParams(3, 2, 1, 1, True),
    PoolParams(2, 3, 0, 1, True),
    PoolParams(2, 5),  # rows between windows
    PoolParams(17, 1, 8),  # more than 256 places: the argmax takes int32
]
PARTS = list(itertools.product([False, True], [None, LRN], [None, POOL]))


def assert_same_tail(emulator, x, bias=None, *, relu=True, lrn=None, pool=None, offset=0):
    """Forward, argmax and gradients against the reference in float64; see promises.assert_tail_keeps_same_answer."""
    tail = {"relu": relu, "lrn": lrn, "pool": pool}
    y, argmax = emulator.forward("relu_lrn_max_pool2d", x, bias, **tail, offset=offset)
    x64, bias64 = leaf(x, torch.float64), leaf(bias, torch.float64)
    pooled64 = reference.relu_lrn_max_pool2d(x64, bias64, **tail)
    assert_same_answer(y, pooled64.detach())
    y64 = at_offsets(reference.relu_lrn_max_pool2d(x64, bias64, relu=relu, lrn=lrn), argmax, pool) if pool else pooled64
    assert (y64 - pooled64).norm() <= 1e-6 * pooled64.norm()
    dy = 2 + randn(*y.shape, dtype=y.dtype, seed=1)
    dx64, dbias64 = gradients(y64, (x64, bias64), dy.double())
    dx, dbias = emulator.backward("relu_lrn_max_pool2d_backward", dy, x, bias, argmax, **tail, offset=offset)
    assert_same_answer(dx, dx64, backward=True)
    if bias is not None:
        assert_same_answer(dbias, dbias64, backward=True)


def bias_of(x):
    return randn(x.shape[1], dtype=opmath(x.dtype), seed=1)


@pytest.fixture(params=FORMATS, ids=ident)
def format(request):
    return request.param


# Runs of channels of 16 bytes, whole and broken; one channel; more than a block has threads for.
@pytest.mark.parametrize("shape", [(2, 48, 7, 9), (2, 37, 9, 17), (3, 1, 5, 5), (1, 600, 3, 3)], ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_every_part_and_dtype(address, dtype, format, shape):
    x = randn(*shape, dtype=dtype, format=format)
    for relu, lrn, pool in PARTS if shape[1] == 37 else [(True, LRN, POOL), (True, None, POOL), (False, LRN, None)]:
        assert_same_tail(address, x, bias_of(x), relu=relu, lrn=lrn, pool=pool)
        assert_same_tail(address, x, relu=relu, lrn=lrn, pool=pool, offset=8)


@pytest.mark.parametrize("lrn", LRNS, ids=ident)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_window_and_groups(address, format, groups, lrn):
    lrn = LRNParams(lrn.size, lrn.alpha, lrn.beta, lrn.k, groups)
    for dtype, pool in [(torch.float32, None), (torch.float32, POOL), (torch.bfloat16, POOL), (torch.float64, None)]:
        assert_same_tail(address, randn(2, 36, 5, 7, dtype=dtype, format=format), relu=False, lrn=lrn, pool=pool)


@pytest.mark.parametrize("pool", POOLS, ids=ident)
def test_every_pool(address, format, pool):
    for dtype in (torch.float32, torch.float16):
        x = randn(2, 17, 11, 13, dtype=dtype, format=format)
        assert_same_tail(address, x, bias_of(x), pool=pool)
        assert_same_tail(address, x, lrn=LRN, pool=pool)


@pytest.mark.parametrize("width", [1, 2, 31, 33, 65])
def test_every_width(address, format, width):
    pool = POOL if width > 2 else PoolParams(3, 2, 1)
    assert_same_tail(address, randn(1, 9, 4, width, format=format), lrn=LRN, pool=pool)


@pytest.mark.parametrize(("op", "tail"), [("lrn", {"lrn": LRN}), ("max_pool2d", {"pool": POOL})])
def test_single_operators_are_the_tail_with_one_part(address, format, op, tail):
    x = randn(2, 20, 9, 9, format=format)
    y, argmax = address.forward(op, x, **tail)
    tail_y, tail_argmax = address.forward("relu_lrn_max_pool2d", x, **tail)
    assert_bitwise(y, tail_y)
    dy = randn(*y.shape, seed=1)
    dx, _ = address.backward(f"{op}_backward", dy, x, None, argmax, **tail)
    tail_dx, _ = address.backward("relu_lrn_max_pool2d_backward", dy, x, None, tail_argmax, **tail)
    assert_bitwise(dx, tail_dx)


def special(*shape, dtype, format):
    """Ties, NaN, both infinities and both zeros."""
    x = integers(*shape, dtype=torch.float32)
    x.view(-1)[::7] = float("nan")
    x.view(-1)[::5] = -float("inf")
    x.view(-1)[::31] = float("inf")
    x.view(-1)[3::9] = -0.0
    return x.to(dtype).contiguous(memory_format=format)


def assert_pool_is_torchs(emulator, x, pool):
    """y, argmax and the gradient, bit for bit."""
    y, argmax = emulator.forward("max_pool2d", x, pool=pool)
    assert_bitwise(emulator.forward("max_pool2d", x, pool=pool, with_argmax=False)[0], y)
    expected, indices = F.max_pool2d(x, *pool.op_args(), return_indices=True)
    assert_bitwise(y, expected)
    assert_bitwise(reference.flat_indices(argmax, x.shape[-1], pool), indices)
    dy = randn(*y.shape, dtype=x.dtype, seed=1)
    dx, _ = emulator.backward("max_pool2d_backward", dy, x, None, argmax, pool=pool)
    wide = reference.max_pool2d_backward(dy.to(opmath(x.dtype)), argmax, x.shape[2:], pool)
    assert_bitwise(dx, wide.to(x.dtype))


@pytest.mark.parametrize("pool", [POOL, *POOLS], ids=ident)
def test_pool_is_bitwise_that_of_torch(address, format, pool):
    for dtype in DTYPES:
        assert_pool_is_torchs(address, integers(2, 9, 11, 13, dtype=dtype).contiguous(memory_format=format), pool)
        assert_pool_is_torchs(address, special(2, 9, 11, 13, dtype=dtype, format=format), pool)


def test_stride_and_dilation_far_beyond_the_map(address, format):
    x = integers(2, 5, 4, 6).contiguous(memory_format=format)
    for pool in (
        PoolParams(2, 10**9),
        PoolParams((2, 1), (1, 10**9)),
        PoolParams(1, 1, 0, 10**9),
        PoolParams(2, 2**31 - 1, 1),
    ):
        y, argmax = address.forward("max_pool2d", x, pool=pool)
        expected, indices = F.max_pool2d(x, *pool.op_args(), return_indices=True)
        assert_bitwise(y, expected)
        assert_bitwise(reference.flat_indices(argmax, 6, pool), indices)


@pytest.mark.parametrize("lrn", [LRN, LRNParams(3, 0.5, 0.6, 0.0), LRNParams(5, 1.0, 0.75, 0.0)], ids=ident)
def test_nan_inf_and_zero_denominators_like_the_reference(address, format, lrn):
    x = special(2, 12, 4, 6, dtype=torch.float32, format=format)
    x[0, 6:] = 0  # k = 0: a window of zeros divides by 0
    assert_bitwise_nonfinite(
        address.forward("lrn", x, lrn=lrn)[0], reference.local_response_norm(x, *lrn.op_args()[:4])
    )
    dy = randn(*x.shape, seed=1)
    assert_bitwise_nonfinite(address.backward("lrn_backward", dy, x, lrn=lrn)[0], reference.lrn_backward(dy, x, lrn))


def assert_bitwise_nonfinite(out, ref):
    torch.testing.assert_close(out, ref, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_one_huge_value_does_not_spoil_its_neighbours(address, format):
    x = randn(1, 24, 3, 3, format=format)
    x[0, 8] = 1e15
    for lrn in (LRN, LRNParams(3, 0.5, 0.6)):
        y, _ = address.forward("lrn", x, lrn=lrn)
        expected = reference.local_response_norm(x.double(), *lrn.op_args()[:4])
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-8)


def test_relu_passes_gradient_where_its_output_is_nan(address, format):
    x = special(2, 9, 5, 7, dtype=torch.float32, format=format)
    dy = randn(*x.shape, seed=1)
    dx, _ = address.backward("relu_lrn_max_pool2d_backward", dy, x, relu=True)
    assert_bitwise(dx, dy.masked_fill(x.relu() <= 0, 0))


def test_float16_squares_do_not_overflow(address, format):
    x = randn(2, 20, 9, 9, format=format).mul(1e4).half()
    assert_same_tail(address, x, lrn=LRNParams(5, 1e-4, 0.75, 2.0), pool=POOL)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=ident)
def test_bias_gradient_of_many_terms(address, dtype, format):
    """A sum of 16-bit values in 16 bits, or of many float32 in one accumulator, would be far off."""
    x = randn(4, 5, 61, 67, dtype=dtype, format=format)
    dy, bias = torch.ones_like(x), bias_of(x)
    _, dbias = address.backward("relu_lrn_max_pool2d_backward", dy, x, bias, relu=True)
    assert_same_answer(dbias, (x.double() + bias.double().view(-1, 1, 1) > 0).sum((0, 2, 3)).double())


@pytest.mark.parametrize("tail", [{}, {"lrn": LRN}, {"pool": POOL}, {"lrn": LRN, "pool": POOL}], ids=str)
def test_empty_batch(address, format, tail):
    x = torch.empty(0, 5, 7, 7).contiguous(memory_format=format)
    y, argmax = address.forward("relu_lrn_max_pool2d", x, **tail)
    assert y.shape[0] == 0
    dx, dbias = address.backward("relu_lrn_max_pool2d_backward", y, x, randn(5), argmax, relu=True, **tail)
    assert dx.shape == x.shape
    assert_bitwise(dbias, torch.zeros(5))


def test_too_big_for_32_bit_coordinates_raises(address):
    pool = PoolParams(2**31 - 1, 1, 2**30 - 1)
    with pytest.raises(RuntimeError, match=r"fewer than 2\*\*30 rows and columns with padding"):
        address.forward("max_pool2d", torch.zeros(1, 1, 4, 4), pool=pool)


@pytest.mark.parametrize("tail", [{"lrn": LRN}, {"pool": POOL}, {"lrn": LRN, "pool": POOL}, {}], ids=str)
@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ((1, 2**32 + 8, 4, 4), r"fewer than 2\*\*30 channels"),
        ((0, 2**32 + 8, 4, 4), r"fewer than 2\*\*30 channels"),
        ((1, 2**24, 4, 4), r"a CUDA grid cannot have \d+ x \d+ blocks"),  # not even folded
    ],
    ids=["channels", "channels of none", "blocks"],
)
def test_more_channels_than_can_be_counted_raise(address, shape, error, tail):
    pool = tail["pool"].op_args() if "pool" in tail else ([],) * 4 + (False,)
    task = (3, list(shape), False, True, LRN.op_args() if "lrn" in tail else (0, 0.0, 0.0, 0.0, 1), *pool)
    nothing, empty = (b"", 0), (0, 0)
    if shape[0]:
        with pytest.raises(RuntimeError, match=error):
            address.call("relu_lrn_max_pool2d", task, nothing, None, empty, None)
    if shape[1] > 2**30:
        with pytest.raises(RuntimeError, match=error):
            address.call("relu_lrn_max_pool2d_backward", task, nothing, nothing, nothing, nothing, empty, empty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ident)
@pytest.mark.parametrize(
    "tail",
    [{"lrn": LRN}, {"pool": POOL}, {"lrn": LRN, "pool": POOL}, {"lrn": LRN, "pool": POOLS[4]}, {"lrn": LRNS[2]}],
    ids=lambda tail: "-".join(map(ident, tail.values())),
)
def test_no_barrier_is_missing(thread, dtype, format, tail):
    x = randn(2, 20, 9, 13, dtype=dtype, format=format)
    assert_same_tail(thread, x, bias_of(x), **tail)
