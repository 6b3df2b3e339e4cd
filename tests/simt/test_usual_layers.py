"""The kernels of csrc/cuda/fast, for LRN over five channels and pools of 3 x 3 and 2 x 2 at stride 2."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from operators import POOL, max_pool2d
from operators import STRONG as LRN
from promises import DTYPES, FORMATS, assert_bitwise, ident, randn

from fastcnn import LRNParams, PoolParams, reference

from .checks import assert_same_tail, special
from .emulator import Emulated

USUAL = [dtype for dtype in DTYPES if dtype != torch.float64]
POOLS = [POOL, PoolParams(2, 2), PoolParams(3, 2, 0, 1, True), PoolParams(2, 2, 0, 1, True)]
LRNS = [LRN, LRNParams(5, 0.5, 0.5, 2.0), LRNParams(5, 0.5, 0.75, 1.0, 2), LRNParams(5, 1e-4, 0.75, 1.0)]


@pytest.fixture(params=FORMATS, ids=ident)
def format(request):
    return request.param


@pytest.mark.parametrize("dtype", USUAL, ids=ident)
@pytest.mark.parametrize(
    ("relu", "lrn", "pool"), list(itertools.product([False, True], [None, LRN], [None, POOL])), ids=str
)
def test_every_part(address, format, dtype, relu, lrn, pool):
    for shape in ((2, 48, 7, 9), (3, 8, 12, 5), (2, 16, 6, 35)):
        for bias in (True, False):
            assert_same_tail(address, shape, dtype, format, bias=bias, relu=relu, lrn=lrn, pool=pool)


@pytest.mark.parametrize("pool", [None, *POOLS], ids=str)
@pytest.mark.parametrize("lrn", LRNS, ids=ident)
def test_every_window_of_channels_and_pool(address, format, lrn, pool):
    for dtype, size in itertools.product(USUAL, [(9, 12), (12, 9)]):
        assert_same_tail(address, (2, 48, *size), dtype, format, lrn=lrn, pool=pool)


SIZES = [(2, 2), (3, 3), (4, 3), (3, 65), (66, 4)]


@pytest.mark.parametrize(
    ("size", "pool"),
    [(size, pool) for size in SIZES for pool in POOLS if pool.op_args()[0][0] <= min(size)],
    ids=str,
)
def test_every_size(address, format, size, pool):
    for dtype, lrn in itertools.product((torch.float32, torch.bfloat16), (None, LRN)):
        assert_same_tail(address, (2, 8, *size), dtype, format, lrn=lrn, pool=pool)


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [*itertools.product((128, 600), USUAL), (4104, torch.float32)],  # the last has too many for shared memory
    ids=ident,
)
def test_channels_of_several_blocks(address, format, dtype, channels):
    for lrn, pool in ((LRN, POOL), (LRN, None), (None, POOL)):
        assert_same_tail(address, (1, channels, 5, 5), dtype, format, lrn=lrn, pool=pool)


@pytest.mark.parametrize("pool", POOLS, ids=ident)
@pytest.mark.parametrize("dtype", USUAL, ids=ident)
def test_pool_is_bitwise_that_of_torch(address, format, dtype, pool):
    for size in ((11, 13), (12, 8)):
        case, place = max_pool2d.pool_case((2, 16, *size), pool), Emulated("emulator", emulator=address)
        max_pool2d.check(place, case, case.tensors(dtype, format))
        max_pool2d.check(place, case, [special(2, 16, *size, dtype=dtype, format=format)])


@pytest.mark.parametrize("pool", POOLS, ids=ident)
@pytest.mark.parametrize("lrn", [None, LRN], ids=str)
@pytest.mark.parametrize("dtype", USUAL, ids=ident)
def test_nan_propagates_like_torch(address, format, dtype, lrn, pool):
    x = randn(2, 16, 11, 12, dtype=dtype)
    x.view(-1)[::97] = float("nan")
    x.view(-1)[5::131] = float("inf")
    x = x.contiguous(memory_format=format)
    wide = x.float().relu()
    if lrn:
        wide = reference.local_response_norm(wide, *lrn.op_args()[:4])
    expected, indices = F.max_pool2d(wide, *pool.op_args(), return_indices=True)
    y, argmax = address.forward("relu_lrn_max_pool2d", x, relu=True, lrn=lrn, pool=pool)
    assert_bitwise(y.isnan(), expected.isnan())
    found = reference.flat_indices(argmax, x.shape[-1], pool)
    assert_bitwise(found[expected.isnan()], indices[expected.isnan()])
    assert_bitwise(address.forward("relu_lrn_max_pool2d", x, relu=True, lrn=lrn, pool=pool, with_argmax=False)[0], y)


@pytest.mark.parametrize("dtype", USUAL, ids=ident)
def test_first_of_window_that_relu_makes_zero_wins(address, format, dtype):
    x = -randn(2, 16, 9, 9, dtype=dtype, format=format).abs()
    for lrn in (None, LRN):
        y, argmax = address.forward("relu_lrn_max_pool2d", x, relu=True, lrn=lrn, pool=POOL)
        assert not y.any()
        assert not argmax.any()


@pytest.mark.parametrize("dtype", USUAL, ids=ident)
def test_bias_gradient_of_many_terms(address, dtype, format):
    for lrn, pool in ((None, POOL), (LRN, POOL), (LRN, None)):
        assert_same_tail(address, (4, 8, 33, 35), dtype, format, lrn=lrn, pool=pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ident)
@pytest.mark.parametrize(("lrn", "pool"), [(LRN, POOL), (LRN, None), (None, POOL), (LRN, PoolParams(2, 2))], ids=str)
def test_no_barrier_is_missing(thread, dtype, format, lrn, pool):
    assert_same_tail(thread, (2, 40, 9, 14), dtype, format, lrn=lrn, pool=pool)
