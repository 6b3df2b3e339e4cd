"""What is special to the CUDA kernels of batch norm, under the sanitizers; see test_promises.py."""

import pytest
import torch
from operators import NORMS, POOL, batch_norm_relu_max_pool2d
from promises import DTYPES, FORMATS, assert_same_answer, ident, randn

from fastcnn.params import opmath

from .emulator import BatchNorm, Emulated

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=ident)
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)


def check(emulator, shape, norm, dtype, format, **options):
    case = batch_norm_relu_max_pool2d.norm_case(shape, norm, float32_bias=True)
    place = Emulated("emulator", emulator=emulator, **options)
    return batch_norm_relu_max_pool2d.check(place, case, case.tensors(dtype, format))


@formats
@dtypes
@pytest.mark.parametrize("shape", [(2, 37, 9, 17), (3, 8, 5, 6), (1, 600, 3, 3)], ids=ident)
def test_misaligned_tensors(address, shape, dtype, format):
    for pool in (None, POOL):
        check(address, shape, {"training": True, "pool": pool}, dtype, format, offset=8)


@formats
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: "-".join(map(str, norm.values())))
def test_empty_batch_and_empty_maps(address, norm, format):
    """Statistics and the gradients of weight and bias are zero."""
    shapes = [(0, 5, 7, 7)] if norm["pool"] else [(0, 5, 7, 7), (2, 5, 0, 3), (2, 0, 3, 3), (0, 0, 0, 0)]
    for shape in shapes:
        results = check(address, shape, norm, torch.float32, format)
        assert not any(gradient.any() for gradient in results.gradients)


def statistics(emulator, x):
    mean, var = (torch.empty(x.shape[1], dtype=opmath(x.dtype)) for _ in range(2))
    BatchNorm(emulator).batch_norm_statistics(x, mean, var, not x.is_contiguous(), False)
    return mean, var


@formats
@pytest.mark.parametrize(("dtype", "middle"), [(torch.float32, 1e4), (torch.float64, 1e8)], ids=ident)
def test_variance_of_values_far_from_zero(address, dtype, middle, format):
    """Sums of squares would lose all of it."""
    x = randn(3, 6, 19, 23, dtype=torch.float64).add(middle).to(dtype).contiguous(memory_format=format)
    mean, var = statistics(address, x)
    exact = x.double().var((0, 2, 3), correction=0)
    assert_same_answer(mean, x.double().mean((0, 2, 3)))
    torch.testing.assert_close(var.double(), exact, rtol=1e-5, atol=0)


@formats
def test_one_huge_value_where_a_thread_begins(address, format):
    """Its differences from the others are huge, and theirs from each other are not to be lost."""
    x = randn(2, 4, 31, 29)
    x[0, :, 0, 0] = 1e4
    mean, var = statistics(address, x.contiguous(memory_format=format))
    assert_same_answer(mean, x.double().mean((0, 2, 3)))
    assert_same_answer(var, x.double().var((0, 2, 3), correction=0))


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ident)
@pytest.mark.parametrize("pool", [None, POOL], ids=ident)
def test_no_barrier_is_missing(thread, dtype, format, pool):
    check(thread, (2, 40, 9, 13), {"training": True, "pool": pool}, dtype, format)
