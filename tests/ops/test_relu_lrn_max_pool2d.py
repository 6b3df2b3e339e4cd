"""Every promise that relu_lrn_max_pool2d makes."""

import copy
import itertools
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from promises import (
    DTYPES,
    FORMATS,
    NARROW,
    assert_bitwise,
    assert_same_answer,
    assert_tail_keeps_same_answer,
    at_offsets,
    embedded,
    expected_strides,
    gradients,
    ident,
    in_format,
    inputs,
    integers,
    kept_argmax,
    leaf,
    randn,
    recorded_calls,
    saved_bytes,
    tail_args,
    torch_tail,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams, reference

ALEXNET_LRN = LRNParams(5, 1e-4, 0.75, 2.0)
LRN = LRNParams(5, 0.5, 0.75, 1.0)  # the denominator matters as much as the numerator
POOL = PoolParams(3, 2)
NONE = {"relu": False, "lrn": None, "pool": None}
STAGE = {"relu": True, "lrn": LRN, "pool": POOL}
PARTS = [
    {"relu": relu, "lrn": lrn, "pool": pool}
    for relu, lrn, pool in itertools.product((False, True), (None, LRN), (None, POOL))
]
POOLS = [
    PoolParams(3, 2),
    PoolParams(2, 2),
    PoolParams(3, 1),
    PoolParams(5, 3, 2),
    PoolParams(1),
    PoolParams(1, 3),
    PoolParams((2, 3)),
    PoolParams((1, 3), (2, 1), (0, 1)),
    PoolParams((3, 1), 1, (1, 0)),
    PoolParams(2, 5),
    PoolParams(3, 2, 1),
    PoolParams(3, 2, 1, 2),
    PoolParams(2, 2, 1, 3),
    PoolParams(3, 2, 0, 1, True),
    PoolParams(3, 2, 1, 1, True),
    PoolParams(2, 3, 1, 2, True),
    PoolParams(17, 1, 8),  # more than 256 places: the argmax takes int32
    PoolParams((16, 16), 3, 8),  # the most places that one byte can name
]
TAIL, TAIL_BACKWARD = (
    torch.ops.fastcnn.relu_lrn_max_pool2d.default,
    torch.ops.fastcnn.relu_lrn_max_pool2d_backward.default,
)


def parts_id(tail):
    return "+".join(name for name, part in tail.items() if part) or "copy"


def forward_and_backward(x, bias, **tail):
    """The bits of everything: y, argmax, dx and, with a bias, dbias."""
    y, argmax = TAIL(x, bias, *tail_args(**tail), tail["pool"] is not None)
    dy = randn(*y.shape, dtype=y.dtype, seed=1)
    dx, dbias = TAIL_BACKWARD(dy, x, bias, argmax, *tail_args(**tail))
    return [y, argmax, dx, *([] if bias is None else [dbias])]


def assert_same_bits(out, expected):
    for a, b in zip(out, expected, strict=True):
        assert_bitwise(a, b)


def assert_same_gradients(backend, out, expected):
    """Of input and bias; the kernels' have the same bits, torch's own sum depends on the strides of what it adds up."""
    assert_bitwise(out[0], expected[0])
    if backend == "reference":
        torch.testing.assert_close(out[1], expected[1], rtol=1e-5, atol=1e-5)
    else:
        assert_bitwise(out[1], expected[1])


# -- same answer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", PARTS, ids=parts_id)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_same_answer_in_every_dtype_with_any_part_absent(backend, dtype, format, with_bias, tail):
    x, bias = randn(3, 37, 9, 17, dtype=dtype, format=format), randn(37, dtype=dtype, seed=1) if with_bias else None
    assert_tail_keeps_same_answer(x, bias, **tail)


@pytest.mark.parametrize("tail", PARTS, ids=parts_id)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", NARROW, ids=ident)
def test_float32_bias_beside_narrow_input(backend, dtype, format, tail):
    x, bias = randn(2, 17, 9, 13, dtype=dtype, format=format), randn(17, seed=1)
    assert_tail_keeps_same_answer(x, bias, **tail)


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_bias_gradient_of_many_terms(backend, format, dtype):
    """A sum of 16-bit values in 16 bits, or of many float32 in one accumulator, would be far off."""
    bias = randn(5, dtype=torch.float32 if dtype in NARROW else dtype)
    x = leaf(randn(4, 5, 61, 67, dtype=dtype, format=format))
    bias = leaf(bias)
    y = FF.relu_lrn_max_pool2d(x, bias)
    (dbias,) = gradients(y, (bias,), torch.ones_like(y))
    mask = x.detach().double() + bias.detach().double().view(-1, 1, 1) > 0
    assert_same_answer(dbias, mask.sum((0, 2, 3)).double())


@pytest.mark.parametrize(
    "lrn", [ALEXNET_LRN, LRNParams(5, 1e3, 0.5), LRNParams(4, 3.0, 1.0), LRNParams(2, 1.0, 0.6)], ids=ident
)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_same_answer_for_every_lrn(backend, format, groups, lrn):
    lrn = LRNParams(lrn.size, lrn.alpha, lrn.beta, lrn.k, groups)
    for dtype in (torch.float32, torch.bfloat16):
        assert_tail_keeps_same_answer(randn(2, 36, 7, 9, dtype=dtype, format=format), None, lrn=lrn, pool=POOL)


@pytest.mark.parametrize("pool", POOLS, ids=ident)
@pytest.mark.parametrize("tail", [{"relu": True}, {"relu": False}, {"lrn": LRN}], ids=["relu", "pool_only", "relu+lrn"])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_same_answer_for_every_pool(kernel, format, tail, pool):
    for shape, dtype in [((2, 17, 11, 13), torch.float32), ((1, 3, 7, 9), torch.bfloat16)]:
        assert_tail_keeps_same_answer(randn(*shape, dtype=dtype, format=format), None, **tail, pool=pool)


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_float16_squares_do_not_overflow(backend, format):
    x = randn(2, 20, 9, 9, format=format).mul(1e4).half()
    assert_tail_keeps_same_answer(x, None, lrn=ALEXNET_LRN, pool=POOL)


# -- every size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 16, 17, 48, 96, 100])
@pytest.mark.parametrize("width", [1, 2, 7, 13, 15, 16, 17, 31, 55])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_every_channel_count_and_width(kernel, format, width, channels):
    x, bias = randn(2, channels, 4, width, format=format), randn(channels, seed=1)
    assert_tail_keeps_same_answer(x, bias, lrn=LRN, pool=POOL if width >= 3 else PoolParams(3, 2, 1))


@pytest.mark.parametrize(
    ("channels", "size"), [(c, size) for c in (1, 2, 3, 5, 17) for size in (*range(1, c + 4), 1001, 2**40)]
)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_every_window_also_even_and_wider_than_the_channels(kernel, format, channels, size):
    lrn = LRNParams(size, 0.5 * min(size, 40))
    assert_tail_keeps_same_answer(randn(2, channels, 5, 7, format=format), None, lrn=lrn, pool=POOL)


@pytest.mark.parametrize(
    "pool",
    [PoolParams(2, 10**9), PoolParams((2, 1), (1, 10**9)), PoolParams(1, 1, 0, 10**9), PoolParams(2, 2**31 - 1, 1)],
    ids=ident,
)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_stride_and_dilation_far_beyond_the_map(backend, format, pool):
    assert_pool_is_bitwise_that_of_torch(integers(2, 5, 4, 6).to(memory_format=format), pool=pool)


@pytest.mark.parametrize("tail", PARTS, ids=parts_id)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_empty_batch(backend, format, tail):
    x, bias = leaf(randn(0, 5, 7, 7, format=format)), leaf(randn(5))
    y = FF.relu_lrn_max_pool2d(x, bias, **tail)
    assert y.shape == torch_tail(x, bias, **tail).shape
    dx, dbias = gradients(y, (x, bias), torch.ones_like(y))
    assert dx.shape == x.shape
    assert_bitwise(dbias, torch.zeros(5))


@pytest.mark.parametrize("shape", [(2, 5, 0, 3), (2, 5, 3, 0), (2, 0, 3, 3), (0, 0, 0, 0)], ids=ident)
@pytest.mark.parametrize("tail", [t for t in PARTS if not t["pool"]], ids=parts_id)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_empty_maps_without_pool(backend, format, tail, shape):
    x, bias = leaf(randn(*shape, format=format)), leaf(randn(shape[1]))
    y = FF.relu_lrn_max_pool2d(x, bias, **tail)
    assert y.shape == x.shape
    dx, dbias = gradients(y, (x, bias), torch.ones_like(y))
    assert dx.shape == x.shape
    assert_bitwise(dbias, torch.zeros(shape[1]))


@pytest.mark.parametrize(
    ("shape", "tail"),
    [
        ((5,), {"relu": True}),
        ((2, 5), {"relu": True}),
        ((5, 9, 7), {"relu": True, "pool": POOL}),
        ((5, 9, 7), {"relu": False, "pool": POOL}),
        ((2, 5, 9), {"relu": True, "lrn": LRN}),
        ((2, 5, 3, 4, 3), {"relu": True, "lrn": LRN}),
        ((2, 5, 3, 4, 3), {"relu": False}),
    ],
    ids=str,
)
def test_other_ranks_run_the_single_operators(backend, shape, tail):
    x = leaf(randn(*shape))
    y, expected = FF.relu_lrn_max_pool2d(x, **tail), torch_tail(x, **tail)
    torch.testing.assert_close(y, expected)
    dy = randn(*y.shape, seed=1)
    torch.testing.assert_close(gradients(y, (x,), dy), gradients(expected, (x,), dy))
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_with_every_part_absent_it_is_a_copy(backend, format):
    x = leaf(randn(2, 5, 3, 4, format=format))
    y = FF.relu_lrn_max_pool2d(x, **NONE)
    assert_bitwise(y.detach(), x.detach())
    assert y.data_ptr() != x.data_ptr()
    assert_bitwise(gradients(y, (x,), x.detach())[0], x.detach())


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_more_than_2_to_the_31_elements(huge, format):
    if "cpu" not in fastcnn.backends.available():
        pytest.skip("takes minutes in plain PyTorch")
    h, w = 4096, 8200
    x = huge(1, 64, h, w, format=format)
    y, argmax = TAIL(x, None, *tail_args(**STAGE), True)
    dx, _ = TAIL_BACKWARD(y, x, None, argmax, *tail_args(**STAGE))
    for row, column in [(0, 0), (h // 2, w // 2), (h - 34, w - 34)]:
        oh, ow = row // 2, column // 2
        piece = x[:, :, row : row + 34, column : column + 34].contiguous()
        inside = y[:, :, oh : oh + 16, ow : ow + 16].contiguous()  # the windows that lie in the piece
        assert_same_answer(inside, reference.relu_lrn_max_pool2d(piece.double(), **STAGE)[:, :, :16, :16])
        # the gradients of the rows and columns that no other window covers
        places = argmax[:, :, oh : oh + 16, ow : ow + 16].contiguous()
        wide = leaf(piece[:, :, :33, :33], torch.float64)
        picked = at_offsets(reference.relu_lrn_max_pool2d(wide, lrn=LRN), places, POOL)
        (expected,) = gradients(picked, (wide,), inside.double())
        inner = slice(None), slice(None), slice(2, 32), slice(2, 32)
        assert_same_answer(dx[:, :, row : row + 33, column : column + 33][inner], expected[inner], backward=True)


# -- memory formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (3, 2, 1, 0), (1, 0, 2, 3), (0, 2, 3, 1), (2, 0, 3, 1)], ids=ident)
@pytest.mark.parametrize("steps", [(1, 1, 1, 1), (1, 2, 1, 1), (1, 1, 1, 2), (2, 1, 3, 1)], ids=ident)
def test_any_strides(backend, order, steps):
    x, bias = embedded(randn(2, 6, 9, 7), order, steps), embedded(randn(6, seed=1), steps=(2,))
    assert_tail_keeps_same_answer(x, bias, **STAGE)


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=ident)
def test_misaligned_memory(backend, order, offset, dtype):
    x, bias = randn(2, 17, 9, 7, dtype=dtype), randn(17, dtype=dtype, seed=1)
    assert_tail_keeps_same_answer(embedded(x, order, offset=offset), embedded(bias, offset=offset), **STAGE)


@pytest.mark.parametrize("dim", range(4))
def test_expanded_input(backend, dim):
    shape = [2, 6, 9, 7]
    one = [*shape]
    one[dim] = 1
    assert_tail_keeps_same_answer(randn(*one).expand(shape), randn(1).expand(6), **STAGE)


@pytest.mark.parametrize("tail", PARTS, ids=parts_id)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_gradient_in_any_memory_format(backend, format, tail):
    x, bias = leaf(randn(2, 17, 9, 7, format=format)), leaf(randn(17, seed=1))
    y = FF.relu_lrn_max_pool2d(x, bias, **tail)
    dy = randn(*y.shape, seed=2)
    expected = torch.autograd.grad(y, (x, bias), dy.contiguous(), retain_graph=True)
    others = [
        in_format(dy, torch.channels_last),
        embedded(dy, (3, 0, 2, 1)),
        embedded(dy, steps=(1, 1, 1, 2)),
        embedded(dy, offset=1),
    ]
    for other in others:
        ours = torch.autograd.grad(y, (x, bias), other, retain_graph=True)
        assert_same_gradients(backend, ours, expected)
        assert ours[0].stride() == expected[0].stride()
    summed = torch.autograd.grad(y.sum(), (x, bias), retain_graph=True)  # the gradient of a sum is an expanded scalar
    assert_same_gradients(backend, summed, torch.autograd.grad(y, (x, bias), torch.ones_like(y)))


@pytest.mark.parametrize("tail", PARTS, ids=parts_id)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 3, 3), (0, 3, 4, 5)], ids=ident)
def test_output_strides_are_channels_last_only_for_channels_last(backend, shape, tail):
    plain, bias = randn(*shape), randn(shape[1])
    others = in_format(plain, torch.channels_last), embedded(plain, [3, 2, 1, 0]), embedded(plain, steps=(1, 2, 1, 1))
    for x in (plain, *others):
        args = tail_args(**tail)
        y, argmax = TAIL(x, bias, *args, tail["pool"] is not None)
        dx, _ = TAIL_BACKWARD(y, x, bias, argmax, *args)
        with FakeTensorMode() as mode:
            fake, fake_bias = mode.from_tensor(x), mode.from_tensor(bias)
            fake_y, fake_argmax = TAIL(fake, fake_bias, *args, tail["pool"] is not None)
            fake_dx, fake_dbias = TAIL_BACKWARD(fake_y, fake, fake_bias, fake_argmax, *args)
        assert y.stride() == fake_y.stride() == expected_strides(x, y.shape)
        assert dx.stride() == fake_dx.stride() == expected_strides(x, x.shape)
        assert (argmax.shape, argmax.dtype, argmax.stride()) == (
            fake_argmax.shape,
            fake_argmax.dtype,
            fake_argmax.stride(),
        )
        assert fake_dbias.shape == bias.shape


