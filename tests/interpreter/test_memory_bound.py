"""The Triton kernels of lrn, max_pool2d and the tail keep the operators' promises, on small and awkward shapes."""

import pytest
import torch
import torch.nn.functional as F
from ops.test_lrn import LRN, LRN_BACKWARD, STRONG, assert_lrn_keeps_same_answer
from ops.test_max_pool2d import INF, NAN, WIDE, assert_is_that_of_torch
from ops.test_relu_lrn_max_pool2d import (
    PARTS,
    STAGE,
    assert_pool_is_bitwise_that_of_torch,
    assert_same_bits,
    forward_and_backward,
    parts_id,
)
from promises import (
    DTYPES,
    FORMATS,
    NARROW,
    assert_bitwise,
    assert_same_answer,
    assert_tail_keeps_same_answer,
    embedded,
    ident,
    in_format,
    integers,
    randn,
    torch_tail,
)

import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams, backends

formats = pytest.mark.parametrize("format", FORMATS, ids=ident)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=ident)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, on infinities and NaN
POOLS = [
    PoolParams(3, 2),
    PoolParams(2, 2),
    PoolParams(3, 1, 1),
    PoolParams((2, 3), (1, 2), (1, 0)),
    PoolParams(3, 2, 1, 2, True),
    PoolParams(2, 5),
    PoolParams(2, 3, 1, 2, True),
    PoolParams(1, 1, 0, 10**9),
    PoolParams(2, 2**31 - 1, 1),
]


def test_cpu_tensors_run_the_triton_kernels():
    assert all(
        backends.choose(op, ("reference", "cpu", "triton"), torch.zeros(1)) == "triton"
        for op in ("lrn", "max_pool2d", "relu_lrn_max_pool2d")
    )


# -- lrn --------------------------------------------------------------------------------------------------------------


@dtypes
@formats
@pytest.mark.parametrize("shape", [(2, 16, 3, 5), (1, 17, 2, 3), (3, 5, 7), (1, 6, 2, 3, 2), (1, 1, 1, 1)], ids=ident)
def test_lrn_same_answer(shape, format, dtype):
    assert_lrn_keeps_same_answer(randn(*shape, dtype=dtype, format=format), *STRONG)


@formats
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 11, 16, 17, 40, 2**40])
@pytest.mark.parametrize("channels", [5, 24])
def test_lrn_every_window_also_even_and_wider_than_the_channels(channels, size, format):
    x = randn(2, channels, 2, 3, format=format)
    assert_lrn_keeps_same_answer(x, size, 0.5 * min(size, 40), 0.75, 1.0)


@pytest.mark.parametrize("beta", [0.75, 0.5, 1.0, 0.6, 2.0, 0.0, -0.5, 0.3])
@pytest.mark.parametrize(("alpha", "k"), [(1e-4, 2.0), (1e3, 2.0), (1.0, 0.0)])
def test_lrn_same_answer_for_every_parameter(alpha, k, beta):
    for dtype, format in [(torch.float32, FORMATS[0]), (torch.float64, FORMATS[1])]:
        assert_lrn_keeps_same_answer(randn(2, 17, 2, 3, dtype=dtype, format=format), 5, alpha, beta, k)


