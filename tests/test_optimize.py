"""optimize(): the same network, faster."""

import copy
import io
import pickle
import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from promises import FORMATS, assert_bitwise, embedded, ident, in_format, leaf, randn, recorded_calls
from torch import nn

import fastcnn
from fastcnn.models.layers import PaperDropout
from fastcnn.ops.cpu import winograd as _winograd

pytestmark = pytest.mark.usefixtures("best_backend", "float64")

LRN = 5, 1e-3, 0.75, 2.0


@pytest.fixture
def float64():
    """So that a difference is a mistake, and no rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Functional(nn.Module):
    """Stages written as calls of functions, shared layers, keyword arguments, and a default argument."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)

    def forward(self, x, scale=1.0):
        x = F.max_pool2d(F.local_response_norm(F.relu(self.conv1(x)), *LRN), 3, stride=2)
        x = self.relu(self.conv2(x)) * scale
        x = torch.max_pool2d(torch.conv2d(x, self.weight, padding=1).relu(), 2)
        return F.local_response_norm(x, size=4, alpha=0.1)


class Block(nn.Module):
    """Branches that are concatenated, as in InceptionV1 and SqueezeNet."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(inplace=True))
        self.three = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(True), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(True))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(8, 2, 1), nn.ReLU(True))

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x), self.pool(x)], 1)


class Branching(nn.Module):
    """Control flow on values, which cannot be traced, around layers and a Sequential."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.norm, self.pool = nn.LocalResponseNorm(*LRN), nn.MaxPool2d(2)

    def forward(self, x):
        x = self.features(x)
        return self.pool(self.norm(x)) if x.sum() > 0 else self.norm(self.pool(x))


