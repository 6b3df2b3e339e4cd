"""More than 2^31 elements on a GPU: the last images get what they get alone. Alone on it, for want of memory."""

import pytest
import torch
from operators import POOL, STAGE, lrn, max_pool2d, relu_lrn_max_pool2d
from operators import STRONG as PARAMS
from promises import FORMATS, assert_bitwise, ident, randn, tail_args

import fastcnn.functional as FF
from fastcnn.ops.triton import conv2d_relu
from fastcnn.params import ConvParams

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
STRONG = PARAMS.op_args()[:4]
LRN, LRN_BACKWARD = lrn.op, lrn.backward_op
POOL_FORWARD, POOL_BACKWARD = max_pool2d.op, max_pool2d.backward_op
TAIL, TAIL_BACKWARD = relu_lrn_max_pool2d.op, relu_lrn_max_pool2d.backward_op
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)


@pytest.fixture(autouse=True)
def memory(gpu):
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False


@formats
def test_triton_memory_bound_operators(triton, format):
    x = torch.empty(260, 96, 296, 296, dtype=torch.bfloat16, device="cuda", memory_format=format)
    assert x.numel() > 2**31
    x[-2:] = x[:2] = randn(2, 96, 296, 296, dtype=torch.bfloat16).cuda()
    ends, args, pool = x[-2:].contiguous(memory_format=format), tail_args(**STAGE), POOL.op_args()
    for op in (lambda t: LRN(t, *STRONG, 1), lambda t: LRN_BACKWARD(t, t, *STRONG, 1)):
        assert_bitwise(op(x)[-2:], op(ends))

    def pooled(t):
        y, argmax = POOL_FORWARD(t, *pool, True)
        return POOL_BACKWARD(y, argmax, [296, 296], format == torch.channels_last, *pool)

    def stage(t):
        y, argmax = TAIL(t, None, *args, True)
        return TAIL_BACKWARD(y, t, None, argmax, *args)[0]

    for op in (pooled, stage):
        assert_bitwise(op(x)[-2:], op(ends))


@formats
def test_cuda_tail(cuda, format):
    x = torch.empty(2**15 + 3, 64, 32, 32, dtype=torch.bfloat16, device="cuda", memory_format=format)
    x[:] = randn(1, 64, 32, 32, dtype=torch.bfloat16).cuda()
    y = FF.relu_lrn_max_pool2d(x, lrn=PARAMS, pool=POOL)
    assert_bitwise(y[-1:], FF.relu_lrn_max_pool2d(x[:1].contiguous(memory_format=format), lrn=PARAMS, pool=POOL))


@formats
def test_cuda_batch_norm(cuda, format):
    x = torch.empty(2**15 + 3, 64, 32, 32, dtype=torch.bfloat16, device="cuda", memory_format=format)
    x[:] = randn(1, 64, 32, 32, dtype=torch.bfloat16).cuda()
    alone, running = x[:1].contiguous(memory_format=format), (torch.zeros(64).cuda(), torch.ones(64).cuda())
    y = FF.batch_norm_relu_max_pool2d(x, *running, pool=POOL)
    assert_bitwise(y[-1:], FF.batch_norm_relu_max_pool2d(alone, *running, pool=POOL))
    y = FF.batch_norm_relu_max_pool2d(x, None, None, training=True, pool=POOL)
    expected = FF.batch_norm_relu_max_pool2d(alone, None, None, training=True, pool=POOL)
    torch.testing.assert_close(y[-1:], expected)


@formats
def test_triton_conv2d_relu(triton, format):
    images, outputs = 1200, 40
    x = torch.empty(images, 8, 212, 212, dtype=torch.bfloat16, device="cuda", memory_format=format).normal_()
    w, b = randn(outputs, 8, 3, 3, dtype=torch.bfloat16).cuda() / 8, randn(outputs, dtype=torch.bfloat16).cuda()
    args = ConvParams([1, 1], [1, 1], [1, 1], 1), True
    config = conv2d_relu.configurations(x, w, 1)[0]
    y, mask = conv2d_relu.forward(x, w, b, *args, config=config)
    assert y.numel() > 2**31
    for i in (0, images // 2, images - 1):
        alone, bits = conv2d_relu.forward(x[i : i + 1], w, b, *args, config=config)
        assert_bitwise(y[i : i + 1], alone)
        assert_bitwise(mask.view(images, -1)[i], bits)
    dz = conv2d_relu.mask_backward(y, mask)
    assert_bitwise(dz[-1], y[-1])
    dz, db = conv2d_relu.relu_backward(y, y, format == torch.channels_last, True)
    assert_bitwise(dz[-1], y[-1])
    torch.testing.assert_close(db.double(), y.sum((0, 2, 3), dtype=torch.float64), rtol=1e-2, atol=0)