@pytest.mark.skipif(sys.platform != "linux", reason="needs mmap with guard pages")
@pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="C++ kernels are not built")
def test_no_kernel_reads_or_writes_out_of_bounds():
    """Every tensor lies against a page that must not be touched, in a process of its own."""
    script = Path(__file__).parents[1] / "guard_pages.py"
    run = subprocess.run([sys.executable, script, "relu_lrn_max_pool2d"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-2000:]


@pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="C++ kernels are not built")
def test_ops_called_directly_refuse_tensors_that_do_not_fit():
    """The ops are public too, and what a kernel would read out of bounds they must not let through."""
    x, bias, args = randn(2, 8, 9, 9), randn(8), tail_args(**STAGE)
    y, argmax = TAIL(x, bias, *args, True)
    small = x[:1, :1, :1, :1]
    for wrong in (
        lambda: TAIL(x, bias[:1], *args, True),
        lambda: TAIL(x, bias.half(), *args, True),
        lambda: TAIL_BACKWARD(small, x, bias, argmax, *args),
        lambda: TAIL_BACKWARD(y.half(), x, bias, argmax, *args),
        lambda: TAIL_BACKWARD(y, x, bias, argmax[:1, :1], *args),
        lambda: TAIL_BACKWARD(y, x, bias[:1], argmax, *args),
    ):
        with fastcnn.backends.use("cpu"), pytest.raises((RuntimeError, ValueError, TypeError)):
            wrong()


