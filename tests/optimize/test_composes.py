"""optimize() beside everything else that traces, transforms, wraps or watches a model; and how it does not give up."""

import contextlib
import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import threading
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from promises import leaf, randn
from torch import nn
from torch._inductor import metrics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import fastcnn

from .networks import X, assert_same, called, network, sequential

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
OPTIONS = [{}, {"inference": True}]


# -- compilers, tracers and exporters see the plain forward -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dynamic"), [("sequential", True), ("functional", False), ("nested", True), ("modes", False)]
)
def test_compile(name, dynamic):
    model = network(name)
    torch.compiler.reset()
    compiled = torch.compile(fastcnn.optimize(model), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same(compiled, model, X)
    assert_same(compiled.eval(), model.eval(), randn(3, 3, 40, 36, dtype=X.dtype))


@pytest.mark.parametrize("inner", [None, "aot_eager"])
@pytest.mark.parametrize("name", ["sequential", "functional", "nested", "modes"])
def test_backend_of_compile(name, inner):
    model = network(name)
    torch.compiler.reset()
    options = None if inner is None else {"inner": inner}
    compiled, plain = torch.compile(model, fullgraph=True, backend="fastcnn", options=options), network(name)
    assert_same(compiled, plain, X)
    assert_same(compiled.eval(), plain.eval(), randn(3, 3, 40, 36, dtype=X.dtype))


def test_options_of_the_backend_are_checked():
    torch.compiler.reset()
    with pytest.raises(Exception, match="it has 'inner'"):
        torch.compile(network("modes"), backend="fastcnn", options={"outer": "inductor"})(X)


def test_modes_of_inductor_inside(monkeypatch):
    """CUDA graphs, which do nothing on CPU: what matters is that Inductor is asked for them."""
    from torch._inductor import compile_fx

    asked, compile = [], compile_fx.compile_fx
    monkeypatch.setattr(
        compile_fx, "compile_fx", lambda *args, **options: asked.append(options) or compile(*args, **options)
    )
    torch.compiler.reset()
    model = network("sequential").eval()
    for inner, mode in ((None, "reduce-overhead"), ("eager", "reduce-overhead")):
        with pytest.raises(Exception, match="takes mode='reduce-overhead' only"):
            torch.compile(model, backend="fastcnn", options={"inner": inner, "mode": mode})(X)
    options = {"inner": "inductor", "mode": "reduce-overhead"}
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="fastcnn", options=options)(X), model(X))
    assert asked[0]["config_patches"] == {"triton.cudagraphs": True}


def kernels(model):
    """How many kernels of Inductor, and which operators of fastcnn, a call runs."""
    torch.compiler.reset()
    metrics.reset()
    x = X.float()
    with torch.no_grad():
        y = model(x)
        made = metrics.generated_kernel_count
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            model(x)
    ours = {event.key.removeprefix("fastcnn::") for event in profiled.key_averages() if "fastcnn::" in event.key}
    return y, made, ours


def test_who_runs_inside_and_outside_of_compile():
    layers = sequential(inplace=False)[:6]
    model = layers.float().eval()
    expected, ours = model(X.float()), {"relu_lrn_max_pool2d"}
    inner = nn.Sequential(*layers)
    inner[0] = torch.compile(inner[0])
    cases = [
        (fastcnn.optimize(model), False, ours),
        (torch.compile(model, backend="fastcnn"), False, ours),
        (torch.compile(fastcnn.optimize(model)), True, set()),
        (fastcnn.optimize(torch.compile(model)), True, set()),
        (torch.compile(model, backend="fastcnn", options={"inner": "inductor"}), True, {"conv2d_relu", *ours}),
        (fastcnn.optimize(inner), False, ours),
    ]
    for optimized, by_inductor, by_us in cases:
        y, made, found = kernels(optimized)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        assert bool(made) == by_inductor
        assert found == by_us


def test_a_model_compiled_in_place_stays_compiled():
    model = sequential()[:4]
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    fast = fastcnn.optimize(model, inplace=True)
    assert fast._compiled_call_impl is compiled
    assert any("compile" in entry.why_not for entry in fast.fastcnn_report.left)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["sequential", "functional", "nested"])
