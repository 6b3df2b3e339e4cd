"""optimize(inference=True): packed weights, batch norm in them, channels_last inside."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from promises import FORMATS, assert_bitwise, embedded, ident, in_format, leaf, randn
from torch import nn

import fastcnn
from fastcnn.models.layers import PaperDropout
from fastcnn.ops.packed import unchanged

from .networks import LRN


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
    assert first.stride() == classifier.double()(in_format(IMAGES.double(), format)).stride()


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
    fast = fastcnn.optimize(model, inference=True, example_inputs=[IMAGES])
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
    with pytest.raises(RuntimeError, match="Output size is too small"):
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
def test_inference_takes_the_same_way_whatever_the_format():
    fast = fastcnn.optimize(nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU()).float(), inference=True)
    x = randn(2, 32, 20, 20)
    assert_bitwise(fast(x), fast(in_format(x, torch.channels_last)))
    assert "winograd" in unchanged(fast[0].weight).made


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
    fast = fastcnn.optimize(model, inference=True, example_inputs=[randn(2, 10)])
    assert [(e.where, e.now) for e in fast.fastcnn_report.replaced] == [
        ("one + relu + dropout", "linear, packed"),
        ("two + relu_1", "linear, packed"),
        ("three", "linear, packed"),
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


def test_inputs_are_cast_in_front_of_every_layer_with_weights():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3).float(), nn.Linear(8, 4).float()

        def forward(self, x):
            x = F.relu(self.conv(x / torch.full((), 255.0, dtype=torch.float32)))
            return self.fc(x.float().mean((2, 3)))

    model, x = Scales(), torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8)
    y = fastcnn.optimize(model, inference=True, dtype=torch.bfloat16)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=0.02, atol=0.02)


def test_refresh_after_writes_that_torch_cannot_see(classifier):
    fast, model = fastcnn.optimize(classifier, inference=True), classifier.eval()
    fast(IMAGES)
    for m in (fast, model):
        for parameter in m.parameters():
            parameter.data.mul_(0.5)
    fastcnn.refresh(fast)
    torch.testing.assert_close(fast(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


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
