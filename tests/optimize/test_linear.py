"""optimize(): large linear layers that are trained."""

import pytest
import torch
import torch.nn.functional as F
from promises import leaf, randn
from torch import Tensor, nn

import fastcnn
from fastcnn.ops import linear as _linear
from fastcnn.ops.linear import linear
from fastcnn.optimize.graph import fuse

pytestmark = pytest.mark.skipif(fastcnn.backends.cpu_capability() in ("", "baseline"), reason="torch's is faster")


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether ours ran, of each call in turn that is not only traced. Weights from 1000 elements on are large."""
    seen: list[bool] = []
    is_ours = _linear._is_ours

    def recorded(*args: Tensor | None) -> bool:
        ours = is_ours(*args)
        if not torch.compiler.is_compiling():
            seen.append(ours)
        return ours

    monkeypatch.setattr(_linear, "_WEIGHTS", 1000)
    monkeypatch.setattr(_linear, "_is_ours", recorded)
    return seen


class Classifier(nn.Module):
    """Large layers as modules and as functions, one that is shared, and a small one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Dropout(), nn.Linear(96, 48), nn.ReLU(inplace=True), nn.Dropout())
        self.shared, self.relu = nn.Linear(48, 48, bias=False), nn.ReLU(inplace=True)
        self.weight, self.last = nn.Parameter(torch.randn(48, 48) / 7), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.relu(self.shared(self.first(x))))
        return self.last(torch.relu_(F.linear(weight=self.weight, input=x, bias=self.shared.weight[0])))


REPLACED = [
    ("first.1", "Linear", "linear"),
    ("shared", "Linear", "linear"),
    ("linear", "linear", "linear"),
]


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier().float()


def trained(model, x):
    """The output, and the gradients of input and parameters; what is dropped is always the same."""
    torch.manual_seed(1)
    x = leaf(x)
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad((y * torch.linspace(1, 2, y.shape[-1], dtype=y.dtype)).sum(), wanted)]


def assert_trained_alike(fast, model, x):
    torch.testing.assert_close(trained(fast, x), trained(model, x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_large_layers_are_ours(model, ran, frozen, training):
    model.shared.requires_grad_(not frozen)
    fast = fastcnn.optimize(model)
    for batch in (2, 5, 2):
        assert_trained_alike(fast.train(training), model.train(training), randn(batch, 96))
    assert ran == [True] * 4 * 3
    assert [(e.where, e.what, e.now) for e in fast.fastcnn_report.replaced] == REPLACED
    assert not fast.fastcnn_report.left
    assert "Linear runs as linear\n  first.1\n  shared\n" in str(fast.fastcnn_report)


def test_layers_of_the_backend_are_ours(model, ran):
    torch._dynamo.reset()
    fast = torch.compile(model, backend="fastcnn", fullgraph=True)
    assert_trained_alike(fast, model, randn(5, 96))
    assert ran == [True] * 4


@pytest.mark.parametrize("way", ["small", "inputs not in sixteens", "three dimensions", "float64", "bfloat16"])
def test_others_are_left_to_torch(model, ran, monkeypatch, way):
    x = randn(5, 96)
    if way == "small":
        monkeypatch.setattr(_linear, "_WEIGHTS", 96 * 48 + 1)
    elif way == "inputs not in sixteens":
        model, x = nn.Linear(90, 48).float(), x[:, :90]
    elif way == "three dimensions":
        x = x[:, None]
    else:
        model, x = model.to(getattr(torch, way)), x.to(getattr(torch, way))
    fast = fastcnn.optimize(model)
    assert_trained_alike(fast, model, x)
    assert not ran
    assert not fast.fastcnn_report.replaced


def test_calls_that_turn_out_otherwise_are_left_to_torch(model, ran):
    """The graph is the same, and the answer that of torch."""
    fast = fastcnn.optimize(model)
    fast(randn(2, 96))
    with fastcnn.backends.use("reference"):
        assert_trained_alike(fast, model, randn(2, 96))
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        y = fast(randn(2, 96))
        torch.manual_seed(1)
        torch.testing.assert_close(y, model(randn(2, 96)))
    assert ran == [True] * 4 + [False] * 8


def test_layers_for_inference_that_are_trained_after_all(model, ran):
    fast = fastcnn.optimize(model, inference=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(randn(5, 96)), model.eval()(randn(5, 96)))
    assert ran == [True]  # of the one with a bias that is computed in each call, for which nothing is packed
    fast.requires_grad_()
    for training in (False, True):
        assert_trained_alike(fast.train(training), model.train(training), randn(5, 96))
    assert ran == [True, *[True, True, True, True, False] * 2]


def test_a_linear_layer_of_ours_is_found_too(ran):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(fastcnn.models.layers.Linear(96, 48), nn.ReLU(True)).float()
    fast = fastcnn.optimize(model)
    assert_trained_alike(fast, model, randn(5, 96))
    assert ran == [True, True]
    assert [(e.where, e.now) for e in fast.fastcnn_report.replaced] == [("0", "linear")]


def test_a_weight_that_is_no_tensor_of_the_graph_is_left_to_torch():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(F.linear, (x, graph.placeholder("weight")))
    graph.output(y)
    x.meta["example_value"] = y.meta["example_value"] = torch.empty(2, 96)
    assert fuse(graph, {}) == []
    assert linear not in [node.target for node in graph.nodes]
