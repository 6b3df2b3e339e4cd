"""The parameter classes: what they accept, and the exceptions of torch for what they refuse."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from promises import assert_bitwise, ident, randn

import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams

IMAGE = torch.zeros(1, 3, 4, 4)

# -- LRN --------------------------------------------------------------------------------------------------------------


def test_lrn_defaults_are_those_of_torch():
    layer, lrn = torch.nn.LocalResponseNorm(5), LRNParams(5)
    assert (lrn.size, lrn.alpha, lrn.beta, lrn.k) == (layer.size, layer.alpha, layer.beta, layer.k)
    assert lrn.groups == 1


@pytest.mark.parametrize("size", [0, -1])
def test_lrn_size_that_is_not_positive_raises_as_torch(size):
    with pytest.raises(RuntimeError):
        F.local_response_norm(IMAGE, size)
    with pytest.raises(RuntimeError, match=f"size must be greater than zero, but got size={size}"):
        LRNParams(size)


@pytest.mark.parametrize("size", [2.0, None, "3", True], ids=ident)
def test_lrn_size_that_is_no_int_raises_as_torch(size):
    with pytest.raises(TypeError):
        F.local_response_norm(IMAGE, size)
    with pytest.raises(TypeError, match=f"argument 'size' must be int, not {type(size).__name__}"):
        LRNParams(size)


@pytest.mark.parametrize("name", ["alpha", "beta", "k"])
@pytest.mark.parametrize("value", ["1", None], ids=ident)
def test_lrn_parameter_that_is_no_number_raises_as_torch(name, value):
    with pytest.raises(TypeError):
        F.local_response_norm(IMAGE, 3, **{name: value})
    with pytest.raises(TypeError, match=f"argument '{name}' must be a number, not {type(value).__name__}"):
        LRNParams(3, **{name: value})


def test_lrn_groups_must_be_a_positive_int():
    for groups in (0, -2):
        with pytest.raises(ValueError, match=f"groups must be greater than zero, but got groups={groups}"):
            LRNParams(3, groups=groups)
    with pytest.raises(TypeError, match="argument 'groups' must be int, not float"):
        LRNParams(3, groups=1.0)


def test_lrn_groups_must_divide_the_channels():
    LRNParams(3, groups=3).check_shape((1, 6, 2))
    with pytest.raises(ValueError, match="got groups=4 for an input of 6 channels"):
        LRNParams(3, groups=4).check_shape((1, 6, 2))


# -- pool -------------------------------------------------------------------------------------------------------------


REFUSED_POOLS = [
    (RuntimeError, "kernel_size should be greater than zero.*-1", {"kernel_size": -1}),
    (RuntimeError, "kernel_size should be greater than zero.*0", {"kernel_size": 0}),
    (RuntimeError, "kernel_size should be greater than zero.*0", {"kernel_size": (2, 0)}),
    (RuntimeError, "stride should be greater than zero.*0", {"kernel_size": 2, "stride": 0}),
    (RuntimeError, "stride should be greater than zero.*-1", {"kernel_size": 2, "stride": (1, -1)}),
    (RuntimeError, "dilation should be greater than zero.*0", {"kernel_size": 2, "dilation": 0}),
    (RuntimeError, "dilation should be greater than zero.*-2", {"kernel_size": 2, "dilation": -2}),
    (RuntimeError, "padding must be non-negative.*-1", {"kernel_size": 3, "padding": -1}),
    (RuntimeError, "half of the kernel size.*padding=.2, 2.", {"kernel_size": 3, "padding": 2}),
    (RuntimeError, "half of the kernel size.*padding=.0, 2.", {"kernel_size": (5, 3), "padding": (0, 2)}),
    (RuntimeError, "half of the kernel size.*dilation=.3, 3.", {"kernel_size": 3, "padding": 2, "dilation": 3}),
    (RuntimeError, "kernel_size must either be a single int.*2, 2, 2", {"kernel_size": (2, 2, 2)}),
    (RuntimeError, "kernel_size must either be a single int", {"kernel_size": ()}),
    (RuntimeError, "stride must either be", {"kernel_size": 2, "stride": (1, 1, 1)}),
    (RuntimeError, "padding must either be", {"kernel_size": 2, "padding": (0, 0, 0)}),
    (TypeError, "'kernel_size' must be int.*not float", {"kernel_size": 2.0}),
    (TypeError, "'kernel_size' must be int.*not float", {"kernel_size": (2, 2.0)}),
    (TypeError, "'kernel_size' must be int.*not str", {"kernel_size": "2"}),
    (TypeError, "'kernel_size' must be int.*not NoneType", {"kernel_size": None}),
    (TypeError, "'kernel_size' must be int.*not bool", {"kernel_size": True}),
    (TypeError, "'stride' must be int.*not float", {"kernel_size": 2, "stride": 1.0}),
    (TypeError, "'padding' must be int.*not NoneType", {"kernel_size": 2, "padding": None}),
    (TypeError, "'dilation' must be int.*not float", {"kernel_size": 2, "dilation": 1.0}),
    (TypeError, "'ceil_mode' must be bool, not int", {"kernel_size": 2, "ceil_mode": 3}),
    (RuntimeError, "kernel_size.*2147483648", {"kernel_size": 2**31}),
    (RuntimeError, "stride.*2147483648", {"kernel_size": 2, "stride": 2**31}),
    (RuntimeError, "stride.*4611686018427387904", {"kernel_size": 1, "stride": 2**62, "ceil_mode": True}),
    (RuntimeError, "dilation.*2147483648", {"kernel_size": 1, "dilation": 2**31}),
]


@pytest.mark.parametrize(("error", "match", "pool"), REFUSED_POOLS, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_refused_pools_raise_as_torch(best_backend, error, match, pool):
    with pytest.raises(error):
        F.max_pool2d(IMAGE, **pool)
    with pytest.raises(error, match=match):
        FF.relu_lrn_max_pool2d(IMAGE, pool=PoolParams(**pool))


def test_pool_arguments_of_one_int_two_ints_or_none():
    full = PoolParams((3, 3), (3, 3), (0, 0), (1, 1)).op_args()
    for same in (
        PoolParams(3),
        PoolParams([3]),
        PoolParams((3, 3), None),
        PoolParams(3, ()),
        PoolParams(3, [], [0], 1),
    ):
        assert same.op_args() == full


@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel_size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    stride=st.none() | st.integers(1, 5),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.integers(1, 4),
    ceil_mode=st.booleans(),
)
def test_any_pool_has_the_output_size_of_torch_or_is_refused_by_both(size, **pool):
    image = torch.empty(1, 1, *size, device="meta")
    try:
        expected = tuple(F.max_pool2d(image, **pool).shape[2:])
    except RuntimeError:
        with pytest.raises(RuntimeError, match=r"padding=|gives an output of size"):
            PoolParams(**pool).output_size(*size)
    else:
        assert PoolParams(**pool).output_size(*size) == expected


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("lrn", (-1, 1e-4, 0.75, 1.0, 1)),
        ("lrn", (0, 1e-4, 0.75, 1.0, 1)),
        ("max_pool2d", ([2, 2], [0, 1], [0, 0], [1, 1], False, True)),
        ("relu_lrn_max_pool2d", (None, True, 3, 1e-4, 0.75, 1.0, 1, [2, 2], [2, 2], [0, 2], [1, 1], False, True)),
    ],
    ids=str,
)
def test_registered_ops_check_their_parameters_too(each_backend, op, args):
    with pytest.raises(RuntimeError, match=r"but got (size|stride|padding)="):
        getattr(torch.ops.fastcnn, op)(IMAGE, *args)


# -- both -------------------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_are_accepted_as_torch_accepts_them(best_backend):
    x = randn(1, 6, 4, 4)
    for size, number in ((np.int64(5), np.float32(0.5)), (np.int32(4), np.float64(0.5))):
        expected = F.local_response_norm(x, size, number, number, number)
        torch.testing.assert_close(FF.local_response_norm(x, size, number, number, number), expected)
    for pool in ({"kernel_size": np.int64(2)}, {"kernel_size": (np.int64(2), 3), "stride": np.int32(1)}):
        expected = F.max_pool2d(x, **pool)
        assert_bitwise(FF.relu_lrn_max_pool2d(x, relu=False, pool=PoolParams(**pool)), expected)


@pytest.mark.parametrize("params", [LRNParams(5, 0.5, 0.75, 2.0, 2), PoolParams((3, 2), 2)], ids=ident)
def test_parameters_are_values(params):
    """Equal, hashable, immutable and picklable."""
    twin = dataclasses.replace(params)
    assert twin == params
    assert hash(twin) == hash(params)
    assert pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(params, dataclasses.fields(params)[0].name, 7)
    with pytest.raises((RuntimeError, TypeError)):
        dataclasses.replace(params, **{dataclasses.fields(params)[0].name: 0})