@formats
@pytest.mark.parametrize(("channels", "groups", "size"), [(6, 3, 2), (16, 2, 5), (34, 2, 3), (32, 2, 40)])
def test_lrn_groups_do_not_see_each_other(channels, groups, size, format):
    x = randn(1, channels, 2, 3, format=format)
    assert_lrn_keeps_same_answer(x, size, 0.5, groups=groups)
    spoilt = x.clone()
    spoilt[:, : channels // groups] = NAN
    kept = slice(channels // groups, None)
    for op in (
        lambda t: LRN(t, size, 0.5, 0.75, 1.0, groups),
        lambda t: LRN_BACKWARD(x, t, size, 0.5, 0.75, 1.0, groups),
    ):
        assert_bitwise(op(spoilt)[:, kept], op(x)[:, kept])


@formats
@pytest.mark.parametrize("size", [5, 8, 20])
@pytest.mark.parametrize("value", [1e20, INF, NAN])
def test_lrn_one_huge_value_does_not_spoil_its_neighbours(value, size, format):
    lrn, c = (size, 0.5, 0.75, 1.0, 1), 30
    x, dy = randn(1, 64, 1, 2, format=format), randn(1, 64, 1, 2, seed=1)
    spoilt_x, spoilt_dy = x.clone(), dy.clone()
    spoilt_x[0, c, 0, 0] = spoilt_dy[0, c, 0, 0] = value
    pairs = [
        (LRN(spoilt_x, *lrn), LRN(x, *lrn)),
        (LRN_BACKWARD(dy, spoilt_x, *lrn), LRN_BACKWARD(dy, x, *lrn)),
        (LRN_BACKWARD(spoilt_dy, x, *lrn), LRN_BACKWARD(dy, x, *lrn)),
    ]
    for spoilt, clean in pairs:
        for t in (spoilt, clean):
            t[0, c - size + 1 : c + size, 0, 0] = 0
        assert_bitwise(spoilt, clean)


@formats
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e20])
@pytest.mark.parametrize("beta", [0.75, 0.6])
def test_lrn_non_finite_values_like_torch(beta, value, format):
    x = randn(1, 20, 2, 3, format=format)
    x[0, 0, 0, 0] = x[0, 7, 1, 1] = value
    x[0, :, 1, 2] = 0
    for k in (1.0, 0.0):
        ours, theirs = FF.local_response_norm(x, 5, 0.5, beta, k), F.local_response_norm(x, 5, 0.5, beta, k)
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_float16_squares_do_not_overflow():
    assert_lrn_keeps_same_answer(randn(1, 20, 2, 3).mul(1e4).half(), 5, 1e-4, 0.75, 2.0)


# -- max_pool2d -------------------------------------------------------------------------------------------------------


@dtypes
@formats
@pytest.mark.parametrize("pool", POOLS[:5], ids=ident)
def test_pool_is_that_of_torch(pool, format, dtype):
    assert_is_that_of_torch(in_format(integers(2, 8, 5, 7, dtype=dtype), format), pool)


@formats
@pytest.mark.parametrize("pool", POOLS, ids=ident)
def test_pool_ties_nan_and_infinities(pool, format):
    choice = integers(1, 11, 6, 7, low=0, high=20, dtype=torch.int64)
    values = torch.tensor([NAN, INF, -INF, -INF, -INF, *range(-7, 8)])
    assert_is_that_of_torch(in_format(values[choice], format), pool)
    assert_is_that_of_torch(in_format(torch.full((1, 2, 5, 6), -INF), format), pool)


@pytest.mark.parametrize("pool", [WIDE, PoolParams((16, 16), 3, 8)], ids=ident)
def test_pool_of_up_to_and_of_more_than_256_places(pool):
    assert_is_that_of_torch(in_format(integers(1, 2, 4, 3), FORMATS[1]), pool)


def test_tail_with_windows_too_large_to_unroll():
    assert_pool_is_bitwise_that_of_torch(integers(1, 2, 4, 3), integers(2, seed=1), pool=PoolParams((16, 3), 3, (8, 1)))


# -- the tail ---------------------------------------------------------------------------------------------------------


@dtypes
@formats
@pytest.mark.parametrize("tail", PARTS, ids=parts_id)
def test_tail_same_answer_with_any_part_absent(tail, format, dtype):
    x, bias = randn(2, 16, 5, 7, dtype=dtype, format=format), randn(16, dtype=dtype, seed=1)
    assert_tail_keeps_same_answer(x, bias, **tail)


@formats
@pytest.mark.parametrize("dtype", NARROW, ids=ident)
def test_tail_float32_bias_beside_narrow_input(dtype, format):
    assert_tail_keeps_same_answer(randn(2, 5, 5, 4, dtype=dtype, format=format), randn(5, seed=1), **STAGE)