# -- ties, NaN and inf ------------------------------------------------------------------------------------------------


def assert_pool_is_bitwise_that_of_torch(x, bias=None, **tail):
    """Without LRN there is nothing to round: values and places equal torch's, and so do gradients of integers."""
    x, bias = leaf(x), leaf(bias)
    ours, theirs = FF.relu_lrn_max_pool2d(x, bias, **tail), torch_tail(x, bias, **tail)
    assert_bitwise(ours.detach(), theirs.detach())
    dy = (torch.arange(ours.numel(), dtype=x.dtype) % 61 + 1).view_as(ours)
    for a, b in zip(gradients(ours, (x, bias), dy), gradients(theirs, (x, bias), dy), strict=True):
        if b is not None:
            assert_bitwise(a, b)


@pytest.mark.parametrize("pool", POOLS, ids=ident)
@pytest.mark.parametrize("relu", [False, True], ids=["-", "relu"])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_ties_go_to_the_first_element_like_torch(backend, format, relu, pool):
    def check(low, high, dtype, bias=None):
        x = in_format(integers(2, 17, 12, 13, dtype=dtype, low=low, high=high), format)
        assert_pool_is_bitwise_that_of_torch(x, bias, relu=relu, pool=pool)

    check(-2, 3, torch.float32, integers(17, seed=1))
    check(-3, 1, torch.float64)  # mostly zero after ReLU
    check(0, 1, torch.float32)  # constant