class Modes(nn.Module):
    """Another output in training than in evaluation."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.divide = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), False

    def forward(self, x):
        x = F.relu(self.conv(x))
        if self.divide:
            x = x / 2
        return (self.pool(x), x.mean()) if self.training else (self.pool(x),)


def sequential(*, inplace=True):
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(inplace), nn.LocalResponseNorm(*LRN), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(inplace)),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(inplace), nn.MaxPool2d(2)),
        *(nn.LocalResponseNorm(4), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.MaxPool2d(2, 1)),
    )


def nested():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), Block(), nn.Conv2d(12, 8, 3), nn.ReLU(), nn.MaxPool2d(2), Block()
    )


NETWORKS = {
    "sequential": sequential,
    "functional": Functional,
    "nested": nested,
    "branching": Branching,
    "modes": Modes,
}
STAGES = {"sequential": 5, "functional": 4, "nested": 8, "branching": 3, "modes": 1}


def network(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETWORKS[name]()


def outputs_and_gradients(model, x):
    x = leaf(x)
    y = model(x)
    outputs = y if isinstance(y, tuple) else (y,)
    loss = sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in outputs)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return *(t.detach() for t in outputs), *torch.autograd.grad(loss, [x, *parameters], allow_unused=True)


def assert_same(model, other, x):
    for a, b in zip(outputs_and_gradients(model, x), outputs_and_gradients(other, x), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.fixture(params=NETWORKS)
def pair(request):
    """A network and what optimize made of it."""
    model = network(request.param)
    return model, fastcnn.optimize(model)


X = randn(2, 3, 32, 30, dtype=torch.float64)


def called(model, x=X):
    """The operators of fastcnn that a forward without gradient runs."""
    with torch.no_grad(), recorded_calls() as calls:
        model(x)
    return [name.split(".")[1] for name, _ in calls]


# -- same network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_same_outputs_and_gradients(pair, training, format):
    model, fast = pair
    assert_same(fast.train(training), model.train(training), in_format(X, format))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_stage_is_fused(name):
    fast = fastcnn.optimize(network(name))
    assert len(fast.fastcnn_report.replaced) >= STAGES[name]
    layers = {type(m) for m in fast.modules()}
    assert not layers & {nn.MaxPool2d, nn.LocalResponseNorm}
    if name == "sequential":
        expected = ["relu_lrn_max_pool2d", "conv2d_relu", "relu_lrn_max_pool2d", "lrn", "relu_lrn_max_pool2d"]
        assert called(fast) == expected
    if name == "functional":
        assert called(fast) == ["relu_lrn_max_pool2d", "conv2d_relu", "relu_lrn_max_pool2d", "relu_lrn_max_pool2d"]


def test_modules_keys_and_the_original_stay(pair):
    model, fast = pair
    assert list(dict(fast.named_modules())) == list(dict(model.named_modules()))
    assert list(fast.state_dict()) == list(model.state_dict())
    assert isinstance(fast, type(model))
    assert type(fast).__name__ == type(model).__name__
    assert not called(model)
    assert not hasattr(model, "fastcnn_report")
    fast.load_state_dict({name: -value for name, value in model.state_dict().items()})
    model.load_state_dict(fast.state_dict())
    assert_same(fast, model, X)


def test_in_place():
    model = network("sequential")
    expected = outputs_and_gradients(copy.deepcopy(model), X)
    assert fastcnn.optimize(model, inplace=True) is model
    assert called(model)
    for a, b in zip(outputs_and_gradients(model, X), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_twice_is_once(pair):
    _, fast = pair
    again = fastcnn.optimize(fast)
    assert again.fastcnn_report.replaced
    assert called(again) == called(fast)
    assert_same(again, fast, X)


def test_arguments_of_forward_are_kept():
    model = network("functional")
    fast = fastcnn.optimize(model)
    torch.testing.assert_close(fast(X, 2.0), model(X, scale=2.0))
    torch.testing.assert_close(fast(X, scale=0.5), model(X, 0.5))


def test_a_layer_alone():
    for layer in (nn.MaxPool2d(2), nn.LocalResponseNorm(5)):
        fast = fastcnn.optimize(layer)
        assert len(called(fast)) == 1
        torch.testing.assert_close(fast(X), layer(X))
        assert not called(layer)


# -- what may happen to it later --------------------------------------------------------------------------------------


def hooks_of(layer, seen):
    yield layer.register_forward_hook(lambda m, x, y: seen.append(y.detach().clone()))
    yield layer.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach().clone()))
    yield layer.register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0].clone()))


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("before", [False, True])
def test_hooks_see_what_they_saw(index, before):
    model = sequential(inplace=False)
    seen, expected = [], []
    if before:  # a deep copy takes hooks along
        list(hooks_of(model[index], expected))
        fast = fastcnn.optimize(model)
        outputs_and_gradients(fast, X)
        seen[:], expected[:] = expected, []
    else:
        fast = fastcnn.optimize(model)
        handles = list(hooks_of(fast[index], seen))
        outputs_and_gradients(fast, X)
        for handle in handles:
            handle.remove()
        assert called(fast) == called(fastcnn.optimize(model))
        list(hooks_of(model[index], expected))
    outputs_and_gradients(model, X)
    assert len(seen) == len(expected) == 3
    torch.testing.assert_close(seen, expected)


def test_hooks_on_containers_run():
    fast, seen = fastcnn.optimize(network("nested")), []
    fast[2].register_forward_hook(lambda *_: seen.append("block"))
    fast[2].three.register_forward_hook(lambda *_: seen.append("three"))
    fast(X)
    assert seen == ["three", "block"]


def replace_layer(m):
    m[5] = nn.Tanh()


def append_layer(m):
    m.append(nn.Conv2d(8, 2, 1))


def other_padding(m):
    m[0].padding_mode = "circular"
    m[0]._reversed_padding_repeated_twice = [2, 2, 2, 2]


def other_pool(m):
    m[3].kernel_size, m[3].stride = 2, 1


def other_norm(m):
    m[2].size = 3


@pytest.mark.parametrize("change", [replace_layer, append_layer, other_padding, other_pool, other_norm])
def test_layers_may_be_changed_later(change):
    model = network("sequential")
    fast = fastcnn.optimize(model)
    for m in (model, fast):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            change(m)
    assert_same(fast, model, X)


def test_settings_of_a_forward_may_be_changed_later():
    model = network("modes")
    fast = fastcnn.optimize(model)
    for m in (model, fast):
        m.divide = True
    assert_same(fast, model, X)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_stay_fused(pair, how):
    model, fast = pair
    buffer = io.BytesIO()
    if how == "deepcopy":
        again = copy.deepcopy(fast)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(fast))
    else:
        torch.save(fast, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
    assert called(again) == called(fast)
    assert str(again.fastcnn_report) == str(fast.fastcnn_report)
    assert_same(again, model, X)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    assert_same(fast, model, X)


# -- where it must work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sequential", "functional", "nested", "modes"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(name, dynamic):
    model = network(name)
    torch.compiler.reset()
    compiled = torch.compile(fastcnn.optimize(model), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_same(compiled, model, X)
    assert_same(compiled.eval(), model.eval(), randn(3, 3, 40, 36, dtype=X.dtype))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["sequential", "functional", "nested"])
def test_export(name, strict):
    model = network(name).eval()
    fast = fastcnn.optimize(model)
    exported = torch.export.export(fast, (X,), strict=strict)
    assert [n for n in exported.graph.nodes if "fastcnn" in str(n.target)]
    torch.testing.assert_close(exported.module()(X), model(X))


def test_distributed_data_parallel(tmp_path):
    model = network("nested")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(fastcnn.optimize(model))
        parallel(X).sum().backward()
        model(X).sum().backward()
        for a, b in zip(parallel.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    finally:
        dist.destroy_process_group()


def test_autocast():
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()
    model = nn.Sequential(*layers).float()
    fast = fastcnn.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fast(X.float()), model(X.float())
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def test_functional_call_and_vmap():
    model = network("nested").eval()
    fast = fastcnn.optimize(model)
    parameters = {name: p.detach() * 0.5 for name, p in model.named_parameters()}

    def loss(m, parameters, x):
        return torch.func.functional_call(m, parameters, (x,)).sum()

    ours, theirs = (torch.func.grad(loss, argnums=1)(m, parameters, X) for m in (fast, model))
    for name in parameters:
        torch.testing.assert_close(ours[name], theirs[name])
    stack = randn(3, 2, 3, 20, 20, dtype=X.dtype)
    torch.testing.assert_close(torch.vmap(fast)(stack), torch.stack([model(x) for x in stack]))


def test_single_image_and_other_dtypes():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(5), nn.MaxPool2d(2))
    fast = fastcnn.optimize(model)
    torch.testing.assert_close(fast(X[0]), model(X[0]))
    assert_same(fast.float().double(), model.float().double(), X)
    pool = nn.Sequential(nn.Tanh(), nn.MaxPool2d(2)), torch.arange(64).view(1, 1, 8, 8)
    assert_bitwise(fastcnn.optimize(pool[0][1:])(pool[1]), pool[0][1:](pool[1]))


def test_complex_and_quantized_tensors_run_as_before():
    for kind in (torch.complex64,):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity()).to(kind)
        torch.testing.assert_close(fastcnn.optimize(model)(X.to(kind)), model(X.to(kind)))
    pool = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    q = torch.quantize_per_tensor(X.float(), 0.1, 0, torch.qint8)
    assert_bitwise(fastcnn.optimize(pool)(q).int_repr(), pool(q).int_repr())


def test_parametrized_weights():
    for wrap in (
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.spectral_norm,
    ):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(wrap(nn.Conv2d(3, 8, 3)), nn.ReLU(), nn.MaxPool2d(2)).eval()
        fast = fastcnn.optimize(model)
        assert_same(fast, model, X)
        assert list(fast.state_dict()) == list(model.state_dict())


def test_lazy_layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.MaxPool2d(2))
        fast = fastcnn.optimize(model)
        fast(X)
    assert called(fast) == ["relu_lrn_max_pool2d"]
    model(X)
    model.load_state_dict(fast.state_dict())
    assert_same(fast, model, X)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Conv2d):
    """Has the forward of Conv2d."""


def test_subclasses_with_a_forward_of_their_own_are_left_alone():
    model = nn.Sequential(Scaled(3, 8, 3), nn.ReLU(), Renamed(8, 8, 3), nn.ReLU())
    fast = fastcnn.optimize(model)
    assert_same(fast, model, X)
    assert called(fast) == ["conv2d_relu"]
    (entry,) = fast.fastcnn_report.left
    assert (entry.where, entry.what) == ("0", "Scaled")
    assert "forward of its own" in entry.why_not


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.kept, self.register = nn.Conv2d(3, 8, 3), None, None

    def forward(self, x):
        self.kept = F.relu(self.conv(x))
        return self.kept


class Draws(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.conv, self.draw = nn.Conv2d(3, 8, 3), draw

    def forward(self, x):
        return F.relu(self.conv(x)) * self.draw()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Keeps, "keeps something"),
        (lambda: Draws(random.random), "random numbers"),
        (lambda: Draws(lambda: torch.rand(()).item()), "random numbers"),
        (Branching, "cannot trace"),
    ],
)
def test_forwards_that_a_graph_would_change_are_left_alone(make, reason):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    fast = fastcnn.optimize(model)
    (entry,) = [e for e in fast.fastcnn_report.left if e.what.startswith("forward of")]
    assert reason in entry.why_not
    for m in (model, fast):
        random.seed(3)
        torch.manual_seed(3)
        m.result = m(X)
    torch.testing.assert_close(fast.result, model.result)
    if make is Keeps:
        assert fast.kept is fast.result


@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu_may_overwrite_the_input_of_the_network(inplace):
    model = nn.Sequential(nn.ReLU(inplace), nn.MaxPool2d(2))
    fast = fastcnn.optimize(model)
    ours, theirs = X.clone(), X.clone()
    assert_bitwise(fast(ours), model(theirs))
    assert_bitwise(ours, theirs)
    assert called(fast) == (["max_pool2d"] if inplace else ["relu_lrn_max_pool2d"])


class Twice(nn.Module):
    """What a stage would leave out is used elsewhere too."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x):
        y = self.conv(x)
        z = self.relu(y)
        return y.sum() + z.sum() + self.pool(z).sum()


