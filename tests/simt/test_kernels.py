"""What is special to the CUDA kernels of the memory-bound operators, under the sanitizers; see test_promises.py."""

import pytest
import torch
from operators import POOL
from operators import STRONG as LRN
from promises import (
    DTYPES,
    FORMATS,
    assert_bitwise,
    ident,
    randn,
)

from fastcnn import LRNParams, PoolParams, reference

from .checks import assert_same_tail, special


@pytest.fixture(params=FORMATS, ids=ident)
def format(request):
    return request.param


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


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("shape", [(2, 37, 9, 17), (3, 1, 5, 5), (1, 600, 3, 3)], ids=ident)
def test_misaligned_tensors(address, dtype, format, bias, shape):
    for tail in ({"lrn": LRN, "pool": POOL}, {"pool": POOL}, {"relu": False, "lrn": LRN}, {}):
        assert_same_tail(address, shape, dtype, format, bias=bias, offset=8, **tail)


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


def test_relu_passes_gradient_where_its_output_is_nan(address, format):
    x = special(2, 9, 5, 7, dtype=torch.float32, format=format)
    dy = randn(*x.shape, seed=1)
    dx, _ = address.backward("relu_lrn_max_pool2d_backward", dy, x, relu=True)
    assert_bitwise(dx, dy.masked_fill(x.relu() <= 0, 0))


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
    [
        {"lrn": LRN},
        {"pool": POOL},
        {"lrn": LRN, "pool": POOL},
        {"lrn": LRN, "pool": PoolParams(2, 2, 1, 3)},
        {"lrn": LRNParams(4, 0.5, 0.6)},
    ],
    ids=lambda tail: "-".join(map(ident, tail.values())),
)
def test_no_barrier_is_missing(thread, dtype, format, tail):
    assert_same_tail(thread, (2, 20, 9, 13), dtype, format, **tail)
