"""The CUDA kernels on a GPU: beside the reference and the Triton kernels, and how they are launched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from promises import (
    DTYPES,
    FORMATS,
    assert_bitwise,
    assert_same_answer,
    ident,
    randn,
    rounding,
    tail_args,
)

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams, backends, reference
from fastcnn.bench.environment import convolution_precision
from fastcnn.ops.cuda import conv2d_relu as cuda_conv2d_relu

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]
LRN = LRNParams(5, 0.5, 0.75, 1.0)
POOL = PoolParams(3, 2)
TAILS = [
    {"lrn": LRN, "pool": POOL},
    {"lrn": LRNParams(5, 0.5, 0.5, 1.0, 2), "pool": PoolParams(2, 2)},
    {"relu": False, "lrn": LRN},
    {"pool": POOL},
    {"lrn": LRNParams(4, 0.5, 0.6, 1.0, 2), "pool": PoolParams(2, 2, 1, 3)},
    {"pool": PoolParams(17, 1, 8)},
    {},
]
SHAPES = [(3, 96, 55, 55), (2, 256, 13, 13), (2, 36, 13, 17), (1, 2, 19, 7)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=ident)
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)
tails = pytest.mark.parametrize("tail", TAILS, ids=lambda tail: "-".join(map(str, map(ident, tail.values()))) or "copy")


def run(x, bias, **tail):
    """y, argmax, dx and dbias, by the ops, with the backend in use."""
    args = tail_args(**tail)
    y, argmax = torch.ops.fastcnn.relu_lrn_max_pool2d(x, bias, *args, "pool" in tail)
    dy = 2 + randn(*y.shape, dtype=y.dtype, seed=1).cuda()
    return dy, [y, argmax, *torch.ops.fastcnn.relu_lrn_max_pool2d_backward(dy, x, bias, argmax, *args)]


def test_current_stream_and_cuda_graphs():
    x = randn(4, 96, 27, 27).cuda()
    expected = FF.relu_lrn_max_pool2d(x, lrn=LRN, pool=POOL)
    graph, still = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        y = FF.relu_lrn_max_pool2d(still, lrn=LRN, pool=POOL)
    still.copy_(2 * x)
    graph.replay()
    assert_bitwise(y, FF.relu_lrn_max_pool2d(2 * x, lrn=LRN, pool=POOL))
    assert not torch.equal(y, expected)


def test_every_device():
    for device in range(torch.cuda.device_count()):
        x = randn(2, 8, 9, 9).to(device)
        y = FF.local_response_norm(x, 5)
        assert y.device == x.device
        assert_same_answer(y.cpu(), reference.local_response_norm(x.cpu().double(), 5))
    assert torch.cuda.current_device() == 0


def test_compiles_in_one_graph():
    x = randn(2, 16, 9, 9).cuda()
    compiled_tail = torch.compile(lambda x: FF.relu_lrn_max_pool2d(x, lrn=LRN, pool=POOL), fullgraph=True)
    assert_bitwise(compiled_tail(x), FF.relu_lrn_max_pool2d(x, lrn=LRN, pool=POOL))


def test_kernel_attributes():
    kernels = backends._C_cuda.kernel_attributes()
    for name in (
        "general::relu_lrn<float, true,",
        "general::tail_backward<double, false,",
        "general::tail<__half, true>",
        "general::batch_norm_statistics<__half, false>",
        "general::batch_norm_backward<float, true, true>",
        "fast::lrn<__nv_bfloat16, true,",
        "fast::tail_vectors<__half, 3,",
        "fast::tail_backward_planes<float, 2,",
        "conv2d_relu_kernel<__nv_bfloat16",
    ):
        assert any(name in kernel["name"] for kernel in kernels)
    for kernel in kernels:
        assert 0 < kernel["registers"] <= 255
        assert kernel["local_bytes"] == 0
        assert 0 < kernel["occupancy"] <= 1


CONVOLUTIONS = {
    "AlexNet conv1": ((4, 3, 227, 227), (96, 3, 11, 11), {"stride": 4}),
    "AlexNet conv2": ((4, 96, 27, 27), (256, 48, 5, 5), {"padding": 2, "groups": 2}),
    "VGG conv1_1": ((2, 3, 64, 64), (64, 3, 3, 3), {"padding": 1}),
    "odd": ((2, 14, 9, 11), (26, 7, 2, 3), {"stride": (2, 1), "padding": (0, 2), "dilation": (3, 2), "groups": 2}),
}


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=ident)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_error_is_at_most_twice_that_of_torch(name, dtype, format):
    shape, weight_shape, conv = CONVOLUTIONS[name]
    x = randn(*shape, dtype=dtype, format=format).cuda()
    weight, bias = (
        randn(*size, dtype=dtype, seed=i).cuda() for i, size in enumerate((weight_shape, weight_shape[:1]), 1)
    )
    exact = F.conv2d(x.double(), weight.double(), bias.double(), **conv).relu()
    with convolution_precision("tf32"):
        assert cuda_conv2d_relu.can_run(x)
        ours, theirs = FF.conv2d_relu(x, weight, bias, **conv), F.conv2d(x, weight, bias, **conv).relu()
    floor = exact.norm() * rounding(dtype, tf32=True)
    assert (ours.double() - exact).norm() <= max(2 * (theirs.double() - exact).norm(), floor)
    assert ours.stride() == theirs.contiguous(memory_format=format).stride()


def test_convolution_keeps_nan():
    x, weight = randn(1, 8, 6, 6, dtype=torch.float16).cuda(), randn(8, 8, 3, 3, dtype=torch.float16).cuda()
    weight[3, 2, 1, 1] = float("nan")
    assert FF.conv2d_relu(x, weight)[:, 3].isnan().all()


def test_whole_network_with_nothing_but_cuda_kernels():
    network = fastcnn.models.create_model("alexnet", num_classes=10, init="kaiming", dropout="inverted").cuda().eval()
    x = randn(2, 3, 227, 227).cuda()
    with torch.no_grad():
        y = network(x)
        with backends.use("reference"):
            expected = network(x)
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2 * expected.std().item())