def test_outputs_used_twice_stay():
    model = Twice()
    fast = fastcnn.optimize(model)
    assert_same(fast, model, X)
    assert called(fast) == ["max_pool2d"]
    assert [e.where for e in fast.fastcnn_report.left] == ["conv"]


def test_nothing_to_replace():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    fast = fastcnn.optimize(model)
    assert type(fast) is nn.Sequential
    assert not fast.fastcnn_report.entries
    assert str(fast.fastcnn_report).startswith("0 replaced, 0 left alone")
    assert_bitwise(fast(X[0, 0, :, :3]), model(X[0, 0, :, :3]))


def test_report_is_a_readable_table():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU()
    )
    text = str(fastcnn.optimize(model).fastcnn_report)
    assert "1 replaced, 1 left alone" in text
    assert "Conv2d -> ReLU" in text
    assert "conv2d_relu" in text
    assert "padding_mode='reflect'" in text


# -- frozen feature extractors ----------------------------------------------------------------------------------------


class PerceptualLoss(nn.Module):
    """As lpips.LPIPS: control flow on arguments, a network called by its forward, normalized features, 1x1 weights."""

    def __init__(self):
        super().__init__()
        conv = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)]
        self.slice1 = nn.Sequential(conv[0], nn.ReLU(True), conv[1], nn.ReLU(True))
        self.slice2 = nn.Sequential(nn.MaxPool2d(2, 2), conv[2], nn.ReLU(True))
        self.lin = nn.ModuleList([nn.Conv2d(8, 1, 1, bias=False), nn.Conv2d(16, 1, 1, bias=False)])
        self.requires_grad_(False)

    def forward(self, a, b, normalize=False):
        if normalize:
            a, b = 2 * a - 1, 2 * b - 1
        loss = 0
        for fa, fb, lin in zip(self.features(a), self.features(b), self.lin, strict=True):
            unit = [f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (fa, fb)]
            loss = loss + lin((unit[0] - unit[1]).square()).mean((2, 3), keepdim=True)
        return loss

    def features(self, x):
        first = self.slice1(x)
        return first, self.slice2(first)


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_frozen_features_as_of_lpips(format):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PerceptualLoss()
    fast = fastcnn.optimize(model)
    target = randn(2, 3, 32, 30, dtype=X.dtype, seed=4)
    saved, grads = [], []
    for m in (model, fast):
        x, kept = leaf(in_format(X, format)), {}

        def keep(t, kept=kept, m=m):
            if t.untyped_storage().data_ptr() not in {p.untyped_storage().data_ptr() for p in m.parameters()}:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = m(x, in_format(target, format), normalize=True).sum()
        grads.append(torch.autograd.grad(loss, x)[0])
        saved.append(kept)
    torch.testing.assert_close(grads[1], grads[0])
    assert sum(saved[1].values()) < sum(saved[0].values())
    assert called(fast.slice1) == ["conv2d_relu", "conv2d_relu"]
    assert all(p.grad is None for p in fast.parameters())


