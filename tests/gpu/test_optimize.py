"""optimize() on a GPU: formats, whose operators run, batch norm in the weights, CUDA graphs."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcnn

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def network(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [
            *(nn.Conv2d(3, 32, 5, 2), nn.ReLU(True), nn.LocalResponseNorm(5, k=2.0), nn.MaxPool2d(3, 2)),
            *(
                nn.Conv2d(32, 32, 3, padding=1, groups=2),
                nn.BatchNorm2d(32),
                nn.ReLU(),
                nn.Conv2d(32, 16, 1),
                nn.ReLU(),
            ),
            *(nn.Flatten(), nn.Linear(16 * 7 * 7, 8), nn.ReLU()),
        ]
        model = nn.Sequential(*layers)
        for buffer in (model[5].running_mean, model[5].running_var):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model.cuda().to(dtype)


def images(dtype=torch.float32, seed=0):
    return torch.randn(4, 3, 33, 33, generator=torch.Generator().manual_seed(seed)).cuda().to(dtype)


def assert_close(y, expected, dtype):
    error = (y.double() - expected.double()).norm() / expected.double().norm()
    assert error <= {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]  # TF32 in float32


class Convolutions(TorchDispatchMode):
    """The memory formats of the inputs of convolutions, and the names of the operators of fastcnn."""

    def __init__(self):
        super().__init__()
        self.channels_last, self.ours = [], []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().partition(".")[0]
        if name in ("aten::convolution", "fastcnn::conv2d_relu"):
            self.channels_last.append(args[0].is_contiguous(memory_format=torch.channels_last))
        if name.startswith("fastcnn::"):
            self.ours.append(name.partition("::")[2])
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_in_any_dtype(dtype):
    model = network(dtype)
    fast = fastcnn.optimize(model)
    x, other = images(dtype).requires_grad_(), images(dtype).requires_grad_()
    y, expected = fast(x), model(other)
    assert_close(y, expected, dtype)
    assert y.stride() == expected.stride()
    for output in (y, expected):
        output.float().square().mean().backward()
    assert_close(x.grad, other.grad, dtype)
    for p, q in zip(fast.parameters(), model.parameters(), strict=True):
        assert_close(p.grad, q.grad, dtype)
        assert p.grad.stride() == p.stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_has_the_batch_norm_in_the_weights(dtype):
    model = network(dtype).eval()
    fast = fastcnn.optimize(model, inference=True)
    for seed in range(3):
        with torch.no_grad():
            assert_close(fast(images(dtype, seed)), model(images(dtype, seed)), dtype)
    fast[5].weight.mul_(2)
    model[5].weight.data.mul_(2)
    for _ in range(2):
        with torch.no_grad():
            assert_close(fast(images(dtype)), model(images(dtype)), dtype)


def test_maps_of_16_bits_are_channels_last():
    """That is the format of tensor cores. float32 stays as it is."""
    for dtype in DTYPES:
        fast = fastcnn.optimize(network(dtype).eval())
        with torch.no_grad():
            fast(images(dtype))
            with Convolutions() as ran:
                fast(images(dtype))
        assert all(ran.channels_last) == (dtype != torch.float32)
        assert "relu_lrn_max_pool2d" in ran.ours


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_is_captured_in_a_cuda_graph(dtype):
    model = network(dtype).eval()
    fast = fastcnn.optimize(model, inference=True)
    x = images(dtype)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                fast(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fast(x)
        x.copy_(images(dtype, seed=1))
        graph.replay()
        assert_close(y, model(images(dtype, seed=1)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cuda_graphs_by_inductor(dtype):
    model = network(dtype).eval()
    options = {"inner": "inductor", "mode": "reduce-overhead"}
    compiled = torch.compile(model, backend="fastcnn", options=options)
    for seed in range(4):
        with torch.no_grad():
            assert_close(compiled(images(dtype, seed)).clone(), model(images(dtype, seed)), dtype)
