"""What is special to lrn; what it promises as every operator does is in test_promises.py."""

import operators
import pytest
import torch
import torch.nn.functional as F
from promises import (
    FORMATS,
    assert_bitwise,
    assert_same_answer,
    gradients,
    ident,
    leaf,
    randn,
)

import fastcnn
import fastcnn.functional as FF

LRN_ARGS = operators.STRONG.op_args()
LRN, LRN_BACKWARD = torch.ops.fastcnn.lrn.default, torch.ops.fastcnn.lrn_backward.default


# -- every size -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_more_than_2_to_the_31_elements(huge, format):
    if "cpu" not in fastcnn.backends.available():
        pytest.skip("takes minutes in plain PyTorch")
    x = huge(1, 64, 4096, 8200, format=format)
    y, dx = LRN(x, *LRN_ARGS), LRN_BACKWARD(x, x, *LRN_ARGS)
    pixels = x[0, 0].numel()
    for start in (0, pixels // 2, pixels - 100):

        def cut(t, start=start):
            flat = t.as_strided((1, 64, pixels), (t.stride(0), t.stride(1), t.stride(3)))
            return flat[..., start : start + 100].double()

        expected, expected_dx = (
            f(cut(x)) for f in (lambda x: LRN(x, *LRN_ARGS), lambda x: LRN_BACKWARD(x, x, *LRN_ARGS))
        )
        assert_same_answer(cut(y).bfloat16(), expected)
        assert_same_answer(cut(dx).bfloat16(), expected_dx, backward=True)


# -- memory formats ---------------------------------------------------------------------------------------------------


def test_output_is_fresh_memory_even_where_values_do_not_change(backend):
    x = randn(1, 2, 3, 4)
    y = FF.local_response_norm(x, 1, 0.0, 0.75, 1.0)
    assert_bitwise(y, x)
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="C++ kernels are not built")
def test_ops_called_directly_refuse_tensors_that_do_not_fit():
    """The ops are public too, and what a kernel would read out of bounds they must not let through."""
    x = randn(2, 8, 9, 9)
    for dy in (x[:1, :1, :1, :1], x.half()):
        with fastcnn.backends.use("cpu"), pytest.raises((RuntimeError, ValueError, TypeError)):
            LRN_BACKWARD(dy, x, *LRN_ARGS)


# -- NaN and inf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_nan_gradient_stays_in_its_windows_like_torch(backend, format):
    x, dy = leaf(randn(2, 20, 3, 5, format=format)), randn(2, 20, 3, 5, seed=1)
    dy[0, 0, 0, 0] = dy[1, 10, 1, 1] = float("nan")
    for size in (1, 4, 5, 60):
        (ours,) = gradients(FF.local_response_norm(x, size, 0.5), (x,), dy)
        (theirs,) = gradients(F.local_response_norm(x, size, 0.5), (x,), dy)
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)


# -- bad input --------------------------------------------------------------------------------------------------------


def refused_by_both(error, match, *args, **kwargs):
    with pytest.raises(error):
        F.local_response_norm(*args, **kwargs)
    with pytest.raises(error, match=match):
        FF.local_response_norm(*args, **kwargs)


@pytest.mark.parametrize("size", [0, -1, -5])
def test_size_that_is_not_positive_raises_as_torch(each_backend, size):
    refused_by_both(RuntimeError, f"size must be greater than zero, but got size={size}", torch.zeros(1, 3, 4, 4), size)


@pytest.mark.parametrize("size", [2.0, None, "3", True], ids=ident)
def test_size_that_is_no_int_raises_as_torch(each_backend, size):
    match = f"argument 'size' must be int, not {type(size).__name__}"
    refused_by_both(TypeError, match, torch.zeros(1, 3, 4, 4), size)


@pytest.mark.parametrize("name", ["alpha", "beta", "k"])
@pytest.mark.parametrize("value", ["1", None], ids=ident)
def test_parameter_that_is_no_number_raises_as_torch(each_backend, name, value):
    match = f"argument '{name}' must be a number, not {type(value).__name__}"
    refused_by_both(TypeError, match, torch.zeros(1, 3, 4, 4), 3, **{name: value})


@pytest.mark.parametrize("groups", [0, -1, 2, 4])
def test_groups_that_do_not_divide_the_channels_raise(each_backend, groups):
    with pytest.raises(ValueError, match=f"groups=?.*got groups={groups}"):
        FF.local_response_norm(torch.zeros(1, 3, 4, 4), 3, groups=groups)


def test_groups_must_be_named(each_backend):
    with pytest.raises(TypeError):
        FF.local_response_norm(torch.zeros(1, 4, 4, 4), 3, 1e-4, 0.75, 1.0, 2)
