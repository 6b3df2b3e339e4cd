"""Launches on a GPU: the first of them into a graph capture, in huge grids, and what is said of those that fail."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from promises import assert_bitwise, assert_same_answer, assert_tail_answer, randn, tail_args

from fastcnn import LRNParams, PoolParams, reference
from fastcnn.ops.triton import lrn

pytestmark = pytest.mark.gpu
LRN = LRNParams(5, 0.5, 0.75, 1.0)
POOL = PoolParams(2, 2)
# In NCHW and 16 bits a CUDA block takes 64 channels: one block more than fit into y of a grid.
CHANNELS = 65535 * 64 + 40


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    request.getfixturevalue(request.param)
    return request.param


def run(script: str, *args: str) -> str:
    """What a script prints in a process of its own, in which nothing was launched yet."""
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CAPTURE = """
import functools, sys, torch
import torch.nn.functional as F
import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams, backends
from fastcnn.ops.cuda import conv2d_relu as cuda
from fastcnn.ops.triton import conv2d_relu as triton
from fastcnn.params import ConvParams

name = sys.argv[1]
torch.manual_seed(0)
x, bias = (torch.randn(*size, device="cuda", requires_grad=True) for size in ((2, 14, 9, 11), (14,)))
weight = torch.randn(16, 14, 3, 3, device="cuda").half()
lrn, pool = LRNParams(5, 0.5, 0.75, 1.0), PoolParams(3, 2)


def outputs():
    ys = [FF.local_response_norm(x, 5, 0.5), FF.max_pool2d(x, 3, 2)]
    ys.append(FF.relu_lrn_max_pool2d(x, bias, lrn=lrn, pool=pool))
    return [*ys, *torch.autograd.grad(ys, (x, bias), [y.detach() + 2 for y in ys])]


def convolved():
    image = x.detach().half()
    run = cuda.run
    if name == "triton":
        run = functools.partial(triton.forward, config=triton.configurations(image, weight, 1)[0])
    return run(image, weight, None, ConvParams([1, 1], [1, 1], [1, 1], 1), False)[0]


graph = torch.cuda.CUDAGraph()
with backends.use(name), torch.cuda.graph(graph):
    captured, image = outputs(), convolved()
for _ in range(2):
    with torch.no_grad():
        x.normal_(), bias.normal_()
    graph.replay()
    torch.cuda.synchronize()
    with backends.use("reference"):
        expected = outputs()
    for ours, theirs in zip(captured, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    exact = F.conv2d(x.detach().half().double(), weight.double(), padding=1).relu()
    torch.testing.assert_close(image.double(), exact, rtol=2e-3, atol=2e-2)
print("captured")
"""


def test_the_first_launch_of_every_operator_may_be_in_a_graph_capture(backend):
    assert "captured" in run(CAPTURE, backend)


# -- more blocks than a grid has room for in y ------------------------------------------------------------------------


def many_channels(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(1, CHANNELS, 2, 2, dtype=torch.bfloat16, device="cuda", generator=generator)


def test_lrn_of_more_channels_than_65535_blocks_take(backend):
    x, dy = many_channels(), many_channels(1)
    y, dx = torch.ops.fastcnn.lrn(x, *LRN.op_args()), torch.ops.fastcnn.lrn_backward(dy, x, *LRN.op_args())
    assert_same_answer(y, reference.local_response_norm(x.double(), *LRN.op_args()[:4]))
    assert_same_answer(dx, reference.lrn_backward(dy.double(), x.double(), LRN), backward=True)


def test_max_pool2d_of_more_channels_than_65535_blocks_take(backend):
    x = many_channels()
    y, argmax = torch.ops.fastcnn.max_pool2d(x, *POOL.op_args(), True)
    dx = torch.ops.fastcnn.max_pool2d_backward(y, argmax, [2, 2], False, *POOL.op_args())
    expected, indices = F.max_pool2d(x, 2, return_indices=True)
    assert_bitwise(y, expected)
    assert_bitwise(argmax, indices.to(torch.uint8))
    assert_bitwise(dx, torch.where(torch.arange(4, device="cuda").view(1, 1, 2, 2) == indices, expected, 0))


def test_tail_of_more_channels_than_65535_blocks_take(backend):
    x, bias = many_channels(), many_channels(1)[0, :, 0, 0].float()
    tail = {"lrn": LRN, "pool": POOL}
    y, _ = torch.ops.fastcnn.relu_lrn_max_pool2d(x, bias, *tail_args(**tail), True)
    assert_same_answer(y, reference.relu_lrn_max_pool2d(x.double(), bias.double(), **tail))


def test_bias_gradient_of_more_channels_than_65535_blocks_take(backend):
    x, bias, dy = many_channels(), many_channels(1)[0, :, 0, 0].float(), many_channels(2)
    y, argmax = torch.ops.fastcnn.relu_lrn_max_pool2d(x, bias, *tail_args(), False)
    dx, dbias = torch.ops.fastcnn.relu_lrn_max_pool2d_backward(dy, x, bias, argmax, *tail_args())
    assert_tail_answer(*(t.cpu() for t in (x, bias, y, argmax, dy, dx, dbias)))


# -- failures ---------------------------------------------------------------------------------------------------------


FAILURE = """
import os, torch
import fastcnn

x = torch.ones(1, 8, 4, 4, device="cuda")
y, graph, stream = torch.empty_like(x), torch.cuda.CUDAGraph(), torch.cuda.Stream()
with torch.cuda.stream(stream):
    graph.capture_begin()
    try:
        stream.synchronize()  # not allowed: from here on no launch into this capture succeeds
    except RuntimeError:
        pass
    try:
        torch.ops.fastcnn_cuda.lrn(x, y, False, 5, 1e-4, 0.75, 1.0, 1)
    except RuntimeError as error:
        print(error, flush=True)
os._exit(0)  # the capture cannot be ended
"""


def test_a_launch_that_fails_names_the_cuda_kernel(cuda):
    printed = run(FAILURE)
    assert "CUDA kernel lrn (grid 1 x 1 x 1, block " in printed
    assert "bytes of shared memory): cudaError" in printed


def test_a_launch_that_fails_names_the_triton_kernel(triton):
    x = randn(1, 8, 4, 4).cuda()
    name = r"fastcnn\.kernels\.lrn\.lrn_forward_kernel \(1 programs of 64 warps\)"
    with pytest.raises(RuntimeError, match=f"Triton kernel {name}"):
        lrn.forward(x, LRN, config=(2048, 64, 8))  # twice the threads that a block may have
    assert_same_answer(lrn.forward(x, LRN).cpu(), reference.local_response_norm(x.cpu().double(), *LRN.op_args()[:4]))
