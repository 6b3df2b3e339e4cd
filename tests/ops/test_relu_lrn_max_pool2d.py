"""What is special to the tail; what it promises as every operator does is in test_promises.py."""

import pytest
import torch
import torch.nn.functional as F
from operators import NONE, POOL, POOLS, STAGE
from operators import STRONG as LRN
from promises import (
    FORMATS,
    assert_bitwise,
    assert_same_answer,
    at_offsets,
    gradients,
    ident,
    in_format,
    integers,
    kept_argmax,
    leaf,
    randn,
    tail_args,
    torch_tail,
)

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams, reference

TAIL, TAIL_BACKWARD = (
    torch.ops.fastcnn.relu_lrn_max_pool2d.default,
    torch.ops.fastcnn.relu_lrn_max_pool2d_backward.default,
)


# -- every size -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_ties_of_normalized_zeros_go_to_the_first_element(backend, format):
    """LRN keeps zeros, so windows without a positive value still tie, at their first element."""
    x = in_format(-integers(2, 17, 12, 13, low=0, high=2), format)
    for pool in POOLS:
        if pool.op_args()[0][0] <= 12:
            without, with_lrn = (kept_argmax(x, None, lrn=lrn, pool=pool) for lrn in (None, LRN))
            assert_bitwise(with_lrn, without)


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


# -- composes ---------------------------------------------------------------------------------------------------------


def test_autocast_convolution_before_and_its_float32_bias(each_backend):
    conv = torch.nn.Conv2d(3, 6, 3, bias=False)
    bias = leaf(randn(6))
    with torch.autocast("cpu", torch.bfloat16):
        y = FF.relu_lrn_max_pool2d(conv(randn(2, 3, 11, 11)), bias, **STAGE)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad.dtype == bias.grad.dtype == torch.float32
    assert bias.grad.isfinite().all()


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32], ids=ident)
def test_vmap_over_the_bias_rounds_narrow_input_only_once(each_backend, bias_dtype):
    x = 1 + 0.01 * randn(2, 6, 9, 8, dtype=torch.bfloat16)
    bias = (-1 + 0.01 * randn(3, 6, seed=1)).to(bias_dtype)  # almost cancels, so that a bias rounded first shows
    y = torch.func.vmap(lambda b: FF.relu_lrn_max_pool2d(x, b, **STAGE))(bias)
    assert y.dtype == x.dtype
    for out, b in zip(y, bias, strict=True):
        assert_same_answer(out, reference.relu_lrn_max_pool2d(x.double(), b.double(), **STAGE))


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


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
        FF.relu_lrn_max_pool2d(*args, **kwargs)


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
