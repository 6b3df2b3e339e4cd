"""max_pool2d on a GPU: the Triton kernels in every configuration, and the CUDA kernels beside them."""

import pytest
import torch
import torch.nn.functional as F
from operators import POOL
from promises import DTYPES, FORMATS, assert_bitwise, gradients, ident, in_format, integers, leaf, randn

import fastcnn.functional as FF
from fastcnn import PoolParams, backends, reference
from fastcnn.ops.triton import max_pool2d

pytestmark = pytest.mark.gpu
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=ident)


def assert_is_that_of_torch(pool, format, dtype, forward, backward):
    """Values, places and gradients, bit for bit, by two configurations; None: the default."""
    x = in_format(integers(2, 24, 27, 21, dtype=dtype), format)
    expected, places = reference.window_offsets(x, pool)
    dy = integers(*expected.shape, dtype=dtype, seed=1)
    expected_dx = reference.max_pool2d_backward(dy.double(), places, (27, 21), pool).to(dtype)
    last = format == torch.channels_last
    y, argmax = max_pool2d.forward(x.cuda(), pool, True, config=forward)
    dx = max_pool2d.backward(dy.cuda(), argmax, [27, 21], last, pool, config=backward)
    for ours, theirs in ((y, expected), (argmax.long(), places), (dx, expected_dx)):
        assert_bitwise(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=ident)
@formats
@pytest.mark.parametrize("pool", [POOL, PoolParams(2, 2), PoolParams(3, 2, 1)], ids=ident)
@pytest.mark.parametrize(
    "configs", list(zip(max_pool2d.FORWARD_CONFIGS, max_pool2d.BACKWARD_CONFIGS, strict=True)), ids=ident
)
def test_every_configuration(triton, configs, pool, format, dtype):
    assert_is_that_of_torch(pool, format, dtype, *configs)


@formats
@dtypes
@pytest.mark.parametrize("pool", [POOL, PoolParams(2, 2), PoolParams(3, 2, 1, 2), PoolParams(17, 1, 8)], ids=ident)
def test_cuda_triton_and_torch_agree_bitwise(dtype, format, pool):
    x = randn(2, 40, 27, 31, dtype=dtype, format=format).cuda()
    x[0, :, 3:9, 4:8] = float("nan")
    x[1] = x[1].round()
    outputs = []
    for backend in ("cuda", "triton"):
        with backends.use(backend):
            input = leaf(x)
            y, indices = FF.max_pool2d(input, *pool.op_args(), return_indices=True)
            outputs.append((y.detach(), indices, *gradients(y, (input,), randn(*y.shape, dtype=dtype, seed=1).cuda())))
    for ours, theirs in zip(*outputs, strict=True):
        assert_bitwise(ours, theirs)
    for ours, theirs in zip(outputs[0], F.max_pool2d(x, *pool.op_args(), return_indices=True), strict=False):
        assert_bitwise(ours, theirs)
