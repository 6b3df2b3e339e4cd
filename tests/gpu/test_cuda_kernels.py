"""The CUDA kernels on a GPU: beside the reference and the Triton kernels, and how they are launched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from promises import DTYPES, FORMATS, assert_bitwise, assert_same_answer, at_offsets, gradients, ident, leaf, randn

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams, backends, reference
from fastcnn.ops import _conv2d_relu_compiled as compiled

pytestmark = pytest.mark.gpu
LRN = LRNParams(5, 0.5, 0.75, 1.0)
POOL = PoolParams(3, 2)
TAILS = [
    {"lrn": LRN, "pool": POOL},
    {"relu": False, "lrn": LRN},
    {"pool": POOL},
    {"lrn": LRNParams(4, 0.5, 0.6, 1.0, 2), "pool": PoolParams(2, 2, 1, 3)},
    {"pool": PoolParams(17, 1, 8)},
    {},
]
SHAPES = [(3, 96, 55, 55), (2, 36, 13, 17), (1, 2, 19, 7)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=ident)
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)
tails = pytest.mark.parametrize("tail", TAILS, ids=lambda tail: "-".join(map(str, map(ident, tail.values()))) or "copy")


@pytest.fixture(autouse=True)
def cuda():
    """The backend "cuda", forced."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    with backends.use("cuda"):
        yield


def run(x, bias, **tail):
    """y, argmax, dx and dbias, by the ops, with the backend in use."""
    relu, lrn, pool = tail.get("relu", True), tail.get("lrn"), tail.get("pool")
    args = (
        relu,
        *(lrn.op_args() if lrn else (0, 0.0, 0.0, 0.0, 1)),
        *(pool.op_args() if pool else ([],) * 4 + (False,)),
    )
    y, argmax = torch.ops.fastcnn.relu_lrn_max_pool2d(x, bias, *args, pool is not None)
    dy = 2 + randn(*y.shape, dtype=y.dtype, seed=1).cuda()
    return dy, [y, argmax, *torch.ops.fastcnn.relu_lrn_max_pool2d_backward(dy, x, bias, argmax, *args)]


@tails
@formats
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=ident)
def test_same_answer(shape, dtype, format, tail):
    x = randn(*shape, dtype=dtype, format=format)
    bias = randn(shape[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=1)
    dy, results = run(x.cuda(), bias.cuda(), **tail)
    y, argmax, dx, dbias = (t.cpu() for t in results)
    x64, bias64 = leaf(x, torch.float64), leaf(bias, torch.float64)
    y64 = pooled64 = reference.relu_lrn_max_pool2d(x64, bias64, **tail)
    if "pool" in tail:
        y64 = at_offsets(reference.relu_lrn_max_pool2d(x64, bias64, **{**tail, "pool": None}), argmax, tail["pool"])
    dx64, dbias64 = gradients(y64, (x64, bias64), dy.cpu().double())
    assert_same_answer(y, pooled64.detach())
    assert_same_answer(dx, dx64, backward=True)
    assert_same_answer(dbias, dbias64, backward=True)


@tails
@formats
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=ident)
def test_within_4_ulp_of_triton(shape, dtype, format, tail):
    """Of the largest of the terms that an element is a sum of. Near-ties may make the two pick different maxima."""
    x = randn(*shape, dtype=dtype, format=format).cuda()
    dy, ours = run(x, None, **tail)
    with backends.use("triton"):
        _, theirs = run(x, None, **tail)
    assert (ours[1] != theirs[1]).float().mean() <= 1e-4
    same = (ours[1] == theirs[1]).all() if "pool" in tail else True
    terms = [ours[0], dy.abs().max().expand_as(ours[2])]
    for a, b, term in zip(ours[::2][: 1 + bool(same)], theirs[::2], terms, strict=False):
        ulp = torch.finfo(dtype).eps * torch.maximum(torch.maximum(a.abs(), b.abs()), term.abs())
        assert ((a - b).abs() <= 4 * ulp).all()


@formats
@dtypes
@pytest.mark.parametrize("pool", [POOL, PoolParams(2, 2), PoolParams(3, 2, 1, 2), PoolParams(17, 1, 8)], ids=ident)
def test_max_pool2d_is_bitwise_that_of_triton_and_torch(dtype, format, pool):
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


@tails
@formats
def test_two_runs_give_the_same_bits(format, tail):
    x, bias = randn(8, 96, 27, 27, format=format).cuda(), randn(96, seed=1).cuda()
    for a, b in zip(run(x, bias, **tail)[1], run(x, bias, **tail)[1], strict=True):
        assert_bitwise(a, b)


@formats
def test_more_than_2_to_the_31_elements(format):
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False
    x = torch.empty(2**15 + 3, 64, 32, 32, dtype=torch.bfloat16, device="cuda", memory_format=format)
    x[:] = randn(1, 64, 32, 32, dtype=torch.bfloat16).cuda()
    y = FF.relu_lrn_max_pool2d(x, lrn=LRN, pool=POOL)
    assert_bitwise(y[-1:], FF.relu_lrn_max_pool2d(x[:1].contiguous(memory_format=format), lrn=LRN, pool=POOL))


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
        "forward<float, true,",
        "backward<double, false,",
        "tail<__half, true,",
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
def test_convolution_error_is_at_most_twice_that_of_torch(monkeypatch, name, dtype, format):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "tf32")
    shape, weight_shape, conv = CONVOLUTIONS[name]
    x = randn(*shape, dtype=dtype, format=format).cuda()
    weight, bias = (
        randn(*size, dtype=dtype, seed=i).cuda() for i, size in enumerate((weight_shape, weight_shape[:1]), 1)
    )
    assert compiled.can_run(x)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), **conv).relu()
    ours, theirs = FF.conv2d_relu(x, weight, bias, **conv), F.conv2d(x, weight, bias, **conv).relu()
    floor = exact.norm() * torch.finfo(dtype).eps / 2
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