# -- inference --------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Every kind of layer that inference treats."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(True), nn.LocalResponseNorm(*LRN), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.ReLU(True)),
            *(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2), nn.Identity()),
            fastcnn.nn.ConvReLU2d(8, 8, 3, padding=1),
            fastcnn.models.layers.ConvReLULRNMaxPool2d(8, 8, 3, padding="same", lrn=fastcnn.LRNParams(3)),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(), nn.Linear(8 * 3 * 3, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5)
        )

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


@pytest.fixture
def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Classifier().float()


IMAGES = randn(3, 3, 32, 32)


def error(y, exact):
    return ((y.double() - exact).norm() / (exact - exact.mean()).norm()).item()


@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_inference_gives_the_same_outputs(classifier, format, no_grad):
    fast = fastcnn.optimize(classifier, inference=True)
    exact = classifier.eval().double()(IMAGES.double()).detach()
    with no_grad():
        first = fast(in_format(IMAGES, format))
        second = fast(in_format(IMAGES, format))
    assert error(first, exact) < 1e-5
    assert_bitwise(first, second)
    assert first.data_ptr() != second.data_ptr()
    assert not first.requires_grad
    assert list(fast.state_dict()) == list(classifier.state_dict())
    packed = [e.where for e in fast.fastcnn_report.replaced if "packed" in e.now]
    assert len(packed) == 7
    assert [e.now for e in fast.fastcnn_report.replaced].count("nothing") == 3