def test_export(name, strict):
    model = network(name).eval()
    fast = fastcnn.optimize(model)
    for _ in range(2):
        exported = torch.export.export(fast, (X,), strict=strict)
        torch.testing.assert_close(exported.module()(X), model(X))
        assert not [n for n in exported.graph.nodes if "fastcnn" in str(n.target)]
        fast(X)


@pytest.mark.parametrize("options", OPTIONS)
def test_symbolic_trace_jit_and_fakes(options):
    model = sequential(inplace=False).eval()
    fast = fastcnn.optimize(model, **options)
    for _ in range(2):
        traced = torch.fx.symbolic_trace(fast)
        assert "3" in [node.target for node in traced.graph.nodes]
        torch.testing.assert_close(traced(X), model(X))
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(fast, X), buffer)
        buffer.seek(0)
        torch.testing.assert_close(torch.jit.load(buffer)(X), model(X))
        torch.testing.assert_close(torch.jit.script(fast)(X), model(X))
        torch.testing.assert_close(make_fx(fast)(X)(X), model(X))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert fast(mode.from_tensor(X)).shape == model(X).shape
        fast(X)


@pytest.mark.parametrize("options", OPTIONS)
def test_graph_modules(options):
    """As feature extractors are; layers may be taken out of their graph later."""
    model = sequential(inplace=False).eval()
    fast = fastcnn.optimize(torch.fx.symbolic_trace(model), **options)
    torch.testing.assert_close(fast(X), model(X))
    assert len(fast.fastcnn_report.replaced) >= 5
    assert not any("not called" in entry.why_not for entry in fast.fastcnn_report.left)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(again(X), model(X))
        assert called(again) == called(fast)
    for node in list(fast.graph.nodes):
        if node.target == "1":
            node.replace_all_uses_with(node.args[0])
            fast.graph.erase_node(node)
    fast.recompile()
    torch.testing.assert_close(fast(X), nn.Sequential(model[0], *model[2:])(X))


