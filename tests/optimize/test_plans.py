"""Plans of inference, fastcnn/optimize/plan.py: sums and concatenations in the kernels, and all that may change."""

import copy
import gc
import operator
import pickle
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from promises import assert_bitwise, leaf, randn
from torch import nn

import fastcnn
from fastcnn.ops.cpu import winograd
from fastcnn.optimize import inference, plan

pytestmark = pytest.mark.skipif("cpu" not in fastcnn.backends.available(), reason="needs the C++ library")
NAN, INF = float("nan"), float("inf")
X = randn(2, 16, 20, 18)
WAYS = {"winograd": "_by_winograd", "direct": "_directly", "pointwise": "_directly", "onednn": "_by_onednn"}


@pytest.fixture(autouse=True)
def single(usual, monkeypatch):
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "_PAIRS_OF_A_CHANNEL", 0)  # also with so few channels that it does not pay


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each kernel for convolutions, by name."""
    if request.param == "winograd" and fastcnn.backends.cpu_capability() == "baseline":
        pytest.skip("needs AVX2")
    if request.param == "onednn":
        monkeypatch.setattr(inference, "_SMALL", 0)
        monkeypatch.setattr(inference, "_SMALL_POINTWISE", 0)
    return request.param


@pytest.fixture
def made(monkeypatch):
    """The convolutions that were planned."""
    seen = []
    init = inference.Convolution.__init__
    monkeypatch.setattr(
        inference.Convolution, "__init__", lambda self, *args: (seen.append(self), init(self, *args))[1]
    )
    return seen


@pytest.fixture
def joined(monkeypatch):
    """Runs of convolutions that write into a concatenation: from which channel on."""
    seen = []
    run = inference.Convolution.__call__

    def call(self, *args, **options):
        if options.get("out") is not None:
            seen.append(options["first"])
        return run(self, *args, **options)

    monkeypatch.setattr(inference.Convolution, "__call__", call)
    return seen


@pytest.fixture
def plans(monkeypatch):
    """One for each call after which a plan was made."""
    seen = []
    run = plan._FirstRun.run
    monkeypatch.setattr(plan._FirstRun, "run", lambda self, *args: (seen.append(1), run(self, *args))[1])
    return seen


def conv(way, channels=16, outputs=16, **options):
    """A layer that this kernel computes."""
    window = {"winograd": 3, "pointwise": 1}.get(way, 7)
    return nn.Conv2d(channels, outputs, window, padding=window // 2, **options)


def prepared(model):
    """A model in evaluation mode, with batch norms that do something, and what optimize makes of it."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    model.eval().requires_grad_(False)
    return model, fastcnn.optimize(model, inference=True)


def assert_same(y, expected, tolerance=1e-5):
    y, expected = ((t,) if isinstance(t, torch.Tensor) else t for t in (y, expected))
    for a, b in zip(y, expected, strict=True):
        assert a.shape == b.shape
        assert a.stride() == b.stride()
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


def assert_same_gradients(fast, model):
    """Of the input, whatever its strides."""
    x, y = leaf(X), leaf(X)
    (ours,), (theirs,) = torch.autograd.grad(fast(x).sum(), x), torch.autograd.grad(model(y).sum(), y)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def check(fast, model, *inputs, calls=3, tolerance=1e-5):
    """Calls with different values, the first of which makes the plan; also what the caller sees of the inputs."""
    for x in inputs or (X,):
        for i in range(calls):
            ours, theirs = x + i, x + i
            assert_same(fast(ours), model(theirs), tolerance)
            assert_same(ours, theirs, tolerance)


def sums_in_stages(fast):
    return sum("add" in entry.what for entry in fast.fastcnn_report.replaced)


# -- sums -------------------------------------------------------------------------------------------------------------

