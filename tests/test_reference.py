"""fastcnn.reference, the truth of all other tests, against torch."""

import pytest
import torch
import torch.nn.functional as F
from promises import (
    FORMATS,
    NARROW,
    assert_bitwise,
    assert_same_answer,
    at_offsets,
    gradients,
    in_format,
    leaf,
    randn,
    torch_tail,
)

from fastcnn import LRNParams, PoolParams, reference

SHAPES = [(2, 5, 7), (2, 1, 3, 4), (3, 7, 2, 5), (1, 17, 3, 3), (2, 6, 2, 3, 4), (1, 4, 2, 1, 3, 2)]
SIZES = [1, 2, 3, 4, 5, 6, 9, 12, 33]
PARAMETERS = [(1e-4, 0.75, 1.0), (1e-4, 0.75, 2.0), (0.5, 0.5, 1.0), (0.3, 1.0, 0.5), (2.0, 0.6, 1.0), (0.1, 2.0, 1.5)]
POOLS = [
    PoolParams(3, 2),
    PoolParams(2),
    PoolParams(3, 1, 1),
    PoolParams((2, 3), (1, 2), (1, 0)),
    PoolParams(3, 2, 1, 2, True),
    PoolParams(2, 3),
    PoolParams(1),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lrn_is_that_of_torch(shape, size):
    for alpha, beta, k in PARAMETERS:
        x64 = leaf(randn(*shape, dtype=torch.float64))
        y64 = F.local_response_norm(x64, size, alpha, beta, k)
        dy = randn(*shape, dtype=torch.float64, seed=1)
        (dx64,) = gradients(y64, (x64,), dy)
        for dtype in (torch.float64, torch.float32):
            x = leaf(x64, dtype)
            y = reference.local_response_norm(x, size, alpha, beta, k)
            (dx,) = gradients(y, (x,), dy.to(dtype))
            if dtype == torch.float64:
                assert_same_answer(y.detach(), y64.detach())
                assert_same_answer(dx, dx64, backward=True)
            else:  # the inputs too were rounded
                torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(dx.double(), dx64, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_lrn_differentiates_twice_as_torch(size):
    x, dy, cotangent = (randn(2, 4, 3, 2, dtype=torch.float64, seed=seed) for seed in range(3))

    def twice(op):
        inputs = leaf(x), leaf(dy)
        (dx,) = torch.autograd.grad(op(inputs[0], size, 0.5, 0.75, 1.0), inputs[0], inputs[1], create_graph=True)
        return gradients(dx, inputs, cotangent)

    for ours, theirs in zip(twice(reference.local_response_norm), twice(F.local_response_norm), strict=True):
        assert_same_answer(ours, theirs, backward=True)


@pytest.mark.parametrize(("channels", "groups"), [(6, 2), (6, 3), (6, 6), (4, 1)])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_groups_normalize_each_part_alone(channels, groups, size):
    x = randn(2, channels, 3, 4, dtype=torch.float64)
    parts = [F.local_response_norm(part, size, 0.5) for part in x.chunk(groups, 1)]
    assert_same_answer(reference.local_response_norm(x, size, 0.5, groups=groups), torch.cat(parts, 1))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 11])
