"""What is special to max_pool2d; what it promises as every operator does is in test_promises.py."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from operators import POOL, apart, max_pool2d
from places import Place
from promises import (
    DTYPES,
    FORMATS,
    assert_bitwise,
    gradients,
    ident,
    in_format,
    integers,
    leaf,
    recorded_calls,
)

import fastcnn
import fastcnn.functional as FF
from fastcnn import PoolParams

INF, NAN = float("inf"), float("nan")
OP, BACKWARD = torch.ops.fastcnn.max_pool2d.default, torch.ops.fastcnn.max_pool2d_backward.default


# -- same answer, ties, NaN, inf --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_zeros_of_both_signs_are_ties(backend, format, zeros):
    x = in_format(torch.tensor(zeros).repeat(1, 20, 6, 4), format)
    max_pool2d.check(Place(backend), max_pool2d.pool_case(x.shape, POOL), [x])


@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_zeros_keep_the_sign_that_torch_gives_them(backend, format, zeros):
    x = in_format(torch.tensor(zeros).repeat(1, 20, 6, 4), format)
    assert_bitwise(FF.max_pool2d(x, 3, 2).signbit(), F.max_pool2d(x, 3, 2, return_indices=True)[0].signbit())


def every_value(dtype):
    """All values of 16 bits, in random order: NaN of either sign with every payload too."""
    order = torch.randperm(1 << 16, generator=torch.Generator().manual_seed(0))
    return order.to(torch.int32).to(torch.int16).view(dtype).view(2, 32, 32, 32)


@pytest.mark.parametrize("numbers", ["all", "finite", "one NaN", "one negative NaN", "below zero"])
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("pool", [POOL, PoolParams(5, 3, 2, 2)], ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ident)
def test_16_bit_values_are_compared_as_the_numbers_they_are(backend, dtype, format, pool, relu, numbers):
    x = every_value(dtype)
    if numbers != "all":
        x = torch.where(x.isfinite(), x, 0)
    if numbers == "below zero":
        x = -x.abs() - 1
    if "NaN" in numbers:
        x[1, 17, 5, 6] = float("nan")
        x.view(torch.int16)[1, 17, 5, 6] |= -0x8000 if "negative" in numbers else 0
    x = in_format(x, format)
    y = FF.relu_lrn_max_pool2d(x, None, relu=relu, lrn=None, pool=pool)
    expected = F.max_pool2d(F.relu(x.float()) if relu else x.float(), *pool.op_args())
    assert_bitwise(y.float(), expected)
    if numbers == "one NaN":
        assert y.isnan().any()


@pytest.mark.parametrize("pool", [PoolParams(3, 2), PoolParams(2), PoolParams((2, 3), 2)], ids=ident)
@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
@pytest.mark.parametrize("part", ["alone", "bias", "relu"])
def test_windows_two_apart_in_nchw_at_every_size(kernel, part, dtype, pool):
    bias = integers(3, dtype=dtype) if part == "bias" else None
    for height, width in itertools.product((3, 4, 7, 20), (*range(3, 19), 33, 34, 35, 67, 70)):
        x = integers(2, 3, height, width, dtype=dtype, low=-99, high=100, seed=width)
        y = FF.relu_lrn_max_pool2d(x, bias, relu=part == "relu", lrn=None, pool=pool)
        z = x if bias is None else x + bias[:, None, None]
        assert_bitwise(y, F.max_pool2d(F.relu(z) if part == "relu" else z, *pool.op_args()))


@pytest.mark.parametrize("dtype", DTYPES, ids=ident)
def test_nan_at_every_place_in_nchw(kernel, dtype):
    for shape in ((1, 20, 7), (1, 3, 39), (1, 3, 70)):
        for place in range(math.prod(shape)):
            x = integers(2, *shape, dtype=dtype, low=-99, high=100, seed=place)
            x[1].view(-1)[place] = NAN
            assert_bitwise(FF.max_pool2d(x, 3, 2), F.max_pool2d(x, 3, 2))


# -- every size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=ident)
@pytest.mark.parametrize("pool", [POOL, PoolParams(3, 2, 1, 1, True)], ids=ident)
def test_integers_fall_through_to_torch(each_backend, pool, dtype):
    x = integers(2, 3, 7, 9, dtype=dtype, low=0, high=100)
    y, indices = FF.max_pool2d(x, *pool.op_args(), return_indices=True)
    expected, expected_indices = F.max_pool2d(x, *pool.op_args(), return_indices=True)
    assert_bitwise(y, expected)
    assert_bitwise(indices, expected_indices)
    with recorded_calls() as calls:
        assert_bitwise(FF.max_pool2d(x, *pool.op_args()), expected)
    assert not calls


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": 2},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": 2, "ceil_mode": True},
        {"kernel_size": 2, "return_indices": True},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
@pytest.mark.parametrize("shape", [(2, 3, 9, 8), (3, 9, 8)], ids=ident)
def test_layer_is_that_of_torch(each_backend, shape, kwargs):
    ours, theirs = fastcnn.nn.MaxPool2d(**kwargs), torch.nn.MaxPool2d(**kwargs)
    assert isinstance(ours, torch.nn.MaxPool2d)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = integers(*shape)
    for layer in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        y, expected = layer(x), theirs(x)
        if kwargs.get("return_indices"):
            assert_bitwise(y[1], expected[1])
            y, expected = y[0], expected[0]
        assert_bitwise(y, expected)


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_indices_suit_max_unpool2d(each_backend, format):
    x = leaf(in_format(apart(2, 3, 8, 6).float(), format))
    unpool = torch.nn.MaxUnpool2d(2)
    torch.use_deterministic_algorithms(False)  # for which torch has no MaxUnpool2d
    y = unpool(*fastcnn.nn.MaxPool2d(2, return_indices=True)(x))
    expected = unpool(*F.max_pool2d(x, 2, return_indices=True))
    assert_bitwise(y.detach(), expected.detach())
    assert_bitwise(gradients(y, (x,), x.detach())[0], gradients(expected, (x,), x.detach())[0])


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(match, *args, **kwargs):
    """With exactly the type of exception that torch raises, and a message of ours."""
    with pytest.raises((TypeError, RuntimeError)) as theirs:
        F.max_pool2d(*args, **kwargs)
    with pytest.raises(theirs.type, match=match) as ours:
        FF.max_pool2d(*args, **kwargs)
    assert ours.type is theirs.type


@pytest.mark.parametrize("shape", [(2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0), (0, 4, 4), (3, 0, 4)], ids=ident)
def test_empty_maps_raise_as_torch(each_backend, shape):
    refused(r"only the batch allowed to be empty.*size \[", torch.zeros(shape), 2, 2, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("kernel_size", "stride", "dilation") for value in (0, -1, (2, 0), (-3, 2))]
    + [("padding", value) for value in (-1, (0, -1), 2, (1, 2), 10)],
    ids=ident,
)
def test_values_out_of_range_raise_as_torch(each_backend, name, value):
    for dtype in (torch.float32, torch.int64):
        refused(f"max_pool2d.*{name}", torch.zeros(1, 3, 9, 9, dtype=dtype), **{"kernel_size": 3, name: value})


@pytest.mark.parametrize("name", ["kernel_size", "stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [(1, 1, 1), "2", 1.5, (1.5, 1), (1, "1")], ids=repr)
def test_values_of_another_kind_raise_as_torch(each_backend, name, value):
    refused(name, torch.zeros(1, 3, 9, 9), **{"kernel_size": 3, name: value})


def test_kernel_size_none_or_empty_raises_as_torch(each_backend):
    refused("kernel_size", torch.zeros(1, 3, 9, 9), None)
    refused("kernel_size", torch.zeros(1, 3, 9, 9), ())


@pytest.mark.parametrize(
    ("shape", "pool"),
    [
        ((1, 3, 2, 5), {"kernel_size": 3}),
        ((3, 5, 2), {"kernel_size": 3}),
        ((0, 3, 2, 2), {"kernel_size": 3}),
        ((1, 3, 4, 4), {"kernel_size": 3, "dilation": 2}),
        ((1, 3, 4, 4), {"kernel_size": 9, "padding": 2, "stride": 1}),
    ],
    ids=str,
)
def test_empty_output_raises_as_torch(each_backend, shape, pool):
    refused(f"{shape[-2]}x{shape[-1]} gives an output of size", torch.zeros(shape), **pool)


@pytest.mark.parametrize("pool", [(3, 1, 1), (5, 2, 2)], ids=str)
def test_gradients_are_added_in_the_same_order_in_both_formats(pool, kernel):
    """A maximum that many windows share; their gradients are of so many magnitudes that any other order shows."""
    x = torch.zeros(2, 19, 11, 13)
    x[:, :, 5::6, 6::6] = 1
    found = []
    for format in (torch.contiguous_format, torch.channels_last):
        leaf = x.to(memory_format=format).requires_grad_()
        y = FF.max_pool2d(leaf, *pool)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).exp2().to(memory_format=format)
        found.append(torch.autograd.grad(y, leaf, dy)[0])
    assert torch.equal(*found)