# How a convolution's output and another map are added, and whether that is part of the convolution.
SUMS = {
    "y + x": (lambda y, x: y + x, True),
    "x + y": (lambda y, x: x + y, True),
    "y += x": (lambda y, x: operator.iadd(y, x), True),
    "torch.add(y, x)": (lambda y, x: torch.add(y, x), True),
    "torch.add(x, y)": (lambda y, x: torch.add(x, y), True),
    "y.add(x)": (lambda y, x: y.add(x), True),
    "y.add_(x)": (lambda y, x: y.add_(x), True),
    "alpha=1": (lambda y, x: torch.add(y, x, alpha=1), True),
    "alpha=2": (lambda y, x: torch.add(y, x, alpha=2), False),
    "y.add_(x, alpha=2)": (lambda y, x: y.add_(x, alpha=2), False),
    "x.add_(y)": (lambda y, x: x.add_(y), False),
    "broadcast": (lambda y, x: y + x.mean((2, 3), keepdim=True), False),
    "of an image": (lambda y, x: y + x[:1], False),
    "number": (lambda y, x: y + 0.5, False),
    "itself": (lambda y, x: y + y, False),
    "difference": (lambda y, x: y - x, False),
    "double": (lambda y, x: (y + x.double()).float(), False),
}


class Residual(nn.Module):
    def __init__(self, way, add, *, norm=True, relu=True):
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(16, 16, 1), conv(way, bias=not norm), nn.Identity()
        if norm:
            self.norm = nn.BatchNorm2d(16)
        self.add, self.relu = add, relu

    def forward(self, x):
        x = F.relu(self.first(x))
        y = self.add(self.norm(self.second(x)), x)
        return F.relu(y) if self.relu else y


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("relu", [False, True])
def test_sums(way, made, relu, name):
    add, is_fused = SUMS[name]
    model, fast = prepared(Residual(way, add, relu=relu))
    check(fast, model)
    assert made[-1].run.__name__ == WAYS[way]
    assert sums_in_stages(fast) == is_fused


class Written(nn.Module):
    """Adds in place to the network's input, and to what is read again."""

    def __init__(self, way, add, *, new=False):
        super().__init__()
        self.conv, self.add, self.new = conv(way), add, new

    def forward(self, x):
        if self.new:
            x = x.sigmoid()
        y = self.add(x, self.conv(x))
        return F.relu(y), x * 2


IN_PLACE = {
    "x += y": lambda x, y: operator.iadd(x, y),
    "x.add_(y)": lambda x, y: x.add_(y),
    "x[:] = x + y": lambda x, y: x.copy_(x + y),
    "view": lambda x, y: x[:, :].add_(y),
}


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("new", [False, True])
def test_a_sum_that_writes_what_others_see(way, new, name):
    model, fast = prepared(Written(way, IN_PLACE[name], new=new))
    check(fast, model)
    x = X.clone()
    assert x.equal(X)
    fast(x)
    assert x.equal(X) == new


class Downsampled(nn.Module):
    """As in ResNet: either branch may come first."""

    def __init__(self, way, first, add):
        super().__init__()
        self.first, self.add = first, add
        self.conv1, self.norm1 = conv(way, 16, 32, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = conv(way, 32, 32, bias=False), nn.BatchNorm2d(32)
        self.down, self.relu = nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)), nn.ReLU(True)

    def forward(self, x):
        if self.first == "down":
            identity = self.down(x)
            y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        else:
            y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
            identity = self.down(x)
        return self.relu(self.add(y, identity))


@pytest.mark.parametrize("first", ["down", "main"])
@pytest.mark.parametrize("name", ["y += x", "x + y", "x.add_(y)"])
def test_a_sum_of_two_convolutions(way, name, first):
    model, fast = prepared(Downsampled(way, first, SUMS[name][0]))
    check(fast, model)
    assert sums_in_stages(fast) == 1


class Chain(nn.Module):
    """Sums one after the other, whose addends are read again later."""

    def __init__(self, way):
        super().__init__()
        self.convs, self.relu = nn.ModuleList(conv(way) for _ in range(4)), nn.ReLU(inplace=True)

    def forward(self, x):
        a = self.relu(self.convs[0](x))
        b = self.relu(self.convs[1](a) + a)
        c = self.convs[2](b) + a + b
        d = self.relu(self.convs[3](self.relu(c)) + x)
        return a.mean((2, 3)), c, d + b


def test_addends_that_are_read_again(way):
    model, fast = prepared(Chain(way))
    check(fast, model)
    assert sums_in_stages(fast) == 3


