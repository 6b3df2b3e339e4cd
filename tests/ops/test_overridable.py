"""What others see of the public functions and layers: torch.fx, torch.jit, ONNX, forward-mode AD, modes, profilers."""

import collections
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from promises import leaf, randn, recorded_calls
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.profiler import profile
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams
from fastcnn.models.layers import ConvReLULRNMaxPool2d
from fastcnn.ops.register import IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("best_backend")

X, WEIGHT, BIAS = (randn(*shape, dtype=torch.float64) for shape in ((2, 6, 9, 9), (8, 3, 3, 3), (8,)))
LRN, POOL = LRNParams(5, 0.1, 0.75, 2.0), PoolParams(3, 2)
# Ours and torch's, of an input.
FUNCTIONS = {
    "local_response_norm": (
        lambda x: FF.local_response_norm(x, 5, 0.1, 0.75, 2.0),
        lambda x: F.local_response_norm(x, 5, 0.1, 0.75, 2.0),
    ),
    "max_pool2d": (lambda x: FF.max_pool2d(x, 3, 2), lambda x: F.max_pool2d(x, 3, 2)),
    "conv2d_relu": (
        lambda x: FF.conv2d_relu(x, WEIGHT, BIAS, padding=1, groups=2),
        lambda x: F.conv2d(x, WEIGHT, BIAS, padding=1, groups=2).relu(),
    ),
    "relu_lrn_max_pool2d": (
        lambda x: FF.relu_lrn_max_pool2d(x, lrn=LRN, pool=POOL),
        lambda x: F.max_pool2d(F.local_response_norm(x.relu(), 5, 0.1, 0.75, 2.0), 3, 2),
    ),
}


@pytest.fixture(params=FUNCTIONS)
def pair(request):
    return FUNCTIONS[request.param]


def layers():
    """Each layer of fastcnn once."""
    return nn.Sequential(
        ConvReLULRNMaxPool2d(6, 8, 3, padding=1, groups=2, lrn=LRN, pool=PoolParams(2, 1)),
        fastcnn.nn.ConvReLU2d(8, 8, 3, padding=1),
        fastcnn.nn.LocalResponseNorm(5, 0.1, k=2.0, groups=2),
        fastcnn.nn.MaxPool2d(3, 2),
        fastcnn.nn.ReLULRNMaxPool2d(lrn=LRN, pool=PoolParams(2)),
    ).double()


# -- forward-mode differentiation -------------------------------------------------------------------------------------


def test_jvp(pair):
    ours, theirs = (torch.func.jvp(f, (X,), (X.cos(),)) for f in pair)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_jacobians_and_hessians(pair):
    x = X[:1, :, :4, :4].contiguous()
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        ours, theirs = (transform(lambda x, f=f: f(x).sum((0, 2, 3)))(x) for f in pair)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    ours, theirs = (torch.func.hessian(lambda x, f=f: f(x).square().sum())(x[:, :, :3, :3]) for f in pair)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_vmapped_jvp_and_dual_numbers(pair):
    x = X.unflatten(0, (2, 1))
    ours, theirs = (torch.vmap(lambda x, f=f: torch.func.jvp(f, (x,), (x.cos(),))[1])(x) for f in pair)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, X.cos())
        ours, theirs = (forward_ad.unpack_dual(f(dual)).tangent for f in pair)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# -- tracers ----------------------------------------------------------------------------------------------------------


def test_a_proxy_becomes_a_call_of_our_function():
    for name, (ours, theirs) in FUNCTIONS.items():
        traced = torch.fx.symbolic_trace(ours)
        assert getattr(FF, name) in [node.target for node in traced.graph.nodes]
        torch.testing.assert_close(traced(X), theirs(X), rtol=1e-10, atol=1e-12)


def test_layers_can_be_traced_symbolically():
    model = layers()
    traced = torch.fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert {FF.conv2d_relu, FF.local_response_norm, FF.max_pool2d, FF.relu_lrn_max_pool2d} <= set(called)
    torch.testing.assert_close(traced(X), model(X))
    torch.testing.assert_close(pickle.loads(pickle.dumps(traced))(X), model(X))
    x = leaf(X)
    torch.testing.assert_close(torch.autograd.grad(traced(x).sum(), x), torch.autograd.grad(model(x).sum(), x))


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "inception_v1"])
def test_networks_can_be_traced_symbolically(name):
    size = 67 if name == "alexnet" else 64
    model, x = fastcnn.models.create_model(name, input_size=size, num_classes=5).eval(), randn(1, 3, size, size)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("grad", [False, True])