@pytest.mark.parametrize("options", OPTIONS)
def test_onnx(options, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(5, k=2.0), nn.MaxPool2d(3, 2), nn.Flatten()
    model = nn.Sequential(*layers, nn.LazyLinear(4)).float().eval()
    x = X.float()
    expected = model(x).detach()
    torch.onnx.export(fastcnn.optimize(model, **options), (x,), str(tmp_path / "model.onnx"), dynamo=False)
    assert {"Conv", "Relu", "MaxPool"} <= {n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=1e-4, atol=1e-5)


# -- transforms and modes ---------------------------------------------------------------------------------------------


def test_functional_call_and_transforms():
    model = network("nested").eval()
    fast = fastcnn.optimize(model)
    parameters = {name: p.detach() * 0.5 for name, p in model.named_parameters()}

    def loss(m, parameters, x):
        return torch.func.functional_call(m, parameters, (x,)).sum()

    ours, theirs = (torch.func.grad(loss, argnums=1)(m, parameters, X) for m in (fast, model))
    for name in parameters:
        torch.testing.assert_close(ours[name], theirs[name])
    torch.testing.assert_close(
        torch.func.functional_call(fast, parameters, (X,)), torch.func.functional_call(model, parameters, (X,))
    )
    stack = randn(3, 2, 3, 20, 20, dtype=X.dtype)
    torch.testing.assert_close(torch.vmap(fast)(stack), torch.stack([model(x) for x in stack]))
    ours, theirs = (torch.func.jvp(m, (X,), (X.cos(),)) for m in (fast, model))
    torch.testing.assert_close(ours, theirs)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(fast(forward_ad.make_dual(X, X.cos()))).tangent
    torch.testing.assert_close(tangent, theirs[1])
    assert not fast.fastcnn_report.plain  # nothing was tried and failed


@pytest.mark.parametrize("options", OPTIONS)
def test_flops(options):
    model = network("sequential").float().eval().requires_grad_(False)
    fast, counted = fastcnn.optimize(model, **options), []
    for m in (model, fast, fast):
        with FlopCounterMode(display=False) as mode:
            m(leaf(X.float())).sum().backward()
        counted.append(mode.get_total_flops())
    assert counted[0] == counted[1] == counted[2] > 0


# -- wrappers ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_distributed_data_parallel(tmp_path):
    model = network("nested")
    with process_group(tmp_path):
        fast = fastcnn.optimize(model)
        parallel = nn.parallel.DistributedDataParallel(fast, bucket_cap_mb=1e-4)  # at which a graph could be cut
        for _ in range(2):
            parallel(X).sum().backward()
            model(X).sum().backward()
        assert not fast.fastcnn_report.plain
        assert len(fast.fastcnn_report.replaced) >= 8
        assert fast._fastcnn_engine.graphs == 1
        for a, b in zip(parallel.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


def test_data_parallel():
    model = network("sequential")
    torch.testing.assert_close(nn.DataParallel(fastcnn.optimize(model))(X), model(X))


# -- it does not give up ----------------------------------------------------------------------------------------------


def test_many_models_in_one_process():
    for i in range(20):
        layers = [layer for _ in range(1 + i % 4) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())]
        fast = fastcnn.optimize(nn.Sequential(*layers, nn.MaxPool2d(2)))
        assert called(fast)
        assert not fast.fastcnn_report.plain


@pytest.mark.parametrize("options", OPTIONS)
def test_models_are_freed(options):
    model = sequential()
    fast = fastcnn.optimize(model, **options)
    fast(X)
    alive = [weakref.ref(x) for x in (fast, fast[0], fast[0].weight)]
    del fast
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

    def forward(self, x, mode=0, scale=None):
        y = self.pool(F.relu(self.conv(x)))
        return y if scale is None else y * scale


def test_many_kinds_of_call():
    fast = fastcnn.optimize(Kinds())
    kinds = [{"mode": mode} for mode in (*range(6), *"abcdefg", None, [1], (1, 2), {"a": 1})]
    kinds += [{"scale": scale} for scale in (1.5, 2, torch.ones(1), torch.ones(4, 1, 1))]
    for _ in range(2):
        for kind in kinds:
            with torch.no_grad():
                fast(X, **kind)
    assert len(kinds) > 20
    with_mode = [called(lambda x, kind=kind: fast(x, **kind)) for kind in kinds]
    assert all("relu_lrn_max_pool2d" in ops for ops in with_mode)
    assert not fast.fastcnn_report.plain


class Counter(nn.Module):
    """Its own convolution, and those of a layer."""

    def __init__(self, start, step):
        super().__init__()
        self.features, self.conv, self.count, self.step = sequential()[:4], nn.Conv2d(8, 4, 1), start, step

    def forward(self, x):
        self.count = self.count + self.step
        return F.relu(self.conv(self.features(x)))


@pytest.mark.parametrize(("start", "step"), [(0, 1), (0.0, 0.5)])
def test_counters_do_not_make_a_graph_a_call(start, step):
    fast = fastcnn.optimize(Counter(start, step).eval())
    for _ in range(100):
        fast(X)
    assert fast.count == start + 100 * step
    assert fast._fastcnn_engine.graphs <= 3
    assert called(fast) == ["relu_lrn_max_pool2d"]


@pytest.mark.parametrize(("start", "step"), [("", "a"), ((), (1,))])
def test_what_needs_a_graph_a_call_runs_its_layers_fused(start, step):
    fast = fastcnn.optimize(Counter(start, step).eval())
    with torch.no_grad():
        for _ in range(50):
            fast(X)
    assert fast.count == step * 50
    assert fast._fastcnn_engine.graphs <= 12
    (entry,) = fast.fastcnn_report.plain.values()
    assert entry.where == "Counter"
    assert "new graph" in entry.why_not
    assert called(fast) == ["relu_lrn_max_pool2d"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("first", [(32, 32), (33, 45)])
def test_many_sizes_and_batches(first, options):
    layers = sequential()[:6], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)
    model = nn.Sequential(*layers).eval()
    fast = fastcnn.optimize(model, **options)
    with torch.no_grad():
        for i in range(30):
            height, width = first if i == 0 else (24 + 7 * i % 31, 24 + 11 * i % 37)
            for batch in (3, 1, 2):
                x = X.new_ones(batch, 3, height, width)
                torch.testing.assert_close(fast(x), model(x), rtol=1e-6, atol=1e-9)
    assert len(fast.fastcnn_report.replaced) >= 2
    if TORCH >= (2, 13):
        assert fast._fastcnn_engine.graphs <= 3
        assert not fast.fastcnn_report.plain
    else:  # its pools guard whether sizes are even
        assert fast._fastcnn_engine.graphs < 30
        assert all("new graph" in entry.why_not for entry in fast.fastcnn_report.plain.values())


def test_an_environment_that_changes_in_every_call(monkeypatch):
    fast = fastcnn.optimize(network("sequential").eval())
    graphs = 0
    with torch.no_grad():
        for i in range(40):
            monkeypatch.setenv("FASTCNN_TEST_STEP", str(i))
            before = fast._fastcnn_engine.graphs
            fast(X)
            graphs += fast._fastcnn_engine.graphs != before
    assert graphs <= 12
    assert any("new graph" in entry.why_not for entry in fast.fastcnn_report.plain.values())


def test_parts_of_a_model_are_as_fused_as_the_whole():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = sequential()

        def forward(self, x):
            return self.features(x).mean()

    fast = fastcnn.optimize(Parts().eval())
    assert called(fast.features) == called(fast) == called(fast.forward)
    assert len(called(fast)) == 4


@torch.no_grad()
def test_what_has_no_graph_is_tried_again():
    fast = fastcnn.optimize(network("sequential"))
    handle = fast[1].register_forward_hook(lambda m, x, y: print(end=""))
    for _ in range(3):
        fast(X)
    (entry,) = fast.fastcnn_report.plain.values()
    assert "print" in entry.why_not
    handle.remove()
    for _ in range(5):
        fast(X)
    assert "relu_lrn_max_pool2d" in called(fast)  # which no layer alone calls


def test_dynamo_switched_off_is_reported():
    model = network("sequential")
    fast = fastcnn.optimize(model)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(fast(X), model(X))
    assert any("force_eager" in entry.why_not for entry in fast.fastcnn_report.left)
    assert len(called(fast)) == 4


@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
def test_environment_that_switches_dynamo_off_is_reported(variable):
    source = """
import torch, fastcnn
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
fast = fastcnn.optimize(model, example_inputs=[torch.ones(1, 3, 8, 8)])
assert torch.equal(fast(torch.ones(1, 3, 8, 8)), model(torch.ones(1, 3, 8, 8)))
print(fast.fastcnn_report)
"""
    environment = {**os.environ, variable: "1"}
    output = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)
    assert "is disabled" in output.stdout