@formats
@pytest.mark.parametrize("pool", POOLS, ids=ident)
def test_tail_every_pool(pool, format):
    x = in_format(integers(2, 6, 6, 9), format)
    assert_pool_is_bitwise_that_of_torch(x, integers(6, seed=1), relu=True, pool=pool)
    x[integers(2, 6, 6, 9, low=0, high=3, seed=1) == 0] = NAN
    x[1, :3] = -INF
    assert_pool_is_bitwise_that_of_torch(x, relu=False, pool=pool)


@formats
@pytest.mark.parametrize("lrn", [LRNParams(2, 1.0, 0.6), LRNParams(9, 0.5, groups=2), LRNParams(40, 9.0)], ids=ident)
def test_tail_every_lrn(lrn, format):
    x, bias = randn(1, 38, 5, 4, dtype=torch.bfloat16, format=format), randn(38, seed=1)
    assert_tail_keeps_same_answer(x, bias, lrn=lrn, pool=PoolParams(3, 2))
    assert_tail_keeps_same_answer(x, None, lrn=lrn)


@formats
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_tail_non_finite_values_like_torch(value, format):
    x = randn(1, 20, 5, 7, format=format)
    x[0, 0, 0, 0] = x[0, 7, 1, 1] = x[0, 19, 4, 6] = value
    torch.testing.assert_close(
        FF.relu_lrn_max_pool2d(x, **STAGE), torch_tail(x, **STAGE), equal_nan=True, rtol=1e-5, atol=1e-6
    )


def test_tail_bias_gradient_of_many_terms():
    bias = randn(5).requires_grad_()
    x = randn(2, 5, 31, 33, dtype=torch.bfloat16)
    FF.relu_lrn_max_pool2d(x, bias).sum().backward()
    expected = (x.double() + bias.detach().double().view(-1, 1, 1) > 0).sum((0, 2, 3)).double()
    assert_same_answer(bias.grad, expected)


# -- all --------------------------------------------------------------------------------------------------------------


@formats
@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4), (0, 0, 0, 0)], ids=ident)
def test_empty_tensors(shape, format):
    assert_lrn_keeps_same_answer(randn(*shape, format=format), *STRONG)
    x, bias = randn(*shape, format=format), randn(shape[1])
    *_, dx, dbias = forward_and_backward(x, bias, relu=True, lrn=LRNParams(5), pool=None)
    assert dx.shape == x.shape
    assert_bitwise(dbias, torch.zeros(shape[1]))
    if 0 not in shape[1:]:
        assert_is_that_of_torch(x, PoolParams(3, 1))


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (3, 2, 1, 0)], ids=ident)
@pytest.mark.parametrize("steps", [(1, 1, 1, 1), (2, 1, 3, 1)], ids=ident)
def test_any_strides_and_misaligned_memory(order, steps):
    x = embedded(randn(2, 6, 5, 4), order, steps, offset=1)
    assert_lrn_keeps_same_answer(x, *STRONG)
    assert_is_that_of_torch(x, PoolParams(3, 2))
    assert_tail_keeps_same_answer(x, embedded(randn(6, seed=1), steps=(2,)), **STAGE)


@formats
def test_same_bits_in_every_run(format):
    x, bias = randn(3, 16, 5, 7, format=format), randn(16, seed=1)
    assert_same_bits(forward_and_backward(x, bias, **STAGE), forward_and_backward(x, bias, **STAGE))


def test_ops_called_directly_refuse_tensors_that_do_not_fit():
    x, args = randn(1, 4, 5, 5), (3, 0.5, 0.75, 1.0, 1)
    with pytest.raises(RuntimeError, match=r"lrn_backward\(\): expected grad of size \[1, 4, 5, 5\]"):
        LRN_BACKWARD(x[:, :2], x, *args)