@pytest.mark.parametrize("groups", [1, 2])
def test_lrn_backward_formula_is_the_gradient(size, groups):
    lrn = LRNParams(size, 0.7, 0.6, 1.5, groups)
    x, dy = leaf(randn(2, 6, 3, 2, dtype=torch.float64)), randn(2, 6, 3, 2, dtype=torch.float64, seed=1)
    y = reference.local_response_norm(x, size, 0.7, 0.6, 1.5, groups=groups)
    assert_same_answer(reference.lrn_backward(dy, x.detach(), lrn), gradients(y, (x,), dy)[0], backward=True)


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_pool_places_and_backward_are_those_of_torch(pool, dtype):
    x = leaf(randn(2, 3, 9, 7, dtype=dtype))
    expected, flat = F.max_pool2d(x, *pool.op_args(), return_indices=True)
    y, places = reference.window_offsets(x, pool)
    indices = torch.arange(9 * 7, dtype=dtype).view(1, 1, 9, 7).expand_as(x)
    dy = (torch.arange(y.numel(), dtype=dtype) + 1).view_as(y)  # integers: sums are exact in any order
    assert_bitwise(y, expected)
    assert_bitwise(at_offsets(indices, places, pool).long(), flat)
    assert_bitwise(reference.max_pool2d_backward(dy, places, (9, 7), pool), gradients(expected, (x,), dy)[0])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_pool_backward_confines_non_finite_gradients_like_torch(value):
    pool = PoolParams(3, 2)
    x = leaf(randn(1, 1, 7, 7))
    y, places = reference.window_offsets(x, pool)
    dy = torch.ones_like(y)
    dy[0, 0, 1, 1] = value
    expected = gradients(F.max_pool2d(x, 3, 2), (x,), dy)[0]
    assert_bitwise(reference.max_pool2d_backward(dy, places, (7, 7), pool), expected)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("pool", [None, *POOLS], ids=str)
@pytest.mark.parametrize("lrn", [None, LRNParams(5, 0.5, 0.75, 2.0)], ids=["-", "lrn"])
@pytest.mark.parametrize("relu", [False, True], ids=["-", "relu"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["-", "bias"])
def test_tail_is_the_composition_of_torch_operators(with_bias, relu, lrn, pool, format):
    x = leaf(in_format(randn(2, 7, 9, 8, dtype=torch.float64), format))
    bias = leaf(randn(7, dtype=torch.float64, seed=1)) if with_bias else None
    y = reference.relu_lrn_max_pool2d(x, bias, relu=relu, lrn=lrn, pool=pool)
    expected = torch_tail(x, bias, relu=relu, lrn=lrn, pool=pool)
    assert_same_answer(y, expected)
    if not expected.requires_grad:
        return
    dy = randn(*y.shape, dtype=torch.float64, seed=2)
    for ours, theirs in zip(gradients(y, (x, bias), dy), gradients(expected, (x, bias), dy), strict=True):
        if theirs is not None:
            assert_same_answer(ours, theirs, backward=True)


def test_tail_with_every_part_absent_is_a_copy():
    x = randn(1, 2, 3, 3)
    y = reference.relu_lrn_max_pool2d(x, relu=False)
    assert_bitwise(y, x)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_input_is_computed_in_float32_and_rounded_once(dtype):
    x, bias = randn(2, 7, 9, 8, dtype=dtype), randn(7, seed=1)
    lrn, pool = LRNParams(5, 0.5), PoolParams(3, 2)
    wide = reference.relu_lrn_max_pool2d(x.float(), bias, lrn=lrn, pool=pool)
    assert_bitwise(reference.relu_lrn_max_pool2d(x, bias, lrn=lrn, pool=pool), wide.to(dtype))
    wide = reference.local_response_norm(x.float(), 5, 0.5)
    assert_bitwise(reference.local_response_norm(x, 5, 0.5), wide.to(dtype))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0, 5), (2, 0, 4, 4)], ids=str)
def test_empty_input_gives_empty_output(shape):
    x = torch.zeros(shape, requires_grad=True)
    y = reference.local_response_norm(x, 3)
    assert y.shape == F.local_response_norm(x, 3).shape
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_constants_that_need_gradients_of_every_order():
    x = leaf(torch.linspace(0.3, 2, 24, dtype=torch.float64).view(1, 3, 2, 4))
    tail = {"lrn": LRNParams(3, 0.5, 0.75, 1.0), "pool": PoolParams(2, 1)}
    assert torch.autograd.gradgradcheck(lambda x: reference.relu_lrn_max_pool2d(x, **tail), (x,))