@pytest.mark.parametrize("batch", [0, 1, 70])
def test_inference_of_any_batch(classifier, batch):
    fast = fastcnn.optimize(classifier, inference=True)
    fast.features[0].padding = 40  # the maps of 70 images are more than are computed at once
    classifier.features[0].padding = 40
    model = nn.Sequential(*classifier.features[:4]).eval()
    x = randn(batch, 3, 160, 160)
    torch.testing.assert_close(fast.features[:4](x), model(x), rtol=1e-4, atol=1e-5)
    again = fastcnn.optimize(model, inference=True)
    first = again(x)
    torch.testing.assert_close(first, model(x), rtol=1e-4, atol=1e-5, check_stride=False)
    assert_bitwise(again(x), first)


class Normalized(nn.Module):
    """Convolutions, and what may follow them, with batch norms."""

    def __init__(self, bias=True, affine=True):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 16, 3, bias=bias), nn.BatchNorm2d(16, affine=affine)
        self.two, self.norm2 = nn.Conv2d(16, 16, 3, groups=2, bias=bias), nn.BatchNorm2d(16, affine=affine)
        self.three, self.norm3 = nn.Conv2d(16, 8, 1, bias=bias), nn.BatchNorm2d(8, affine=affine)
        self.pool = nn.MaxPool2d(2)
        for norm in (self.norm1, self.norm2, self.norm3):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.pool(F.relu(self.norm1(self.one(x))))
        return self.norm3(self.three(F.relu(self.norm2(self.two(x)))))


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(("bias", "affine"), [(True, True), (False, True), (True, False), (False, False)])
def test_inference_with_batch_norm(bias, affine, no_grad):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Normalized(bias, affine).float().eval()
    fast = fastcnn.optimize(model, inference=True)
    assert [e.what for e in fast.fastcnn_report.replaced if "packed" in e.now] == [
        "Conv2d -> BatchNorm2d -> relu -> MaxPool2d",
        "Conv2d -> BatchNorm2d -> relu",
        "Conv2d -> BatchNorm2d",
    ]
    assert list(fast.state_dict()) == list(model.state_dict())

    def check():
        exact = copy.deepcopy(model).double()(IMAGES.double()).detach()
        with no_grad():
            for _ in range(2):
                assert error(fast(IMAGES), exact) < 1e-6

    check()
    for name in [name for name, value in model.state_dict().items() if value.is_floating_point()]:
        with torch.no_grad():
            for m in (fast, model):
                m.state_dict()[name].mul_(1.5)
        check()
        owner, _, attribute = name.rpartition(".")
        new = model.state_dict()[name] * 0.75
        for m in (fast, model):
            setattr(
                m.get_submodule(owner),
                attribute,
                nn.Parameter(new.clone(), False) if "run" not in name else new.clone(),
            )
        check()
    for m in (fast, model):
        m.norm2.eps = 0.5
    check()