@pytest.mark.parametrize("pool", [(2,), (3, 2), None], ids=str)
@pytest.mark.parametrize("lrn", [False, True])
def test_what_follows_a_sum(way, lrn, pool):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(way)

        def forward(self, x):
            y = F.relu(self.conv(x) + x)
            y = F.local_response_norm(y, 5, 1.0) if lrn else y
            return F.max_pool2d(y, *pool) if pool else y

    model, fast = prepared(Pooled())
    check(fast, model)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("strange", ["expanded", "sliced", "transposed"])
def test_addends_of_any_strides(way, strange, format):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(way)

        def forward(self, x, other):
            return F.relu(self.conv(x) + other)

    model, fast = prepared(Sum())
    for i in range(3):
        x = (X + i).contiguous(memory_format=format)
        other = {
            "expanded": lambda x: x[:1].expand(x.shape),
            "sliced": lambda x: torch.cat([x, x], 3)[..., ::2],
            "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        }[strange](x)
        assert_same(fast(x, other), model(x, other))
        assert_same(fast(x, x), model(x, x))


# -- concatenations ---------------------------------------------------------------------------------------------------

# What is made of an input and of branches that are convolution -> ReLU, and how many convolutions write into a
# concatenation; d and e are a convolution without ReLU, and one with a pool after it.
CATS = {
    "two": (lambda x, a, b, c, d, e: torch.cat([a, b], 1), 2),
    "three": (lambda x, a, b, c, d, e: torch.cat((a, b, c), 1), 3),
    "four": (lambda x, a, b, c, d, e: torch.cat([c, a, d, b], dim=1), 4),
    "concat": (lambda x, a, b, c, d, e: torch.concat([d, b], -3), 2),
    "negative": (lambda x, a, b, c, d, e: torch.cat([a, b], dim=-3), 2),
    "tensors=": (lambda x, a, b, c, d, e: torch.cat(tensors=[a, b], dim=1), 0),
    "twice": (lambda x, a, b, c, d, e: torch.cat([a, b, a], 1), 0),
    "returned": (lambda x, a, b, c, d, e: (torch.cat([a, b], 1), a), 0),
    "two cats": (lambda x, a, b, c, d, e: (torch.cat([a, b], 1), torch.cat([b, c], 1)), 0),
    "two cats apart": (lambda x, a, b, c, d, e: (torch.cat([a, d], 1), torch.cat([b, c], 1)), 4),
    "input": (lambda x, a, b, c, d, e: torch.cat([x, a], 1), 0),
    "pooled": (lambda x, a, b, c, d, e: F.max_pool2d(torch.cat([a, b], 1), 3, 2), 2),
    "of a pool": (lambda x, a, b, c, d, e: torch.cat([e, a], 1), 0),
    "lrn": (lambda x, a, b, c, d, e: F.local_response_norm(torch.cat([a, b], 1), 5, 1.0), 2),
    "relu": (lambda x, a, b, c, d, e: torch.cat([d, b], 1).relu_(), 2),
    "written": (lambda x, a, b, c, d, e: torch.cat([a, b], 1).mul_(2.0), 2),
    "part written": (lambda x, a, b, c, d, e: torch.cat([a.mul_(2.0), b], 1), 0),
    "view of a part": (lambda x, a, b, c, d, e: torch.cat([a[:, :5], b], 1), 0),
    "nested": (lambda x, a, b, c, d, e: torch.cat([torch.cat([a, b], 1), c], 1), 2),
    "nested last": (lambda x, a, b, c, d, e: torch.cat([c, torch.cat([a, b], 1)], 1), 2),
    "returned twice": (lambda x, a, b, c, d, e: (lambda y: (y, y))(torch.cat([a, b], 1)), 2),
    "split": (lambda x, a, b, c, d, e: torch.cat([a, b], 1).split(16, 1), 2),
    "sum": (lambda x, a, b, c, d, e: torch.cat([a, c], 1) + torch.cat([d, e], 1), 2),
    "images": (lambda x, a, b, c, d, e: torch.cat([a, a * 2]), 0),
    "dim=0": (lambda x, a, b, c, d, e: torch.cat([c, d], 0), 0),
    "dim=2": (lambda x, a, b, c, d, e: torch.cat([c, d], 2), 0),
    "dim=-1": (lambda x, a, b, c, d, e: torch.cat([c, d], -1), 0),
    "dim=-4": (lambda x, a, b, c, d, e: torch.cat([c, d], -4), 0),
}


class Branches(nn.Module):
    def __init__(self, way, use):
        super().__init__()
        self.a, self.b, self.c = conv(way, 16, 16), conv(way, 16, 32), conv(way, 16, 48)
        self.d, self.e, self.use = conv(way, 16, 48), conv(way, 16, 16), use

    def forward(self, x):
        x = x.sigmoid()
        e = F.max_pool2d(F.relu(self.e(x)), 3, 1, 1)
        return self.use(x, F.relu(self.a(x)), F.relu(self.b(x)), F.relu(self.c(x)), self.d(x), e)


@pytest.mark.parametrize("name", CATS)
def test_concatenations(way, made, joined, name):
    use, expected = CATS[name]
    model, fast = prepared(Branches(way, use))
    check(fast, model)
    assert made
    assert {c.run.__name__ for c in made if c.tail is None} == {WAYS[way]}
    joined.clear()
    fast(X)
    assert len(joined) == expected


@pytest.mark.parametrize("name", ["four", "nested last"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_concatenations_of_what_is_not_finite(way, name, value):
    model, fast = prepared(Branches(way, CATS[name][0]))
    check(fast, model)
    for where in ((0, 3, 5, 7), (1, 15, 19, 17)):
        x = X.clone()
        x[where] = value  # a sigmoid makes 1 of infinity
        y, expected = ([t] if isinstance(t, torch.Tensor) else t for t in (fast(x), model(x)))
        for ours, theirs in zip(y, expected, strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


class Mixed(nn.Module):
    """As in InceptionV1: branches of different depths; a sum that is a part; a dense block."""

    def __init__(self, way):
        super().__init__()
        self.one, self.reduce, self.three = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), conv(way, 16, 32)
        self.pooled, self.residual = nn.Conv2d(16, 5, 1), conv(way)
        self.dense = nn.ModuleList(conv(way, 69 + 16 * i, 16) for i in range(3))

    def forward(self, x):
        one, three = F.relu(self.one(x)), F.relu(self.three(F.relu(self.reduce(x))))
        y = torch.cat([one, three, F.relu(self.pooled(F.max_pool2d(x, 3, 1, 1))), F.relu(self.residual(x) + x)], 1)
        parts = [y]
        for layer in self.dense:
            parts.append(F.relu(layer(torch.cat(parts, 1))))
        return torch.cat(parts, 1)


def test_parts_of_every_kind(way, joined):
    model, fast = prepared(Mixed(way))
    check(fast, model, X, X[:1])
    joined.clear()
    fast(X)
    assert sorted(joined) == [0, 16, 48, 53]


# -- memory -----------------------------------------------------------------------------------------------------------


def storages(*tensors):
    return [t.untyped_storage().data_ptr() for t in tensors]


@pytest.mark.parametrize("name", ["returned", "nested", "two cats apart"])
@pytest.mark.parametrize("size", [18, 70])
def test_outputs_belong_to_the_caller(way, size, name):
    """Also large ones, whose memory is used again."""
    torch.use_deterministic_algorithms(False)
    model, fast = prepared(Branches(way, CATS[name][0]))
    x = randn(2, 16, size, size)
    fast(x)
    found = []
    for i in range(5):
        y = fast(x + i)
        y = [y] if isinstance(y, torch.Tensor) else y
        found += [(t, t.clone()) for t in y]
        assert_same(tuple(y), (lambda y: (y,) if isinstance(y, torch.Tensor) else tuple(y))(model(x + i)))
    assert len({*storages(*(t for t, _ in found), x)}) == len(found) + 1
    for y, copied in found:
        assert_bitwise(y, copied)


@pytest.mark.parametrize("model", [nn.Identity(), nn.Sequential(nn.Dropout()), nn.ReLU(inplace=True)], ids=repr)
def test_outputs_alias_what_those_of_torch_alias(model):
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.layer = nn.Conv2d(16, 16, 3), model

        def forward(self, x):
            y = F.relu(self.conv(x))
            return self.layer(x), y, y.detach(), y[:, :3]

    plain, fast = prepared(Beside())
    for i in range(3):
        ours, theirs = X + i, X + i
        y, expected = fast(ours), plain(theirs)
        for a, b in ((storages(ours, *y), storages(theirs, *expected)),):
            assert [[p == q for q in a] for p in a] == [[p == q for q in b] for p in b]
        for a, b in zip(y, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- weights that change ----------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Every kind of weight that a plan holds."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = conv("winograd"), conv("direct", bias=False), nn.BatchNorm2d(16)
        self.three, self.four, self.fc = nn.Conv2d(16, 8, 1), conv("winograd"), nn.Linear(24, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.two(F.relu(self.one(x)))) + x)
        return self.fc(torch.cat([F.relu(self.three(x)), F.relu(self.four(x))], 1).mean((2, 3)))


@torch.no_grad()
def write(m):
    for p in m.parameters():
        p.mul_(0.5)


@torch.no_grad()
def write_one_bias(m):
    m.three.bias.add_(1)


def step(m):
    optimizer = torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)
    for p in m.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def load(m):
    m.load_state_dict({name: value * 0.5 for name, value in m.state_dict().items()})


def load_others(m):
    m.load_state_dict({name: value * 0.5 for name, value in m.state_dict().items()}, assign=True)


def replace(m):
    m.one.weight = nn.Parameter(m.one.weight * 0.5, requires_grad=False)
    m.fc.bias = nn.Parameter(m.fc.bias + 1, requires_grad=False)


def other_data(m):
    for p in m.parameters():
        p.data = p.data * 0.5


def write_data(m):
    for p in m.parameters():
        p.data.mul_(0.5)
    fastcnn.refresh(m)


def ask_for_gradients(m):
    m.requires_grad_()


def ask_and_write(m):
    m.requires_grad_()
    write(m)
    m.requires_grad_(False)


def statistics(m):
    m.norm.running_mean.add_(1)
    m.norm.running_var.mul_(2)


def other_statistics(m):
    m.norm.running_mean = m.norm.running_mean + 1


def eps(m):
    m.norm.eps = 0.5


def not_finite(m):
    m.one.weight[3, 2, 1, 1] = NAN


def other_format(m):
    m.to(memory_format=torch.channels_last)
    write(m)


CHANGES = [
    *(write, write_one_bias, step, load, load_others, replace, other_data, write_data, ask_for_gradients),
    *(ask_and_write, statistics, other_statistics, eps, not_finite, other_format),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_next_calls_see_the_new_weights(no_grad, change):
    model, fast = prepared(Network())
    with no_grad():
        check(fast, model)
    old = model(X)
    for _ in range(2):
        for m in (model, fast):
            change(m)
        with no_grad():
            for i in range(4):
                y, expected = fast(X + i), model(X + i)
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
                assert y.requires_grad == expected.requires_grad
    if change is not ask_for_gradients:
        assert not torch.allclose(model(X), old)


def test_weights_that_change_in_every_call(plans):
    """Then planning would take longer than it saves."""
    model, fast = prepared(Network())
    for i in range(10):
        assert_same(fast(X + i), model(X + i))
        write_one_bias(model)
        write_one_bias(fast)
    assert len(plans) <= 2
    check(fast, model)
    assert 1 <= len(plans) <= 3


class Tied(nn.Module):
    """Weights that are also used elsewhere."""

    def __init__(self, way, batch_norm):
        super().__init__()
        self.conv, self.norm = conv(way, bias=False), nn.BatchNorm2d(16) if batch_norm else nn.Identity()
        self.fc = nn.Linear(16, 16, bias=False)

    def forward(self, x):
        y = F.relu(self.norm(self.conv(x)))
        back = F.conv_transpose2d(y, self.conv.weight, padding=self.conv.padding)
        z = F.linear(back.mean((2, 3)), self.fc.weight)
        return back, z @ self.fc.weight, self.conv.weight.square().sum()


class Computed(nn.Module):
    """A weight that is made anew in each call."""

    def __init__(self, way, layer):
        super().__init__()
        self.conv, self.fc, self.layer = conv(way), nn.Linear(16, 16), layer
        self.scale = nn.Parameter(torch.ones(16, 1, 1, 1))

    def forward(self, x):
        if self.layer == "linear":
            return F.relu(F.linear(x.mean((2, 3)), self.fc.weight * self.scale.flatten(), self.fc.bias))
        weight, bias = self.conv.weight, self.conv.bias
        if self.layer == "weight":
            weight = weight * self.scale
        if self.layer == "bias":
            bias = bias * self.scale.flatten()
        if self.layer == "input":
            weight = weight * x.mean()
        if self.layer == "norm":
            y = F.conv2d(x, weight, bias, padding=self.conv.padding)
            return F.relu(F.batch_norm(y, self.scale.flatten() * 0.5, self.scale.flatten() * 2))
        return F.relu(F.conv2d(x, weight, bias, padding=self.conv.padding))


@torch.no_grad()
def scale(m):
    for name in ("conv.weight", "fc.weight", "scale"):
        if name in dict(m.named_parameters()):
            m.get_parameter(name).mul_(0.5)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_weights_that_are_used_elsewhere_too(way, batch_norm):
    model, fast = prepared(Tied(way, batch_norm))
    check(fast, model)
    for _ in range(2):
        scale(model)
        scale(fast)
        check(fast, model)


@pytest.mark.parametrize("layer", ["weight", "bias", "input", "norm", "linear"])
def test_weights_that_are_computed(way, layer):
    model, fast = prepared(Computed(way, layer))
    check(fast, model)
    with torch.no_grad():
        for m in (model, fast):  # nothing but what the weight is computed from
            m.scale.mul_(0.5)
    check(fast, model)


def test_weights_that_are_arguments(way):
    class Given(nn.Module):
        def forward(self, x, weight, bias):
            return F.relu(F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2))

    model, layer = Given(), conv(way).requires_grad_(False)
    fast = fastcnn.optimize(model, inference=True)
    for i in range(6):
        if i % 2:
            layer.weight.mul_(-0.5)
        args = layer.weight if i < 3 else layer.weight.clone(), layer.bias + i
        assert_same(fast(X, *args), model(X, *args))
    weight, bias = leaf(layer.weight), leaf(layer.bias)
    for m in (fast, model):
        m(X, weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad / 2, torch.autograd.grad(model(X, weight, bias).sum(), weight)[0])


@pytest.mark.parametrize(
    "parametrization", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_parametrized_weights(way, parametrization):
    layer = parametrization(conv(way))
    model, fast = prepared(nn.Sequential(layer, nn.ReLU()))
    check(fast, model)
    with torch.no_grad():
        for m in (model, fast):
            for name, p in m.named_parameters():
                if "bias" not in name:
                    p[:8] *= -2
    check(fast, model)


# -- kinds of calls ---------------------------------------------------------------------------------------------------


(MOST,) = (name for name in vars(plan) if name.endswith("_PLANS"))


def test_plans_of_many_shapes_are_bounded(monkeypatch, made):
    monkeypatch.setattr(plan, MOST, 16)
    model, fast = prepared(Network())
    for i in range(100):
        x = X[:, :, : 3 + i % 17, : 3 + i % 13] + i
        assert_same(fast(x), model(x))
    refs = [*map(weakref.ref, made)]
    made.clear()
    gc.collect()
    assert len(refs) >= 4 * 90
    assert sum(ref() is not None for ref in refs) <= 4 * 16 * 3


def test_plans_are_used(plans):
    model, fast = prepared(Network())
    for _ in range(2):
        for shape in ((2, 20, 18), (1, 20, 18), (1, 9, 18)):
            x = X[: shape[0], :, : shape[1], : shape[2]]
            for y in (x, x.contiguous(), x.contiguous(memory_format=torch.channels_last)):
                assert_same(fast(y), model(y))
    assert len(plans) <= 10


@pytest.mark.parametrize("most", [1, 64])
def test_threads_with_different_shapes(monkeypatch, most):
    """Also where each forgets the other's plan."""
    monkeypatch.setattr(plan, MOST, most)
    model, fast = prepared(Network())
    errors, expected = [], {}
    inputs = [X[:1], X[:, :, :9, :7].contiguous(), X[:, :, :12]]
    for x in inputs:
        fast(x)
        expected[x.shape] = model(x)

    def run(x):
        try:
            for _ in range(150):
                assert_same(fast(x), expected[x.shape])
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(x,)) for x in inputs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors, repr(errors[0])


def test_the_number_of_threads_may_change(threads):
    model, fast = prepared(Network())
    for number in (1, 2, 3, 1, 2):
        threads(number)
        check(fast, model, calls=2)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["input", "weight", "bias", "statistics"])
def test_what_is_not_finite(way, where, value):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(way), nn.BatchNorm2d(16)

        def forward(self, x):
            y = F.relu(self.norm(self.conv(x)))
            return F.relu(self.conv(x) + x), y

    model, fast = prepared(Sum())
    check(fast, model)
    x = X.clone()
    for m in (model, fast):
        if where == "input":
            x[1, 3, 4, 5] = value
        elif where == "weight":
            m.conv.weight[3, 2, 0, 0] = value
        elif where == "bias":
            m.conv.bias[3] = value
        else:
            m.norm.running_mean[3] = value
    for _ in range(3):
        for ours, theirs in zip(fast(x), model(x), strict=True):
            assert_bitwise(ours.isnan(), theirs.isnan())
            torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_surroundings_that_change():
    """Each call of those before is planned, and each of these is not like them."""
    model, fast = prepared(Network())
    check(fast, model)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(fast(X), model(X), 0.05)
            assert fast(X).dtype == model(X).dtype
        check(fast, model)
        with fastcnn.backends.use("reference"):
            check(fast, model)
        with torch.backends.mkldnn.flags(enabled=False):
            check(fast, model)
        with torch.inference_mode():
            check(fast, model)
            check(fast, model, X.clone())
        with torch.no_grad():
            check(fast, model)
        torch.use_deterministic_algorithms(False)
        check(fast, model)
        torch.use_deterministic_algorithms(True)
        check(fast, model)


def test_plans_made_without_onednn_and_under_inference_mode():
    for first in (torch.inference_mode, lambda: torch.backends.mkldnn.flags(enabled=False), torch.no_grad):
        model, fast = prepared(Network())
        with first():
            check(fast, model)
        check(fast, model)
        assert_same_gradients(fast, model)


def test_gradients_of_inputs_between_planned_calls():
    model, fast = prepared(Network())
    for _ in range(3):
        check(fast, model)
        assert_same_gradients(fast, model)
        with torch.no_grad():
            assert not fast(X).requires_grad
        for m in (model, fast):
            m.one.weight.requires_grad_()
            m.one.weight.grad = None
            m(X).sum().backward()
        assert_same(fast.one.weight.grad, model.one.weight.grad, 1e-4)
        for m in (model, fast):
            m.one.weight.requires_grad_(False)


# -- copies and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_have_plans_of_their_own(again):
    model, fast = prepared(Network())
    check(fast, model)
    other, plain = again(fast), copy.deepcopy(model)
    check(other, plain)
    for m in (other, plain):
        write(m)
    check(other, plain)
    check(fast, model)
    check(again(fast), model)


def test_a_model_is_freed_with_its_plans_and_packed_weights(made):
    model, fast = prepared(Network())
    check(fast, model)
    refs = [*map(weakref.ref, (fast, *fast.parameters(), *made, *(c.packed for c in made)))]
    assert len(made) >= 4
    made.clear()
    del fast
    gc.collect()
    assert not [ref() for ref in refs if ref() is not None]


def test_packed_weights_are_freed_when_weights_change(made):
    model, fast = prepared(Network())
    check(fast, model)
    packed = [weakref.ref(c.packed) for c in made]
    made.clear()
    for m in (model, fast):
        write(m)
    check(fast, model)
    gc.collect()
    assert not [ref() for ref in packed if ref() is not None]


@pytest.mark.parametrize("kind", ["residual", "cat"])
def test_bfloat16(kind):
    torch.manual_seed(0)
    if kind == "residual":
        model, _ = prepared(Downsampled("winograd", "down", operator.iadd))
    else:
        model, _ = prepared(Branches("winograd", CATS["four"][0]))
    fast = fastcnn.optimize(model, inference=True, dtype=torch.bfloat16)
    for i in range(3):
        y, expected = fast(X + i), model(X + i)
        assert y.dtype == torch.bfloat16
        assert ((y.float() - expected).norm() / expected.norm()).item() < 0.02