@pytest.mark.parametrize("dtype", NARROW, ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_ties_of_narrow_values_go_to_the_first_element(backend, format, dtype):
    x = in_format(integers(2, 17, 12, 13, dtype=dtype), format)
    for pool in POOLS[:12]:
        assert_bitwise(kept_argmax(x, None, pool=pool), kept_argmax(x.float(), None, pool=pool))


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_ties_of_normalized_zeros_go_to_the_first_element(backend, format):
    """LRN keeps zeros, so windows without a positive value still tie, at their first element."""
    x = in_format(-integers(2, 17, 12, 13, low=0, high=2), format)
    for pool in POOLS:
        if pool.op_args()[0][0] <= 12:
            without, with_lrn = (kept_argmax(x, None, lrn=lrn, pool=pool) for lrn in (None, LRN))
            assert_bitwise(with_lrn, without)


@pytest.mark.parametrize("pool", POOLS, ids=ident)
@pytest.mark.parametrize("relu", [False, True], ids=["-", "relu"])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_nan_propagates_like_torch(backend, format, relu, pool):
    """Through values and, by the last NaN of a window, through gradients; ReLU passes both."""
    few, many = integers(2, 17, 12, 13), integers(2, 17, 12, 13)
    few[0, 0, 0, 0] = few[0, 3, 5, 5] = few[1, 16, 11, 12] = few[1, 8, 6, :] = float("nan")
    many[integers(2, 17, 12, 13, low=0, high=3, seed=1) == 0] = float("nan")
    for x in (few, many):
        assert_pool_is_bitwise_that_of_torch(in_format(x, format), relu=relu, pool=pool)


@pytest.mark.parametrize("pool", [None, *POOLS], ids=ident)
@pytest.mark.parametrize("relu", [False, True], ids=["-", "relu"])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_infinities_and_windows_of_minus_infinity_like_torch(backend, format, relu, pool):
    x = integers(2, 17, 12, 13)
    x[integers(2, 17, 12, 13, low=0, high=4, seed=1) == 0] = float("inf")
    x[integers(2, 17, 12, 13, low=0, high=4, seed=2) == 0] = float("-inf")
    x[1, :9] = float("-inf")
    assert_pool_is_bitwise_that_of_torch(in_format(x, format), relu=relu, pool=pool)


@pytest.mark.parametrize(
    "tail", [{"relu": True}, {"relu": True, "pool": POOL}, {"relu": False, "pool": POOL}], ids=parts_id
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_non_finite_gradients_go_where_those_of_torch_go(backend, format, value, tail):
    x, bias = leaf(randn(2, 17, 9, 9, format=format)), leaf(randn(17, seed=1))
    ours, theirs = FF.relu_lrn_max_pool2d(x, bias, **tail), torch_tail(x, bias, **tail)
    dy = randn(*ours.shape, seed=2)
    dy[integers(*ours.shape, low=0, high=9, seed=3) == 0] = value
    dx, expected = (gradients(y, (x, bias), dy) for y in (ours, theirs))
    torch.testing.assert_close(dx, expected, equal_nan=True)


@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tail", [t for t in PARTS if t["lrn"]], ids=parts_id)
def test_non_finite_values_through_lrn_like_torch(backend, tail, value, format):
    x = randn(2, 20, 7, 9, format=format)
    x[0, 0, 0, 0] = x[0, 7, 1, 1] = x[1, 19, 6, 8] = value
    y, expected = FF.relu_lrn_max_pool2d(x, **tail), torch_tail(x, **tail)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("value", [1e20, float("inf"), float("nan")])
@pytest.mark.parametrize("tail", [STAGE, {"lrn": LRN}, {"pool": POOL}], ids=parts_id)
def test_one_huge_value_does_not_spoil_its_neighbours(backend, tail, value, format, dtype):
    """Channels further than the windows reach, and other places, keep every bit; forward and backward."""
    x = randn(2, 36, 13, 18, dtype=dtype, format=format)
    args = tail_args(**tail)
    y, argmax = TAIL(x, None, *args, "pool" in tail)
    dy = randn(*y.shape, dtype=dtype, seed=1)
    dx, _ = TAIL_BACKWARD(dy, x, None, argmax, *args)
    reach = 2 * (LRN.size - 1) if "lrn" in tail else 0
    for c, h, w in [(0, 0, 0), (13, 5, 7), (17, 12, 17), (35, 1, 16)]:
        spoilt_x, spoilt_dy = x.clone(), dy.clone()
        spoilt_x[1, c, h, w] = value
        spoilt_y, spoilt_argmax = TAIL(spoilt_x, None, *args, "pool" in tail)
        spoilt_dx, _ = TAIL_BACKWARD(dy, spoilt_x, None, spoilt_argmax, *args)
        oh, ow = (min(h // 2, y.shape[2] - 1), min(w // 2, y.shape[3] - 1)) if "pool" in tail else (h, w)
        spoilt_dy[1, c, oh, ow] = value
        dx_of_dy, _ = TAIL_BACKWARD(spoilt_dy, x, None, argmax, *args)

        def spared(t, scale, c=c, h=h, w=w):
            t, pixels = t.clone(), 2 if "pool" in tail else 0
            rows = slice(max(h // scale - pixels, 0), h // scale + pixels + 1)
            columns = slice(max(w // scale - pixels, 0), w // scale + pixels + 1)
            t[1, max(c - reach, 0) : c + reach + 1, rows, columns] = 0
            return t

        assert_bitwise(spared(spoilt_y, 2 if "pool" in tail else 1), spared(y, 2 if "pool" in tail else 1))
        assert_bitwise(spared(spoilt_dx, 1), spared(dx, 1))
        assert_bitwise(spared(dx_of_dy, 1), spared(dx, 1))


@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("value", [1e20, float("inf"), float("nan")])
@pytest.mark.parametrize("tail", [t for t in PARTS if t["lrn"]], ids=parts_id)
def test_one_spoilt_group_leaves_the_other_as_it_is(backend, tail, value, format):
    tail = {**tail, "lrn": LRNParams(9, 0.5, groups=2)}
    x = randn(2, 38, 7, 9, format=format)
    spoilt = x.clone()
    spoilt[:, :19] = value
    expected, out = (forward_and_backward(x, None, **tail) for x in (x, spoilt))
    for a, b in zip(out, expected, strict=True):
        if b.dim() == 4:
            assert_bitwise(a[:, 19:], b[:, 19:])


@pytest.mark.parametrize("relu", [False, True], ids=["-", "relu"])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_window_without_any_element_is_minus_infinity_and_gets_no_gradient(backend, format, relu):
    """A dilated window can straddle the whole map; torch then names a place outside of it."""
    x = leaf(in_format(torch.ones(2, 5, 1, 3), format))
    pool = PoolParams((2, 1), 1, (1, 0), (2, 1))
    y = FF.relu_lrn_max_pool2d(x, relu=relu, pool=pool)
    assert_bitwise(y.detach(), torch.full((2, 5, 1, 3), float("-inf")))
    assert_bitwise(y.detach(), F.max_pool2d(x.detach(), *pool.op_args()))
    assert_bitwise(gradients(y, (x,), torch.ones_like(y))[0], torch.zeros(2, 5, 1, 3))


@pytest.mark.parametrize("pool", POOLS, ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_argmax_is_one_byte_for_up_to_256_places(backend, format, pool):
    x = randn(2, 3, 12, 13, format=format)
    argmax = kept_argmax(x, None, relu=False, pool=pool)
    places = pool.op_args()[0][0] * pool.op_args()[0][1]
    assert argmax.dtype == (torch.uint8 if places <= 256 else torch.int32)
    assert_bitwise(argmax.long(), reference.window_offsets(x, pool)[1])


def test_forward_is_the_same_with_and_without_argmax(backend):
    for format, dtype, tail in itertools.product(FORMATS, DTYPES, PARTS):
        x, bias = randn(2, 17, 9, 11, dtype=dtype, format=format), randn(17, dtype=dtype, seed=1)
        with_argmax, without = (TAIL(x, bias, *tail_args(**tail), w)[0] for w in (tail["pool"] is not None, False))
        assert_bitwise(with_argmax, without)


# -- deterministic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", PARTS, ids=parts_id)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("shape", [(1, 96, 27, 27), (7, 17, 31, 31)], ids=ident)
def test_same_bits_in_every_run_and_for_every_number_of_threads(kernel, shape, format, tail, threads):
    x, bias = randn(*shape, format=format), randn(shape[1], seed=1)
    tail = {**tail, "lrn": tail["lrn"] and ALEXNET_LRN}
    threads(2)
    expected = forward_and_backward(x, bias, **tail)
    # torch's own power and sum, in the reference, differ by where each thread's part ends
    for count in (2, 2) if kernel == "reference" else (2, 1, 3):
        threads(count)
        assert_same_bits(forward_and_backward(x, bias, **tail), expected)


def test_many_python_threads_at_once(backend):
    inputs = [randn(2, 17, 9, 11 + seed, seed=seed) for seed in range(8)]

    def run(x):
        x, bias = leaf(x), leaf(x.detach()[0, :, 0, 0].clone())
        y = FF.relu_lrn_max_pool2d(x, bias, **STAGE)
        y.backward(y.detach())
        return y.detach(), x.grad, bias.grad

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, inputs * 4))
    for out, x in zip(together, inputs * 4, strict=True):
        assert_same_bits(out, run(x))


# -- little memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [None, POOL, PoolParams(17, 1, 8)], ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_backward_keeps_the_inputs_and_one_byte_an_output(backend, dtype, pool):
    x, bias = leaf(randn(2, 17, 12, 13, dtype=dtype)), leaf(randn(17, dtype=dtype))
    with saved_bytes() as kept:
        y = FF.relu_lrn_max_pool2d(x, bias, lrn=LRN, pool=pool)
    bytes_an_output = 0 if pool is None else 1 if pool == POOL else 4
    inputs = sum(t.untyped_storage().nbytes() for t in (x, bias))
    assert kept["bytes"] == inputs + bytes_an_output * y.numel()


def test_nothing_is_kept_and_no_argmax_is_computed_without_gradient(backend):
    x = randn(2, 17, 9, 9)
    with saved_bytes() as kept, recorded_calls() as calls:
        FF.relu_lrn_max_pool2d(x, **STAGE)
        with torch.no_grad():
            FF.relu_lrn_max_pool2d(leaf(x), **STAGE)
        with torch.inference_mode():
            FF.relu_lrn_max_pool2d(x, **STAGE)
    assert kept["bytes"] == 0
    assert [argmax.numel() for _, (_, argmax) in calls] == [0, 0, 0]


def test_gradient_of_the_bias_alone(backend):
    x, bias = randn(2, 17, 9, 9), leaf(randn(17, seed=1))
    y = FF.relu_lrn_max_pool2d(x, bias, **STAGE)
    expected = torch_tail(x, bias, **STAGE)
    dy = randn(*y.shape, seed=2)
    torch.testing.assert_close(gradients(y, (bias,), dy), gradients(expected, (bias,), dy), rtol=1e-5, atol=1e-5)


def test_a_call_is_one_op(backend):
    x, bias = leaf(randn(2, 17, 9, 9)), leaf(randn(17, seed=1))
    with recorded_calls() as calls:
        FF.relu_lrn_max_pool2d(x, bias, **STAGE).sum().backward()
    assert [name for name, _ in calls] == [
        "fastcnn.relu_lrn_max_pool2d.default",
        "fastcnn.relu_lrn_max_pool2d_backward.default",
    ]


# -- composes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", PARTS, ids=parts_id)
def test_opcheck(each_backend, tail):
    x, bias, args = randn(2, 5, 5, 6, format=torch.channels_last), randn(5, seed=1), tail_args(**tail)
    with_argmax = tail["pool"] is not None
    y, argmax = TAIL(x, bias, *args, with_argmax)
    torch.library.opcheck(TAIL, (leaf(x), None, *args, with_argmax))
    torch.library.opcheck(TAIL, (leaf(x), leaf(bias), *args, with_argmax))
    torch.library.opcheck(TAIL_BACKWARD, (y, x, bias, argmax, *args))
    torch.library.opcheck(TAIL_BACKWARD, (y, x, None, argmax, *args))


@pytest.mark.parametrize("dtype", NARROW, ids=ident)
def test_opcheck_of_narrow_input_beside_float32_bias(each_backend, dtype):
    x, bias, args = randn(2, 5, 5, 6, dtype=dtype), randn(5, seed=1), tail_args(**STAGE)
    y, argmax = TAIL(x, bias, *args, True)
    torch.library.opcheck(TAIL, (leaf(x), leaf(bias), *args, True), rtol=1e-2, atol=1e-2)
    torch.library.opcheck(TAIL_BACKWARD, (y, x, bias, argmax, *args), rtol=1e-2, atol=1e-2)


def apart(*shape, seed=0):
    """Values in float64 that no small step brings to a tie or to the corner of ReLU."""
    values = torch.linspace(-1, 2, torch.Size(shape).numel() + 1, dtype=torch.float64)[1:]
    order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(seed))
    return (values[order] + 1e-3).view(shape)


@pytest.mark.parametrize("tail", PARTS, ids=parts_id)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
def test_gradcheck_and_gradgradcheck(each_backend, with_bias, tail):
    pool = tail["pool"] and PoolParams(2, 1)
    inputs = [leaf(apart(1, 3, 3, 4))]
    inputs += [leaf(torch.tensor([1e-4, -2e-4, 3e-4], dtype=torch.float64))] * with_bias

    def run(*inputs):
        return FF.relu_lrn_max_pool2d(*inputs, relu=tail["relu"], lrn=tail["lrn"], pool=pool)

    torch.autograd.gradcheck(run, inputs, check_batched_grad=True)
    if tail["lrn"] or with_bias or tail["relu"] or pool:
        torch.autograd.gradgradcheck(run, inputs, check_batched_grad=True)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("tail", [STAGE, {"relu": True, "pool": POOL}, {"lrn": LRN, "relu": False}, NONE], ids=parts_id)
def test_compile_without_graph_break(each_backend, tail, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = fastcnn.nn.ReLULRNMaxPool2d(**tail)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    compilations = []
    for batch, width in [(2, 5), (3, 7), (4, 9)]:
        x, bias = leaf(randn(batch, 6, 8, width, format=torch.channels_last)), leaf(randn(6, seed=1))
        y, expected = compiled(x, bias), layer(x, bias)
        dy = randn(*y.shape, seed=2)
        assert_bitwise(y.detach(), expected.detach())
        assert y.stride() == expected.stride()
        assert_same_gradients(each_backend, gradients(y, (x, bias), dy), gradients(expected, (x, bias), dy))
        with torch.no_grad():
            assert_bitwise(compiled(x, bias), expected.detach())
        compilations.append(counter.frame_count)
    if dynamic:
        assert compilations[0] == compilations[-1]  # other sizes run what was compiled for the first


@pytest.mark.slow
def test_compile_with_inductor(best_backend):
    torch._dynamo.reset()

    def stage(x, bias):
        return FF.relu_lrn_max_pool2d(x * 2, bias, **STAGE) + 1

    x, bias = leaf(randn(2, 6, 9, 8, format=torch.channels_last)), leaf(randn(6, seed=1))
    y, expected = torch.compile(stage, fullgraph=True)(x, bias), stage(x, bias)
    dy = randn(*y.shape, seed=2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, (x, bias), dy), gradients(expected, (x, bias), dy))


@pytest.mark.parametrize("asked", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("tail", [STAGE, {"relu": True, "pool": POOL}, {"relu": True, "lrn": LRN}], ids=parts_id)
def test_export_with_gradients(each_backend, tail, strict, asked):
    """Also where no gradient was asked for when the program was exported: no argmax was kept then."""
    layer = fastcnn.nn.ReLULRNMaxPool2d(**tail)
    example = randn(2, 6, 9, 8).requires_grad_(asked), randn(6).requires_grad_(asked)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(layer, example, dynamic_shapes=(batch, None), strict=strict).module()
    for n in (2, 3):
        x, bias = leaf(randn(n, 6, 9, 8, seed=2)), leaf(randn(6, seed=3))
        y, expected = exported(x, bias), layer(x, bias)
        dy = randn(*y.shape, seed=1)
        assert_bitwise(y.detach(), expected.detach())
        assert_same_bits(gradients(y, (x, bias), dy), gradients(expected, (x, bias), dy))


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_autocast_keeps_the_dtype_of_the_input(each_backend, dtype):
    x, bias = leaf(randn(2, 6, 9, 8, dtype=dtype)), leaf(randn(6, dtype=dtype, seed=1))
    expected = FF.relu_lrn_max_pool2d(x, bias, **STAGE)
    with torch.autocast("cpu", torch.bfloat16):
        y = FF.relu_lrn_max_pool2d(x, bias, **STAGE)
        inside = gradients(y, (x, bias), y.detach())
    assert y.dtype == dtype
    assert_bitwise(y.detach(), expected.detach())
    assert_same_bits(inside, gradients(expected, (x, bias), expected.detach()))


def test_autocast_convolution_before_and_its_float32_bias(each_backend):
    conv = torch.nn.Conv2d(3, 6, 3, bias=False)
    bias = leaf(randn(6))
    with torch.autocast("cpu", torch.bfloat16):
        y = FF.relu_lrn_max_pool2d(conv(randn(2, 3, 11, 11)), bias, **STAGE)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad.dtype == bias.grad.dtype == torch.float32
    assert bias.grad.isfinite().all()


IN_DIMS = [(0, None), (1, None), (-1, None), (0, 0), (2, 1), (None, 0), (None, -1)]


def batched(parts, in_dims):
    """Arguments of a vmapped call, and those of the single calls it stands for."""
    args = [p[0] if d is None else torch.stack(p, d) for p, d in zip(parts, in_dims, strict=True)]
    return args, [
        tuple(p[0 if d is None else i] for p, d in zip(parts, in_dims, strict=True)) for i in range(len(parts[0]))
    ]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=ident)
@pytest.mark.parametrize("tail", [STAGE, {"relu": True, "pool": POOL}, {"relu": False}], ids=parts_id)
def test_vmap(each_backend, tail, in_dims):
    parts = [randn(2, 6, 9, 8, seed=s) for s in range(3)], [randn(6, seed=9 + s) for s in range(3)]
    args, single = batched(parts, in_dims)
    y = torch.func.vmap(lambda x, b: FF.relu_lrn_max_pool2d(x, b, **tail), in_dims)(*args)
    torch.testing.assert_close(y, torch.stack([FF.relu_lrn_max_pool2d(*s, **tail) for s in single]))


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32], ids=ident)
def test_vmap_over_the_bias_rounds_narrow_input_only_once(each_backend, bias_dtype):
    x = 1 + 0.01 * randn(2, 6, 9, 8, dtype=torch.bfloat16)
    bias = (-1 + 0.01 * randn(3, 6, seed=1)).to(bias_dtype)  # almost cancels, so that a bias rounded first shows
    y = torch.func.vmap(lambda b: FF.relu_lrn_max_pool2d(x, b, **STAGE))(bias)
    assert y.dtype == x.dtype
    for out, b in zip(y, bias, strict=True):
        assert_same_answer(out, reference.relu_lrn_max_pool2d(x.double(), b.double(), **STAGE))


@pytest.mark.parametrize("in_dims", [(0, None), (0, 0), (None, 0), (1, 1)], ids=ident)
@pytest.mark.parametrize("argnums", [0, 1, (0, 1)], ids=str)
@pytest.mark.parametrize("tail", [STAGE, {"relu": True, "pool": POOL}, {"relu": True}], ids=parts_id)
def test_vmap_of_grad(each_backend, tail, argnums, in_dims):
    parts = [randn(2, 6, 9, 8, seed=s) for s in range(3)], [randn(6, seed=9 + s) for s in range(3)]
    args, single = batched(parts, in_dims)
    grad = torch.func.grad(lambda x, b: (FF.relu_lrn_max_pool2d(x, b, **tail) ** 2).sum(), argnums)
    together, one_by_one = torch.func.vmap(grad, in_dims)(*args), [grad(*s) for s in single]
    if isinstance(argnums, int):
        together, one_by_one = (together,), [(g,) for g in one_by_one]
    for ours, theirs in zip(together, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tail", [STAGE, {"relu": True, "pool": POOL}], ids=parts_id)
def test_func_transforms_nest(each_backend, tail):
    x, bias = apart(3, 2, 4, 5, 5), apart(4) / 7

    def of(run):
        def loss(x, bias):
            return (run(x, bias, **tail) ** 3).sum()

        func = torch.func
        return [
            func.grad(lambda x, b: func.grad(loss)(x, b).pow(2).sum(), (0, 1))(x[0], bias),
            func.vmap(func.grad(lambda x, b: func.grad(loss)(x, b).pow(2).sum()), (0, None))(x, bias),
            func.vmap(func.vmap(lambda x: run(x[None], bias, **tail)))(x),
            func.jacrev(lambda b: run(x[0], b, **tail))(bias),
        ]

    torch.testing.assert_close(of(FF.relu_lrn_max_pool2d), of(torch_tail))


@pytest.mark.parametrize("tail", PARTS, ids=parts_id)
def test_double_backward_is_that_of_torch(each_backend, tail):
    x, bias = apart(2, 6, 5, 4), apart(6) / 11
    cotangents = randn(2, 6, 5, 4, dtype=torch.float64, seed=2), randn(6, dtype=torch.float64, seed=3)

    def twice(run):
        inputs = leaf(x), leaf(bias)
        y = run(*inputs, **tail)
        dy = leaf(randn(*y.shape, dtype=torch.float64, seed=1))
        firsts = torch.autograd.grad(y, inputs, dy, create_graph=True)
        return torch.autograd.grad(firsts, (*inputs, dy), cotangents, allow_unused=True, materialize_grads=True)

    for ours, theirs in zip(twice(FF.relu_lrn_max_pool2d), twice(torch_tail), strict=True):
        assert_same_answer(ours, theirs, backward=True)


def test_checkpointing_and_retained_graphs(each_backend):
    x, bias = leaf(randn(2, 6, 9, 8)), leaf(randn(6, seed=1))
    y = FF.relu_lrn_max_pool2d(x, bias, **STAGE)
    dy = randn(*y.shape, seed=2)
    first = torch.autograd.grad(y, (x, bias), dy, retain_graph=True)
    assert_same_bits(torch.autograd.grad(y, (x, bias), dy), first)
    again = torch.utils.checkpoint.checkpoint(
        lambda x, b: FF.relu_lrn_max_pool2d(x, b, **STAGE), x, bias, use_reentrant=False
    )
    assert_same_bits(torch.autograd.grad(again, (x, bias), dy), first)


def test_input_changed_in_place_before_backward_is_an_error(each_backend):
    x = leaf(randn(2, 6, 9, 8)) * 1
    y = FF.relu_lrn_max_pool2d(x, **STAGE)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_distributed_data_parallel_trains_a_stage(each_backend, tmp_path):
    class Stage(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 6, 3, bias=False)
            self.bias = torch.nn.Parameter(randn(6))
            self.tail = fastcnn.nn.ReLULRNMaxPool2d(lrn=LRN, pool=POOL)

        def forward(self, x):
            return self.tail(self.conv(x), self.bias)

    stage, x = Stage(), randn(2, 3, 11, 11)
    stage(x).sum().backward()
    expected = [p.grad.clone() for p in stage.parameters()]
    stage.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(stage)(x).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for p, grad in zip(stage.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_meta_tensors_have_shape_and_strides():
    x = torch.empty(2, 3, 9, 9, device="meta").to(memory_format=torch.channels_last)
    y = FF.relu_lrn_max_pool2d(x, **STAGE)
    assert y.device.type == "meta"
    assert y.shape == (2, 3, 4, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_layer_survives_pickling_and_deepcopy(each_backend):
    layer = fastcnn.nn.ReLULRNMaxPool2d(lrn=LRNParams(5, groups=2), pool=PoolParams(3, [2, 1]))
    x = randn(1, 4, 5, 5)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_bitwise(twin(x), layer(x))


# -- properties -------------------------------------------------------------------------------------------------------


def has_an_element_in_every_window(pool, height, width):
    axes = zip((height, width), pool.output_size(height, width), *pool.op_args()[:4], strict=True)
    return all(
        any(0 <= o * stride - padding + i * dilation < size for i in range(kernel))
        for size, out, kernel, stride, padding, dilation in axes
        for o in range(out)
    )


@st.composite
def pools(draw, height, width):
    kernel = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    stride = draw(st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    pool = PoolParams(kernel, stride, padding, draw(st.sampled_from([1, 1, 2, 3])), draw(st.booleans()))
    try:
        assume(has_an_element_in_every_window(pool, height, width))
    except RuntimeError:  # an empty output
        assume(False)
    return pool


@st.composite
def cases(draw):
    """An input of any size, perhaps a bias, and parts that suit it."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 12))
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    x = draw(inputs([draw(st.integers(1, 3)), channels, height, width]))
    bias_dtype = draw(st.sampled_from([None, x.dtype, torch.float32 if x.dtype in NARROW else x.dtype]))
    lrn = None
    if draw(st.booleans()):
        beta = draw(st.sampled_from([0.75, 0.5, 1.0, 0.6]))
        lrn = LRNParams(draw(st.integers(1, channels + 3)), draw(st.floats(0, 0.5)), beta, 2.0, groups)
    pool = draw(pools(height, width)) if draw(st.sampled_from([True, True, False])) else None
    return x, bias_dtype, {"relu": draw(st.booleans()), "lrn": lrn, "pool": pool}


def tensors(x, bias_dtype):
    return x.tensor(), None if bias_dtype is None else randn(x.shape[1], dtype=bias_dtype, seed=1)


@given(cases())
def test_any_input_gets_the_same_answer(backend, case):
    *described, tail = case
    assert_tail_keeps_same_answer(*tensors(*described), **tail)


@given(cases())
def test_any_input_agrees_with_torch(backend, case):
    *described, tail = case
    x, bias = tensors(*described)
    if tail["lrn"]:
        lrn = tail["lrn"]
        tail = {**tail, "lrn": LRNParams(lrn.size, lrn.alpha, lrn.beta, lrn.k)}  # torch knows no groups
    expected = torch_tail(x.double(), None if bias is None else bias.double(), **tail).to(x.dtype)
    torch.testing.assert_close(FF.relu_lrn_max_pool2d(x, bias, **tail), expected)


@given(cases(), st.integers(1, 4))
def test_any_ties_agree_with_torch(backend, case, levels):
    *described, tail = case
    x, bias = (None if t is None else t.float().mul(levels).round() for t in tensors(*described))
    assert_pool_is_bitwise_that_of_torch(x, bias, **{**tail, "lrn": None})


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
        FF.relu_lrn_max_pool2d(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=ident)
def test_other_dtypes_raise(each_backend, dtype):
    x = torch.ones(2, 3, 4, 4).to(dtype)
    if dtype != torch.int64:  # which torch normalizes, in integers
        with pytest.raises(NotImplementedError):
            F.local_response_norm(x, 3)
    refused(NotImplementedError, rf"input of dtype {dtype}; allowed are float16", x, lrn=LRN)


def test_sparse_input_raises(each_backend):
    refused(NotImplementedError, r"layout torch\.strided, got torch\.sparse_coo", torch.ones(2, 3, 4, 4).to_sparse())


@pytest.mark.parametrize("x", [[1.0], None, 3.0], ids=ident)
def test_input_that_is_no_tensor_raises_as_torch(each_backend, x):
    with pytest.raises(TypeError):
        F.relu(x)
    refused(TypeError, rf"argument 'input' must be Tensor, not {type(x).__name__}", x)


@pytest.mark.parametrize("bias", [[1.0, 2.0, 3.0], 1.0], ids=ident)
def test_bias_that_is_no_tensor_raises_as_torch(each_backend, bias):
    with pytest.raises(TypeError):
        F.conv2d(torch.zeros(1, 3, 4, 4), torch.zeros(3, 3, 1, 1), bias)
    refused(
        TypeError, f"argument 'bias' must be Tensor or None, not {type(bias).__name__}", torch.zeros(1, 3, 4, 4), bias
    )


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (1, 3), (), (0,)], ids=ident)
def test_bias_of_another_shape_raises_as_torch(each_backend, shape):
    x, bias = torch.zeros(1, 3, 4, 4), torch.zeros(shape)
    with pytest.raises(RuntimeError):
        F.conv2d(x, torch.zeros(3, 3, 1, 1), bias)
    refused(
        RuntimeError,
        rf"bias to be 1-dimensional with 3 elements.*got bias of size \[{', '.join(map(str, shape))}\]",
        x,
        bias,
    )


@pytest.mark.parametrize(
    ("dtype", "bias_dtype"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.float32, torch.int64),
    ],
    ids=ident,
)
def test_bias_of_another_dtype_raises_as_torch(each_backend, dtype, bias_dtype):
    x, bias = torch.zeros(1, 3, 4, 4, dtype=dtype), torch.zeros(3, dtype=bias_dtype)
    with pytest.raises(RuntimeError):
        F.conv2d(x, torch.zeros(3, 3, 1, 1, dtype=dtype), bias)
    refused(RuntimeError, rf"input type \({dtype}\) and bias type \({bias_dtype}\)", x, bias)


def test_bias_on_another_device_raises(each_backend):
    refused(RuntimeError, "input on cpu and bias on meta", torch.zeros(1, 3, 4, 4), torch.zeros(3, device="meta"))


def test_bias_of_another_shape_raises_for_other_ranks_too(each_backend):
    refused(RuntimeError, "bias to be 1-dimensional with 5 elements", torch.zeros(2, 5, 4), torch.zeros(3))
    refused(ValueError, r"channels \(got 1 dimensions\)", torch.zeros(5), torch.zeros(5))


@pytest.mark.parametrize("shape", [(3, 4), (3,)], ids=ident)
def test_lrn_of_wrong_rank_raises_as_torch(each_backend, shape):
    with pytest.raises(ValueError, match="3D or higher"):
        F.local_response_norm(torch.zeros(shape), 5)
    refused(ValueError, rf"\(got {len(shape)} dimensions\)", torch.zeros(shape), lrn=LRN)


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 4, 4, 4)], ids=ident)
def test_pool_of_wrong_rank_raises_as_torch(each_backend, shape):
    with pytest.raises(RuntimeError):
        F.max_pool2d(torch.zeros(shape), 2)
    refused(RuntimeError, "3D .*4D", torch.zeros(shape), pool=PoolParams(2))


@pytest.mark.parametrize(
    ("shape", "pool", "size"),
    [
        ((1, 3, 2, 5), PoolParams(3, 2), "2x5 gives an output of size 0x2"),
        ((1, 3, 5, 2), PoolParams(3, 2), "5x2 gives an output of size 2x0"),
        ((0, 3, 2, 2), PoolParams(3, 2), "2x2 gives an output of size 0x0"),
        ((1, 3, 4, 4), PoolParams(3, 2, 0, 2), "4x4 gives an output of size 0x0"),
        ((1, 3, 4, 4), PoolParams(9, 1, 2), "4x4 gives an output of size 0x0"),
    ],
    ids=ident,
)
def test_empty_output_raises_as_torch(each_backend, shape, pool, size):
    x = torch.zeros(shape)
    with pytest.raises(RuntimeError):
        F.max_pool2d(x, *pool.op_args())
    refused(RuntimeError, size, x, pool=pool)


@pytest.mark.parametrize("shape", [(2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=ident)
def test_pool_of_empty_maps_raises_as_torch(each_backend, shape):
    x = torch.zeros(shape)
    with pytest.raises(RuntimeError):
        F.max_pool2d(x, 2, 2, 1)
    refused(RuntimeError, rf"size \[{', '.join(map(str, shape))}\]", x, pool=PoolParams(2, 2, 1))


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_that_do_not_divide_the_channels_raise(each_backend, groups):
    x = torch.zeros(1, 3, 4, 4)
    refused(ValueError, f"groups={groups} for an input of 3 channels", x, lrn=LRNParams(3, groups=groups))


@pytest.mark.parametrize(("name", "kind"), [("lrn", "LRNParams"), ("pool", "PoolParams")])
@pytest.mark.parametrize("value", [5, (5, 1e-4), {"size": 5}], ids=ident)
def test_part_of_another_type_raises(each_backend, name, kind, value):
    match = f"argument '{name}' must be {kind} or None, not {type(value).__name__}"
    refused(TypeError, match, torch.zeros(1, 3, 4, 4), **{name: value})