def test_jit_traces_consist_of_operators_of_torch(grad):
    model, buffer = layers(), io.BytesIO()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, X)
    assert "fastcnn::" not in str(traced.inlined_graph)
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(X), model(X))


class Subclass(torch.Tensor):
    pass


def test_subclasses_of_tensors_stay_what_they_are(pair):
    y = pair[0](X.as_subclass(Subclass))
    assert type(y) is Subclass
    torch.testing.assert_close(y.as_subclass(torch.Tensor), pair[1](X))


# -- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(dynamo, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    model, x = layers().float().eval(), X.float()
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=dynamo, verbose=False)
    nodes = collections.Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert (nodes["Conv"], nodes["Relu"], nodes["LRN"], nodes["MaxPool"]) == (2, 3, 3, 3)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_onnx_of_an_even_window(tmp_path):
    """ONNX centres it on another channel than torch, so it is exported as its parts."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, x = nn.Sequential(fastcnn.nn.LocalResponseNorm(4, 0.5)), X.float()
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"), dynamo=False)
    assert "LRN" not in [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), F.local_response_norm(x, 4, 0.5), rtol=1e-4, atol=1e-5)


# -- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, True)])
def test_flops_are_those_of_torch(wanted):
    counted = []
    for convolve in (FF.conv2d_relu, lambda *args, **kwargs: F.conv2d(*args, **kwargs).relu()):
        tensors = [t.clone().requires_grad_(w) for t, w in zip((X, WEIGHT, BIAS), wanted, strict=True)]
        with FlopCounterMode(display=False) as mode:
            convolve(*tensors, padding=1, groups=2).sum().backward()
        counted.append(mode.get_total_flops())
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modes_and_profilers_see_the_operators(name):
    op, call, x = name.replace("local_response_norm", "lrn"), FUNCTIONS[name][0], leaf(X)
    expected = {f"fastcnn.{op}.default", f"fastcnn.{op}_backward.default"}
    with recorded_calls() as calls:
        call(x).sum().backward()
    assert {called for called, _ in calls} == expected
    with profile(use_cpu=True) as profiled:
        call(x).sum().backward()
    seen = {event.name.replace("::", ".") + ".default" for event in profiled.function_events}
    assert seen >= expected
    for pre_dispatch in (False, True):
        graph = make_fx(call, pre_dispatch=pre_dispatch)(X).graph
        assert f"fastcnn.{op}.default" in [str(node.target) for node in graph.nodes]


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - {"conv2d_relu"}))  # whose weight is a usual tensor
def test_tensors_that_only_the_dispatcher_understands(name):
    call, x = FUNCTIONS[name][0], leaf(X)
    dy = call(X)
    torch.testing.assert_close(torch._from_functional_tensor(call(torch._to_functional_tensor(X))), dy)
    assert call(X.to("meta")).is_meta
    torch.testing.assert_close(call(torch._neg_view(X)), call(-X))
    zero, negative = torch._efficientzerotensor(dy.shape, dtype=dy.dtype), torch._neg_view(dy)
    for given, plain in ((zero, torch.zeros_like(dy)), (negative, -dy)):
        ours, theirs = (torch.autograd.grad(call(x), x, g) for g in (given, plain))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="C++ kernels are not built")
def test_a_call_that_nobody_watches_is_spared_the_dispatcher(monkeypatch):
    """Which takes longer than the rest of a small operator. Below it the keys of autograd are excluded."""
    implementations, dispatched = IMPLEMENTATIONS["max_pool2d"], []
    forward, autograd = implementations["cpu"], torch._C.DispatchKey.AutogradFunctionality

    def spy(*args):
        dispatched.append(torch._C._dispatch_tls_is_dispatch_key_excluded(autograd))
        return forward(*args)

    monkeypatch.setitem(implementations, "cpu", spy)
    with fastcnn.backends.use("cpu"):
        for x in (X, leaf(X), nn.Parameter(X)):
            FF.max_pool2d(x, 3)
        with torch.no_grad():
            FF.max_pool2d(leaf(X), 3)
        assert dispatched == [False] * 4
        with profile(use_cpu=True):
            FF.max_pool2d(X, 3)
        assert dispatched[-1]


def test_inference_mode_asks_for_no_gradient_even_where_it_is_enabled(pair):
    with torch.inference_mode(), torch.enable_grad(), torch.inference_mode(False):
        y = pair[0](X.clone())
    assert not y.requires_grad
    weight = leaf(WEIGHT)
    with torch.inference_mode(), torch.enable_grad():
        assert not FF.conv2d_relu(X, weight, padding=1, groups=2).requires_grad