def test_batch_norm_that_is_not_part_of_the_weights():
    model = Normalized().float().eval()
    fast, x = fastcnn.optimize(model, inference=True), IMAGES
    seen = []
    fast.norm1.register_forward_hook(lambda *_: seen.append(1))
    assert error(fast(x), model(x).double().detach()) < 1e-5
    assert seen == [1]
    for m in (fast, model):  # not finite together with the weights
        m.norm2.eps = 0.5  # torch 2.11 takes no 0
        m.norm2.running_var[3] = -0.5
    assert_bitwise(fast(x).isnan(), model(x).isnan())
    for m in (fast, model):
        m.norm2.running_var[3] = 1
        m.norm3.train()
    assert error(fast(x), model(x).double().detach()) < 1e-5
    torch.testing.assert_close(fast.norm3.running_mean, model.norm3.running_mean)
    fast.norm3.eval().weight.requires_grad_()
    fast(x).sum().backward()
    assert fast.norm3.weight.grad is not None
    fast = fastcnn.optimize(model.eval(), inference=True)
    fast.two.bias.requires_grad_()
    fast(x).sum().backward()
    assert fast.two.bias.grad is not None
    batchwise = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).float().eval()
    fast = fastcnn.optimize(batchwise, inference=True)
    assert error(fast(x), batchwise(x).double().detach()) < 1e-5


