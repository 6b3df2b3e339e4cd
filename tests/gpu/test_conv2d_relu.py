"""conv2d_relu on a GPU: the Triton kernel in every configuration, cuDNN beside it, and the choice between them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from operators import AWKWARD, CONVOLUTIONS, conv2d_relu, errors
from promises import FORMATS, assert_bitwise, gradients, ident, leaf, randn, rounding

import fastcnn
import fastcnn.functional as FF
from fastcnn.bench.environment import convolution_precision
from fastcnn.ops import select_conv2d_relu
from fastcnn.ops.cudnn import conv2d_relu as cudnn
from fastcnn.params import ConvParams

pytestmark = pytest.mark.gpu
OP, BACKWARD = conv2d_relu.op, conv2d_relu.backward_op
NAN = float("nan")
# float32 is computed in two ways
NUMBERS = [(torch.bfloat16, "tf32"), (torch.float16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee")]
numbers = pytest.mark.parametrize(("dtype", "precision"), NUMBERS, ids=["bf16", "fp16", "tf32", "fp32"])
formats = pytest.mark.parametrize("format", FORMATS, ids=ident)


@pytest.fixture(autouse=True)
def settings(request, monkeypatch, tmp_path):
    """The test's precision of float32, and a tuner that remembers nothing from before."""
    monkeypatch.setenv("FASTCNN_CACHE_DIR", str(tmp_path))
    select_conv2d_relu._tuner.cache_clear()
    name = request.node.callspec.params.get("precision", "tf32") if hasattr(request.node, "callspec") else "tf32"
    with convolution_precision(name):
        yield name


@pytest.fixture(params=["triton", None], ids=["triton", "chosen"])
def backend(request):
    with fastcnn.backends.use(request.param):
        yield


def cuda_case(name, dtype=torch.float32, format=torch.contiguous_format):
    tensors, kwargs = conv2d_relu.call(name, dtype, format)
    return [t.cuda() for t in tensors], kwargs


def run(tensors, kwargs, frozen=False):
    """Output and gradients."""
    wanted = [leaf(t) for t in tensors[: 1 if frozen else 3]]
    y = FF.conv2d_relu(*wanted, *tensors[len(wanted) :], **kwargs)
    dy = 2 + randn(*y.shape, dtype=y.dtype, seed=9).cuda()
    return [y.detach(), *gradients(y, wanted, dy)]


@numbers
@formats
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_error_is_at_most_twice_that_of_torch(backend, name, format, dtype, precision):
    tensors, kwargs = cuda_case(name, dtype, format)
    floor = rounding(dtype, precision == "tf32")
    ours, theirs = errors(FF.conv2d_relu, tensors, kwargs), errors(conv2d_relu.counterpart, tensors, kwargs)
    for part, a, b in zip(["output", "input", "weight", "bias"], ours, theirs, strict=True):
        assert a <= max(2 * b, floor), f"{part}: error {a:.3g}, torch's {b:.3g}"


@formats
@pytest.mark.parametrize("name", AWKWARD)
def test_smallest_cases_stay_within_their_memory(format, name):
    """For compute-sanitizer: every kernel, with blocks that end outside of the tensors."""
    for dtype in (torch.bfloat16, torch.float32):
        tensors, kwargs = cuda_case(name, dtype, format)
        with fastcnn.backends.use("triton"):
            for frozen in (False, True):
                assert all(t.isfinite().all() for t in run(tensors, kwargs, frozen))
        cudnn.forward(*tensors, ConvParams([1, 1], [0, 0], [1, 1], kwargs.get("groups", 1)), True)


@formats
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_same_bits_in_every_run(backend, format, frozen):
    tensors, kwargs = cuda_case("alexnet_conv2", torch.bfloat16, format)
    first = run(tensors, kwargs, frozen)
    for _ in range(3):
        for again, before in zip(run(tensors, kwargs, frozen), first, strict=True):
            assert_bitwise(again, before)


@formats
def test_frozen_weights_give_the_same_gradient(backend, format):
    tensors, kwargs = cuda_case("alexnet_conv1", torch.float16, format)
    trained, frozen = run(tensors, kwargs), run(tensors, kwargs, frozen=True)
    assert_bitwise(frozen[0], trained[0])
    assert_bitwise(frozen[1], trained[1])


@formats
@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_non_finite_inputs_propagate_as_in_torch(backend, format, value):
    tensors, kwargs = cuda_case("alexnet_conv2", torch.float32, format)
    tensors[0][1, 2, 3, 4] = value
    y, expected = FF.conv2d_relu(*tensors, **kwargs), conv2d_relu.counterpart(*tensors, **kwargs)
    assert_bitwise(y.isnan(), expected.isnan())
    assert_bitwise(y.isinf(), expected.isinf())