def test_dynamo_is_imported_by_the_first_optimize():
    source = """
import sys, fastcnn, torch
assert "torch._dynamo" not in sys.modules
fastcnn.optimize(torch.nn.ReLU())
assert "torch._dynamo" in sys.modules
"""
    subprocess.run([sys.executable, "-c", source], check=True)


def test_private_names_of_torch_that_are_missing_are_reported():
    source = """
import torch, torch._dynamo.utils, fastcnn
del torch._dynamo.utils.warn_once_cache
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
fast = fastcnn.optimize(model)
assert torch.equal(fast(torch.ones(1, 3, 8, 8)), model(torch.ones(1, 3, 8, 8)))
print(fast.fastcnn_report)
"""
    output = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout
    assert "another TorchDynamo" in output
    assert "warn_once_cache" in output


def test_settings_of_the_process_stay_as_they_are():
    from fastcnn.optimize import dynamo

    def settings():
        return [getattr(dynamo.config, name) for name in dynamo.SETTINGS], warnings.filters[:]

    before, errors = settings(), []
    models = [fastcnn.optimize(network("sequential")) for _ in range(6)]

    def run(model):
        try:
            for size in (32, 40, 48):
                model(X[:, :, :1, :1].expand(2, 3, size, size))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert settings() == before
    assert not any(model.fastcnn_report.plain for model in models)


def test_settings_of_torch_that_are_missing_are_reported(monkeypatch):
    from fastcnn.optimize import dynamo

    monkeypatch.setitem(dynamo.SETTINGS, "no_such_setting", True)
    model = network("sequential")
    fast = fastcnn.optimize(model)
    torch.testing.assert_close(fast(X), model(X))
    assert any("no_such_setting" in entry.why_not for entry in fast.fastcnn_report.plain.values())