class Branches(nn.Module):
    """Pools and concatenations between convolutions, and a map that is written on the way."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 16, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(24, 8, 1)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(3, 1, [1, 1], dilation=1)
        self.holes = nn.MaxPool2d(2, 2, padding=1, dilation=3)
        self.register_buffer("factor", torch.ones(8, 1, 1))

    def forward(self, x):
        one = self.pool(self.relu(self.one(x)) + 0)
        two = self.pool(self.relu(self.two(x))).mul_(self.factor)
        y = self.relu(self.three(torch.cat(tensors=[one, two], dim=1)))
        return torch.cat((y, torch.concat([y, y], 1)), 1), self.holes(y)


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ident)
def test_inference_of_pools_and_concatenations(dtype, value):
    model = Branches().to(dtype).eval()
    fast = fastcnn.optimize(model, inference=True)
    for m in (fast, model):
        m.factor[3] = value
    for x in (IMAGES.to(dtype), IMAGES[:1].to(dtype)):
        for y, expected in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, equal_nan=True, check_stride=False)
    seen = []
    fast.pool.register_forward_hook(lambda *_: seen.append(1))
    fast(x)
    assert len(seen) == 2
    with pytest.raises(RuntimeError, match="at least 1x1"):
        fast(x[..., :3, :3])


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("batch", [1, 5])
def test_inference_of_spaced_parameters(classifier, batch, no_grad):
    fast, model = fastcnn.optimize(classifier, inference=True), classifier.eval()
    for parameter in fast.parameters():
        parameter.data = embedded(parameter.data, steps=[2] * parameter.dim())
    x = randn(batch, 3, 32, 32)
    with no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(fastcnn.backends.cpu_capability() in ("", "baseline"), reason="needs AVX2")
def test_inference_takes_the_same_way_whatever_the_format(monkeypatch):
    ran = []
    original = _winograd.convolve
    monkeypatch.setattr(_winograd, "convolve", lambda *args, **options: ran.append(1) or original(*args, **options))
    fast = fastcnn.optimize(nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()).float(), inference=True)
    x = randn(2, 16, 20, 20)
    assert_bitwise(fast(x), fast(in_format(x, torch.channels_last)))
    assert len(ran) == 2


class Fused(nn.Module):
    """Linear layers, and all that inference may let follow them."""

    def __init__(self):
        super().__init__()
        self.one, self.relu, self.dropout = nn.Linear(10, 8), nn.ReLU(True), PaperDropout(0.25)
        self.two, self.three, self.four = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.dropout(self.relu(self.one(x)))
        x = F.relu(self.two(x))
        x = self.three(x)
        return x + F.relu(x), self.dropout(self.four(x))


@pytest.mark.parametrize("batch", [1, 5])
def test_inference_of_linear_layers(batch):
    model = Fused().float().eval()
    fast = fastcnn.optimize(model, inference=True)
    assert [(e.where, e.now) for e in fast.fastcnn_report.replaced] == [
        ("one + relu + dropout", "linear, packed"),
        ("two + relu_1", "linear, packed"),
        ("three", "the same, packed"),
        ("four + dropout", "linear, packed"),
    ]
    x = randn(batch, 10)
    for _ in range(2):
        for y, expected in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(y, expected)
        for m in (fast, model):  # is asked for in every call
            m.dropout.p = 0.5
    seen = []
    fast.relu.register_forward_hook(lambda *_: seen.append(1))
    fast.dropout.register_forward_hook(lambda *_: seen.append(1))
    for y, expected in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(y, expected)
    assert len(seen) == 3
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        fast(randn(batch, 9))


def test_inference_in_bfloat16(classifier):
    fast = fastcnn.optimize(classifier, inference=True, dtype=torch.bfloat16)
    exact = classifier.eval().double()(IMAGES.double()).detach()
    y = fast(IMAGES)
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
    rounded = classifier.bfloat16().double()
    for layer in rounded.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda m, x, y: y.bfloat16().double())
    assert error(y, exact) < 2 * error(rounded(IMAGES.bfloat16().double()), exact)


def test_inference_sees_weights_that_change(classifier):
    fast, model = fastcnn.optimize(classifier, inference=True), classifier.eval()
    fast(IMAGES)
    with torch.no_grad():
        for m in (fast, model):
            m.features[0].weight.mul_(-0.5)
            m.classifier[1].weight.add_(0.01)
    torch.testing.assert_close(fast(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    state = {
        name: torch.rand_like(value) / 8 for name, value in model.state_dict().items() if value.is_floating_point()
    }
    for m in (fast, model):
        m.load_state_dict(state, strict=False)
    torch.testing.assert_close(fast(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    for m in (fast, model):
        m.classifier[4].weight = nn.Parameter(torch.ones(5, 32).float() / 32)
    torch.testing.assert_close(fast(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


def test_inference_keeps_nan(classifier):
    fast, x = fastcnn.optimize(classifier, inference=True), IMAGES.clone()
    x[0, 1, 15, 15] = float("nan")
    assert_bitwise(fast(x).isnan(), classifier.eval()(x).isnan())


@pytest.mark.parametrize("asked", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ident)
def test_inference_does_not_rectify_what_no_relu_follows(dtype, asked):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(dtype).eval()
    x = IMAGES.to(dtype, copy=True).requires_grad_(asked)
    y = fastcnn.optimize(model, inference=True)(x)
    assert (model[0](x) < 0).any()
    torch.testing.assert_close(y, model(x), check_stride=False)


def test_inference_of_a_network_made_under_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()).float().eval()
        fast = fastcnn.optimize(model, inference=True)
        torch.testing.assert_close(fast(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5, check_stride=False)


class Overwrites(nn.Module):
    """Writes a map between two convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.register_buffer("factor", torch.ones(16, 1, 1))

    def forward(self, x):
        return F.relu(self.two(F.relu(self.one(x)).mul_(self.factor)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inference_sees_nan_that_appears_on_the_way(value):
    fast = fastcnn.optimize(Overwrites().float(), inference=True)
    assert torch.isfinite(fast(IMAGES)).all()
    fast.factor[3] = value
    fast.two.weight[:, 3] *= 1e20 if value == 1e30 else 1
    expected = F.relu(F.conv2d(F.relu(fast.one(IMAGES)).mul_(fast.factor), fast.two.weight, fast.two.bias))
    assert not torch.isfinite(expected).all()
    assert_bitwise(fast(IMAGES).isnan(), expected.isnan())


def test_inference_with_hooks_training_gradients_and_copies(classifier):
    fast, model = fastcnn.optimize(classifier, inference=True), classifier.eval()
    expected = model(IMAGES)
    seen = []
    for index in (0, 2, 4, 11):
        fast.features[index].register_forward_hook(lambda *_: seen.append(1))
    fast.classifier[1].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(fast(IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 5
    fast = fastcnn.optimize(classifier, inference=True)
    x, y = leaf(IMAGES), leaf(IMAGES)
    ours, theirs = torch.autograd.grad(fast(x).sum(), x), torch.autograd.grad(model(y).sum(), y)
    assert error(ours[0], theirs[0].double()) < 1e-4
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert_bitwise(again(IMAGES), fast(IMAGES))
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), expected, rtol=1e-4, atol=1e-5)
    with torch.random.fork_rng():
        for m in (fast.train(), model.train()):
            torch.manual_seed(0)
            m.result = m(IMAGES)
    torch.testing.assert_close(fast.result, model.result, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"dtype": torch.bfloat16}, ValueError, "inference"),
        ({"inference": True, "dtype": torch.int8}, ValueError, "int8"),
        ({"inference": True, "dtype": "bfloat16"}, TypeError, "dtype"),
        ({"inference": 1}, TypeError, "inference"),
    ],
)
def test_options_of_inference_are_checked(options, error, match):
    with pytest.raises(error, match=match):
        fastcnn.optimize(nn.ReLU(), **options)


