"""The memory-bound Triton kernels under autograd's checks, CUDA graphs, torch.compile, and on several GPUs."""

import pytest
import torch
from operators import POOL, STAGE, lrn, max_pool2d, relu_lrn_max_pool2d
from operators import STRONG as PARAMS
from promises import FORMATS, assert_bitwise, gradients, ident, leaf, randn, tail_args

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams

pytestmark = pytest.mark.gpu
STRONG = PARAMS.op_args()[:4]
LRN, POOL_FORWARD = lrn.op, max_pool2d.op
TAIL, TAIL_BACKWARD = relu_lrn_max_pool2d.op, relu_lrn_max_pool2d.backward_op
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)


@formats
def test_opcheck_and_gradcheck(triton, format):
    x, bias = randn(2, 8, 5, 6, format=format).cuda(), randn(8, seed=1).cuda()
    y, argmax = TAIL(x, bias, *tail_args(**STAGE), True)
    torch.library.opcheck(LRN, (leaf(x), *STRONG, 1))
    torch.library.opcheck(POOL_FORWARD, (leaf(x), *POOL.op_args(), True))
    torch.library.opcheck(TAIL, (leaf(x), leaf(bias), *tail_args(**STAGE), True))
    torch.library.opcheck(TAIL_BACKWARD, (y, x, bias, argmax, *tail_args(**STAGE)))
    torch.autograd.gradcheck(lambda x: FF.local_response_norm(x, *STRONG), leaf(x[:1], torch.float64))
    torch.autograd.gradcheck(lambda x: FF.relu_lrn_max_pool2d(x, **STAGE), leaf(x[:1], torch.float64))


@formats
def test_cuda_graph_replays_forward_and_backward(triton, format):
    x, bias = leaf(randn(4, 96, 13, 13, format=format).cuda()), leaf(randn(96, seed=1).cuda())

    def run():
        y = FF.relu_lrn_max_pool2d(FF.local_response_norm(FF.max_pool2d(x, 2, 1), 5), bias, **STAGE)
        return [y, *torch.autograd.grad(y.sum(), (x, bias))]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.copy_(randn(4, 96, 13, 13, seed=3))
    graph.replay()
    for ours, expected in zip(captured, run(), strict=True):
        assert_bitwise(ours.detach(), expected.detach())


def test_compile_without_graph_break(triton):
    layer = fastcnn.nn.ReLULRNMaxPool2d(lrn=LRNParams(5), pool=POOL)
    x, bias = leaf(randn(2, 16, 13, 13, format=torch.channels_last).cuda()), leaf(randn(16, seed=1).cuda())
    y, expected = torch.compile(layer, fullgraph=True)(x, bias), layer(x, bias)
    assert_bitwise(y.detach(), expected.detach())
    for ours, theirs in zip(gradients(y, (x, bias), y), gradients(expected, (x, bias), expected), strict=True):
        assert_bitwise(ours, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_gpu_than_the_current(triton):
    x = randn(2, 16, 13, 13)
    one, two = (FF.relu_lrn_max_pool2d(x.to(device), **STAGE) for device in ("cuda:0", "cuda:1"))
    assert two.device.index == 1
    assert_bitwise(two.cpu(), one.cpu())