def test_benchmark_mode_remembers_what_it_chose(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    tensors, kwargs = cuda_case("alexnet_conv2", torch.bfloat16, torch.channels_last)
    first = FF.conv2d_relu(*tensors, **kwargs)
    written = (tmp_path / "conv2d_relu.json").read_text()
    assert torch.cuda.get_device_name() in written
    assert_bitwise(FF.conv2d_relu(*tensors, **kwargs), first)
    select_conv2d_relu._tuner.cache_clear()
    assert_bitwise(FF.conv2d_relu(*tensors, **kwargs), first)
    assert (tmp_path / "conv2d_relu.json").read_text() == written


def test_runs_on_the_current_stream(backend):
    tensors, kwargs = cuda_case("alexnet_conv1")
    expected = run(tensors, kwargs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**7)
        tensors = [t * 1 for t in tensors]
        results = run(tensors, kwargs)
    torch.cuda.current_stream().wait_stream(side)
    for a, b in zip(results, expected, strict=True):
        assert_bitwise(a, b)


@formats
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_graph_capture(backend, format, frozen):
    (x, w, b), kwargs = cuda_case("alexnet_conv2", torch.bfloat16, format)
    wanted = [leaf(x)] if frozen else [leaf(t) for t in (x, w, b)]
    dy = randn(2, 12, 9, 9, dtype=torch.bfloat16).cuda()

    def step():
        y = FF.conv2d_relu(*wanted, *(w, b)[len(wanted) - 1 :], **kwargs)
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        wanted[0].copy_(randn(*x.shape, dtype=x.dtype, seed=7))
    graph.replay()
    for a, c in zip(captured, step(), strict=True):
        assert_bitwise(a, c)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_compile_without_graph_break(backend, frozen):
    torch._dynamo.reset()
    tensors, kwargs = cuda_case("alexnet_conv2", format=torch.channels_last)
    compiled = torch.compile(lambda *t: FF.conv2d_relu(*t, **kwargs), fullgraph=True)
    wanted = [leaf(t) for t in tensors[: 1 if frozen else 3]]
    y = compiled(*wanted, *tensors[len(wanted) :])
    dy = 2 + randn(*y.shape, seed=9).cuda()
    for a, c in zip([y.detach(), *gradients(y, wanted, dy)], run(tensors, kwargs, frozen), strict=True):
        torch.testing.assert_close(a, c)


@formats
@pytest.mark.parametrize("with_mask", [False, True])
def test_opcheck(backend, format, with_mask):
    conv = [1, 2], [1, 0], [1, 1], 2
    x, w, b = randn(2, 4, 5, 6, format=format).cuda(), randn(6, 2, 3, 3, seed=1).cuda(), randn(6, seed=2).cuda()
    y, mask = OP(x, w, b, *conv, with_mask)
    weights = (w, b) if with_mask else (leaf(w), leaf(b))
    torch.library.opcheck(OP, (leaf(x), *weights, *conv, with_mask))
    tail = list(x.shape), format == torch.channels_last, *conv
    saved, needs = ((mask, None), [True, False, False]) if with_mask else ((y, x), [True, True, True])
    torch.library.opcheck(BACKWARD, (leaf(torch.ones_like(y)), saved[0], leaf(saved[1]), leaf(w), *tail, needs))


def test_gradcheck(backend):
    tensors = [leaf(t, torch.float64) for t in cuda_case("pairs")[0]]
    kwargs = CONVOLUTIONS["pairs"][2]
    torch.autograd.gradcheck(lambda *t: FF.conv2d_relu(*t, **kwargs), tensors, fast_mode=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_where_its_tensors_are():
    tensors, kwargs = cuda_case("alexnet_conv2")
    expected = run(tensors, kwargs)[0]
    y = FF.conv2d_relu(*(t.to("cuda:1") for t in tensors), **kwargs)
    assert y.device.index == 1
    torch.testing.assert_close(y.cpu(), expected.cpu())


def test_a_tensor_on_cpu_is_refused():
    (x, w, b), kwargs = conv2d_relu.call("pairs")
    with fastcnn.backends.use("triton"), pytest.raises(RuntimeError, match="cannot run on cpu tensors"):
        FF.conv2d_relu(x, w, b, **kwargs)
    assert F.relu(x).device.type == "cpu"