@pytest.mark.parametrize("argument", ["model", "inplace"])
def test_arguments_of_another_type_raise(argument):
    arguments = {"model": nn.ReLU(), "inplace": False, argument: "x"}
    with pytest.raises(TypeError, match=argument):
        fastcnn.optimize(arguments["model"], inplace=arguments["inplace"])


@pytest.mark.parametrize(
    "tail", [[], [nn.MaxPool2d(2)], [nn.MaxPool2d(3, 2)], [nn.LocalResponseNorm(5), nn.MaxPool2d(2)]]
)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("use", ["training", "frozen", "inference"])
def test_3x3_convolutions_with_and_without_relu(use, relu, tail):
    """Of sizes at which Winograd's algorithm computes them."""
    torch.manual_seed(0)
    rectify = [nn.ReLU()] if relu else []
    model = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), *rectify, *tail, nn.Conv2d(48, 16, 3), *rectify)
    model = model.float().requires_grad_(use == "training").to(memory_format=torch.channels_last)
    x = randn(2, 32, 28, 30, format=torch.channels_last)
    fast = fastcnn.optimize(model, inference=use == "inference")
    if use == "inference":
        assert error(fast(x), model.double()(x.double())) < 1e-6
        return
    x, exact_x, exact = leaf(x), leaf(x.double()), copy.deepcopy(model).double()
    y, expected = fast(x), exact(exact_x)
    assert error(y, expected) < 1e-6
    wanted = [x, *fast.parameters()] if use == "training" else [x]
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, wanted, dy)
    theirs = torch.autograd.grad(expected, [exact_x, *exact.parameters()][: len(wanted)], dy.double())
    for a, b in zip(ours, theirs, strict=True):
        assert error(a, b) < 1e-4
