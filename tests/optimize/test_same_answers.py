"""optimize() changes no answer: outputs, gradients, side effects, hooks, whatever a forward does and is done to it."""

import collections
import contextlib
import copy
import functools
import io
import itertools
import os
import pickle
import random
import threading
import time
import warnings

import numpy
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from promises import FORMATS, assert_bitwise, ident, in_format, leaf
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastcnn

from .networks import NETWORKS, X, assert_same, called, network, outputs_and_gradients, sequential

OPTIONS = [{}, {"inference": True}]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_outputs_and_gradients(pair, training, format):
    model, fast = pair
    assert_same(fast.train(training), model.train(training), in_format(X, format))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("weights", FORMATS, ids=ident)
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_strides(format, weights, inference):
    """Of every prefix of a network, for dense inputs and others: the caller, or a view of it, may look at them."""
    model = sequential(inplace=False).to(memory_format=weights).eval()
    for length in (1, 2, 6, len(model)):
        part = model[:length]
        fast = fastcnn.optimize(part, inference=inference)
        for x in (in_format(X, format), in_format(X, format)[:, :, 1:, 2:]):
            y, expected = fast(x), part(x)
            torch.testing.assert_close(y, expected)
            assert y.stride() == expected.stride()


class Viewed(nn.Module):
    """As networks of AlexNet's time are written: layers called in several places, ``view`` after any of them."""

    def __init__(self, convolutions=2):
        super().__init__()
        sizes = [3, *[8] * convolutions]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes))
        self.act, self.norm = nn.ReLU(inplace=True), nn.LocalResponseNorm(5, k=2.0)
        self.pool, self.drop = nn.MaxPool2d(3, 2), nn.Dropout()
        self.fc = nn.LazyLinear(5)

    def forward(self, x):
        flat = []
        for convolution in self.convolutions:
            x = self.act(convolution(x))
            flat.append(x.view(x.size(0), -1).mean(1))
            x = self.pool(self.norm(x))
            flat.append(x.view(-1, x.size(1) * x.size(2) * x.size(3)).mean(1))
        return self.fc(self.drop(self.act(x.view(x.size(0), -1)))), *flat


@pytest.mark.parametrize("options", OPTIONS)
def test_views_after_any_layer(options):
    model = Viewed().eval()
    model(X)
    fast = fastcnn.optimize(model, **options)
    for x in (X, X[:1], X.flip(2)):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-6, atol=1e-9)
    assert len(fast.fastcnn_report.replaced) >= 2


class BatchNormAfterReLU(nn.Module):
    """Batch norm after ReLU, ``padding="same"``, and a global pool in front of ``view``."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 5, 2), nn.ReLU())
        self.two = nn.Sequential(nn.BatchNorm2d(8), nn.MaxPool2d(3, 2), nn.Conv2d(8, 8, 3, 1, "same"), nn.ReLU())
        self.three = nn.Sequential(nn.Conv2d(8, 6, (2, 4), 1, "same"), nn.ReLU())
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4)

    def forward(self, x):
        x = self.pool(self.three(self.two(self.one(x))))
        return self.fc(x.view(x.size(0), -1))


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_after_relu(training):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")
        model = BatchNormAfterReLU().train(training)
        fast = fastcnn.optimize(model)
        assert_same(fast, model, X)
        torch.testing.assert_close(fast.state_dict(), model.state_dict())
        fast = fastcnn.optimize(model, inference=True)
        torch.testing.assert_close(fast(X), model.eval()(X))


@pytest.mark.parametrize("training", [False, True])
def test_a_relu_after_dropout_may_write_the_input(training):
    """In evaluation mode dropout returns what it gets."""

    class Writes(nn.Module):
        def forward(self, x):
            return F.max_pool2d(F.relu(F.dropout(x, 0.5, self.training), inplace=True), 2)

    found = []
    for model in (Writes(), fastcnn.optimize(Writes())):
        torch.manual_seed(0)
        x = X.clone()
        found.append((model.train(training)(x), x))
    torch.testing.assert_close(found[1], found[0])


class Mutates(nn.Module):
    """Writes what a stage has read, or what it returned."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.pool, self.lrn = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.MaxPool2d(2),
            nn.LocalResponseNorm(3),
        )
        self.way = way

    def forward(self, x):
        x = self.norm(self.conv(x))
        if self.way == "input":
            y = self.pool(F.relu(x))
            x.mul_(2)
            return y + x.mean()
        if self.way == "input of lrn":
            y = self.pool(self.lrn(F.relu(x)))
            x.mul_(2)
            return y + x.mean()
        if self.way == "pooled":
            return self.pool(F.relu(x)).mul_(2)
        return self.lrn(F.relu(x)).mul_(2)


@pytest.mark.parametrize("way", ["input", "input of lrn", "pooled", "normalized"])
def test_what_backward_needs_may_be_written_where_torch_does_not_need_it(way):
    model = Mutates(way).eval()
    fast = fastcnn.optimize(model)
    assert_same(fast, model, X)
    assert fast.fastcnn_report.replaced


# -- what a forward does ----------------------------------------------------------------------------------------------

COUNTER, OUTSIDE, KEY = itertools.count(), {"value": 1.0}, "FASTCNN_TEST_KEY"


def counts_calls(m, x):
    OUTSIDE["calls"] = OUTSIDE.get("calls", 0) + 1
    return float(OUTSIDE["calls"])


def counts_calls_of_class(m, x):
    type(m).calls = getattr(type(m), "calls", 0) + 1
    return float(type(m).calls)


def keeps(m, x):
    m.last = x.mean()
    return m.last


def counts(m, x):
    m.state += 1
    return float(m.state)


def appends(m, x):
    m.state = [*m.state, x.mean()] if isinstance(m.state, list) else [x.mean()]
    return float(len(m.state))


def writes_buffer(m, x):
    m.buffer.add_(x.mean())
    return m.buffer


def replaces_buffer(m, x):
    m.buffer = m.buffer + 1
    return m.buffer


def takes_from_iterator(m, x):
    m.state = m.state if m.state else iter(range(100))
    return float(next(m.state))


@functools.lru_cache
def cached(key):
    OUTSIDE["cached"] = OUTSIDE.get("cached", 0) + 1
    return 1.0


def warns(m, x):
    warnings.warn("of the forward", stacklevel=1)
    return 1.0


def without_gradient(m, x):
    with torch.no_grad():
        return m.pool(F.relu(m.conv(x))).mean()


def in_bfloat16(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.pool(F.relu(F.conv2d(x.float(), m.conv.weight.float()))).double()


def checkpointed(m, x):
    return checkpoint(lambda x: m.pool(F.relu(m.conv(x))), x, use_reentrant=False)


BODIES = {
    "counts": counts,
    "appends": appends,
    "keeps": keeps,
    "buffer": writes_buffer,
    "new buffer": replaces_buffer,
    "iterator": takes_from_iterator,
    "global": counts_calls,
    "class": counts_calls_of_class,
    "outside": lambda m, x: OUTSIDE["value"],
    "environ": lambda m, x: float(os.environ.get(KEY, "0")),
    "getenv": lambda m, x: float(os.getenv(KEY, "0")),
    "python random": lambda m, x: random.random() + random.randint(0, 9),
    "torch random": lambda m, x: torch.rand(()) + F.dropout(x, training=True).mean(),
    "torch random item": lambda m, x: torch.rand(()).item(),
    "numpy random": lambda m, x: float(numpy.random.rand()) + float(numpy.random.randint(0, 9, 2).sum()),
    "numpy array": lambda m, x: torch.from_numpy(numpy.random.rand(1)),
    "warns": warns,
    "lru_cache": lambda m, x: cached(3),
    "branch on values": lambda m, x: x.mean() if x.sum() > 0 else x.sum(),
    "item": lambda m, x: x.sum().item(),
    "threads": lambda m, x: float(torch.get_num_threads()),
    "no_grad": without_gradient,
    "autocast": in_bfloat16,
    "checkpoint": checkpointed,
    "data": lambda m, x: float(m.conv.weight.data.mul_(0.9).sum()),
    "default dtype": lambda m, x: torch.ones(1).mean(),
    "isinstance": lambda m, x: 1.0 if isinstance(x, torch.Tensor) else 2.0,
    "stored gradient": lambda m, x: 0.0 if m.conv.weight.grad is None else 1.0,
    "modules": lambda m, x: float(len(list(m.modules()))),
    "hasattr": lambda m, x: float(hasattr(m, "later")),
}


def make(body):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool, self.state = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), 0
            self.register_buffer("buffer", torch.zeros(1))

        def forward(self, x):
            return self.pool(torch.relu(self.conv(x))) + BODIES[body](self, x)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().eval()


def calls(model):
    """What four calls return, warn of and leave behind, each in a world that has changed a little."""
    OUTSIDE.clear()
    OUTSIDE["value"] = 1.0
    cached.cache_clear()
    found = []
    for i in range(4):
        random.seed(i)
        numpy.random.seed(i)
        torch.manual_seed(i)
        if i == 2:
            os.environ[KEY] = "7"
            model.later = True
            model.add_module("another", nn.Identity())
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            y = model(X)
        y.sum().backward()
        left = random.random(), numpy.random.rand(), torch.rand(()).item(), OUTSIDE.copy(), len(warned)
        kept = model.state if isinstance(model.state, int | list) else None
        found.append((y.detach(), model.conv.weight.grad.clone(), model.buffer.clone(), kept, left))
        OUTSIDE["value"] += 1
    os.environ.pop(KEY, None)
    return found


@pytest.mark.parametrize("body", BODIES)
def test_forwards(body):
    found = [calls(model) for model in (make(body), fastcnn.optimize(make(body), inplace=True))]
    torch.testing.assert_close(found[1], found[0])


def test_checkpointing_inside_is_left_to_the_forward():
    """In a graph nothing would be computed anew for backward."""
    model = make("checkpoint")
    fast, counted = fastcnn.optimize(model), []
    for m in (model, fast):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            m(X)
        counted.append(sum(saved))
    assert counted[1] <= counted[0]
    assert any("checkpoint" in entry.why_not for entry in fast.fastcnn_report.left)


def test_time_goes_on():
    class Clock(nn.Module):
        def forward(self, x):
            return x * 0 + time.perf_counter()

    fast = fastcnn.optimize(Clock())
    assert len({fast(torch.zeros(())).item() for _ in range(3)}) == 3


class Described(nn.Module):
    """Optional arguments of all kinds, containers in and out."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

    def forward(self, x, target=None, *more, scale=1.0, names=()):
        y = self.pool(F.relu(self.conv(x))) * scale
        if target is not None:
            return F.mse_loss(y, target.expand_as(y))
        return {"y": y, "sum": sum(more, y.sum()), "names": [*names, None], "same": y, "view": y.view(-1)}


@pytest.mark.parametrize("options", OPTIONS)
def test_arguments_and_containers(options):
    model = Described().eval()
    fast = fastcnn.optimize(model, **options)
    arguments = [
        ((X,), {}),
        ((X, None), {"names": ["a"]}),
        ((X, torch.ones(1)), {}),
        ((X, None, 1, 2.5), {"scale": 3}),
        ((), {"x": X, "scale": torch.full((1,), 0.5), "names": ("b", "c")}),
    ]
    for args, kwargs in arguments * 2:
        y, expected = fast(*args, **kwargs), model(*args, **kwargs)
        if isinstance(y, dict):
            assert y.pop("names") == expected.pop("names")
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-9)
        if isinstance(y, dict):
            assert y["same"] is y["y"]
            assert y["view"].data_ptr() == y["y"].data_ptr()


class Frozen(nn.Module):
    """A frozen backbone in the forward, a head that learns."""

    def __init__(self):
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Linear(8, 4)

    def forward(self, x, enabled=False):
        with torch.set_grad_enabled(enabled):
            x = self.pool(F.relu(self.conv(x)))
        return self.fc(x.mean((2, 3)))


class Decorated(Frozen):
    forward = torch.no_grad()(Frozen.forward)


def test_gradient_modes():
    model = Frozen()
    fast = fastcnn.optimize(model)
    for enabled in (False, True, False):
        for m in (model, fast):
            m.zero_grad()
            m(X, enabled).sum().backward()
        assert (fast.conv.weight.grad is None) == (model.conv.weight.grad is None) == (not enabled)
        torch.testing.assert_close(fast.fc.weight.grad, model.fc.weight.grad)
    assert not fastcnn.optimize(Decorated())(X).requires_grad
    with torch.inference_mode():
        assert [m(X, True).is_inference() for m in (model, fast)] == [True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ident)
@pytest.mark.parametrize("options", OPTIONS)
def test_autocast_around_and_inside(options, dtype):
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4)).float().eval()
    model(X.float())
    fast = fastcnn.optimize(model, **options)
    fast(X.float())
    with torch.autocast("cpu", dtype):
        y, expected = fast(X.float()), model(X.float())
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


def test_errors_are_those_of_the_forward():
    class Raises(nn.Module):
        def forward(self, x):
            raise KeyError(f"no {x.dim()}")

    with pytest.raises(KeyError, match="no 4") as raised:
        fastcnn.optimize(Raises())(X)
    assert raised.value.__context__ is None
    model = network("sequential")
    fast = fastcnn.optimize(model)
    for x in (X[:, :2], X[0, 0], X.float(), X.long(), X[:, :, :3]):
        messages = []
        for m in (model, fast):
            with pytest.raises(RuntimeError) as raised:
                m(x)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]
    assert_same(fast, model, X)


def test_default_device_and_dtype():
    class Makes(nn.Module):
        def forward(self, x):
            return F.relu(x) + torch.zeros(1), torch.zeros(2)

    fast = fastcnn.optimize(Makes())
    assert fast(X)[1].dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    assert fast(X)[1].dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    with torch.device("meta"):
        assert fast(X.to("meta"))[1].device.type == "meta"
    assert fast(X)[1].device.type == "cpu"


# -- hooks ------------------------------------------------------------------------------------------------------------

KINDS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


def with_dropout():
    layers = sequential(inplace=False)
    return nn.Sequential(*layers[:6], nn.Dropout(), nn.Identity(), nn.Flatten(), nn.Dropout(), nn.LazyLinear(3))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [False, True])
def test_hooks_run_once_a_call(before, kind, options):
    """Those of the network itself, and those of every layer while its neighbours have none."""
    model = with_dropout().eval()
    model(X)
    layers = [name for name, _ in model.named_children()]
    for hooked in ([""], layers[::3], layers[1::3], layers[2::3]):
        seen, original = [], copy.deepcopy(model)
        fast = fastcnn.optimize(original, **options)
        if not before:
            fast(leaf(X)).sum().backward()
        target = original if before else fast
        handles = [
            getattr(target.get_submodule(name), f"register_{kind}")(lambda *_, name=name, seen=seen: seen.append(name))
            for name in hooked
        ]
        if before:
            fast = fastcnn.optimize(original, **options)
        for i in (1, 2):
            fast(leaf(X)).sum().backward()
            assert sorted(seen) == sorted(hooked * i)
        if not before:
            for handle in handles:
                handle.remove()
            fast(leaf(X)).sum().backward()
            assert len(seen) == 2 * len(hooked)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("before", [False, True])
def test_hooks_change_what_goes_in_and_out(before, options):
    model = with_dropout().eval()
    model(X)

    def add(m):
        for i, layer in enumerate(m):
            layer.register_forward_hook(lambda m, x, y, i=i: y * (1 + i / 16))
            layer.register_forward_pre_hook(lambda m, x: (x[0] + 0.01,))

    fast = fastcnn.optimize(model, **options)
    if before:
        add(model)
        fast = fastcnn.optimize(model, **options)
    else:
        fast(X)
        add(model)
        add(fast)
    torch.testing.assert_close(fast(X), model(X), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("before", [False, True])
def test_hooks_see_what_they_saw(index, before):
    def hooks_of(layer, seen):
        return [
            layer.register_forward_hook(lambda m, x, y: seen.append(y.detach().clone())),
            layer.register_forward_pre_hook(lambda m, x: seen.append(x[0].detach().clone())),
            layer.register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0].clone())),
        ]

    model = sequential(inplace=False)
    seen, expected = [], []
    if before:  # a deep copy takes hooks along, and what they write to
        hooks_of(model[index], expected)
        fast = fastcnn.optimize(model)
        outputs_and_gradients(fast, X)
        seen[:], expected[:] = expected, []
    else:
        fast = fastcnn.optimize(model)
        fused = called(fast)
        handles = hooks_of(fast[index], seen)
        outputs_and_gradients(fast, X)
        for handle in handles:
            handle.remove()
        assert called(fast) == fused
        hooks_of(model[index], expected)
    outputs_and_gradients(model, X)
    assert len(seen) == len(expected) == 3
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_on_all_modules(register):
    model = sequential(inplace=False)
    fast, seen = fastcnn.optimize(model), []
    fast(leaf(X)).sum().backward()  # a graph of the very kind of call that follows
    handle = getattr(nn.modules.module, f"register_module_{register}")(lambda m, *_: seen.append(type(m).__name__))
    try:
        for m in (model, fast):
            m(leaf(X)).sum().backward()
    finally:
        handle.remove()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert called(fast)


def test_hooks_on_containers_and_on_tensors_run():
    fast, seen = fastcnn.optimize(network("nested")), []
    fast(X)
    fast[2].register_forward_hook(lambda *_: seen.append("block"))
    fast[2].three.register_forward_hook(lambda *_: seen.append("three"))
    fast(X)
    assert seen == ["three", "block"]
    fast[0].weight.register_hook(lambda g: seen.append("weight"))
    y = fast(X)
    y.register_hook(lambda g: seen.append("output"))
    y.sum().backward()
    assert seen == ["three", "block"] * 2 + ["output", "weight"]


# -- what may happen to it later --------------------------------------------------------------------------------------


def replace_layer(m):
    m[5] = nn.Tanh()


def replace_convolution(m):
    m[4] = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3))


def remove_layer(m):
    del m[6:]


def append_layer(m):
    m.append(nn.Conv2d(8, 2, 1))


def other_padding(m):
    m[0].padding_mode = "circular"
    m[0]._reversed_padding_repeated_twice = [2, 2, 2, 2]


def other_pool(m):
    m[3].kernel_size, m[3].stride = 2, 1


def other_norm(m):
    m[2].size = 3


def other_forward(m):
    m[1].forward = torch.tanh


def train_one(m):
    m[11].train()


def other_weights(m):
    m.load_state_dict({name: value * 0.5 for name, value in m.state_dict().items()}, assign=True)


def prune_weights(m):
    prune.l1_unstructured(m[0], "weight", 0.5)


def parametrize(m):
    nn.utils.parametrizations.weight_norm(m[4])


CHANGES = [
    *(replace_layer, replace_convolution, remove_layer, append_layer, other_padding, other_pool, other_norm),
    *(other_forward, train_one, other_weights, prune_weights, parametrize),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("change", CHANGES)
def test_layers_may_be_changed_later(change, options):
    model = network("sequential").eval()
    fast = fastcnn.optimize(model, **options)
    fast(X)
    for m in (model, fast):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            change(m)
    torch.testing.assert_close(fast(X), model(X), rtol=1e-6, atol=1e-9)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value)


@pytest.mark.parametrize("cls", [nn.ReLU, nn.MaxPool2d, nn.LocalResponseNorm, nn.Conv2d, nn.Sequential])
def test_classes_may_be_changed_later(cls, monkeypatch):
    model = network("sequential")
    fast = fastcnn.optimize(model)
    fast(X)
    name = "_conv_forward" if cls is nn.Conv2d else "forward"
    original = getattr(cls, name)
    with monkeypatch.context() as patch:
        patch.setattr(cls, name, lambda self, *args: original(self, *args) * 2)
        torch.testing.assert_close(fast(X), model(X))
    torch.testing.assert_close(fast(X), model(X))


def test_heads_may_be_assigned_and_layers_quantized():
    layers = {"conv": nn.Conv2d(3, 8, 3), "relu": nn.ReLU(), "pool": nn.AdaptiveMaxPool2d(1), "flat": nn.Flatten()}
    model = nn.Sequential(collections.OrderedDict(layers, head=nn.Identity())).float().eval()
    for options in OPTIONS:
        fast, plain = fastcnn.optimize(model, **options), copy.deepcopy(model)
        fast(X.float())
        head = nn.Linear(8, 3).float()
        fast.head, plain.head = head, head
        torch.testing.assert_close(fast(X.float()), plain(X.float()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = [torch.ao.quantization.quantize_dynamic(m, {nn.Linear}) for m in (fast, plain)]
        torch.testing.assert_close(quantized[0](X.float()), quantized[1](X.float()))


def test_settings_of_a_forward_may_be_changed_later():
    model = network("modes")
    fast = fastcnn.optimize(model)
    fast(X)
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


def test_shallow_copies_and_replicas_have_layers_of_their_own():
    fast = fastcnn.optimize(network("sequential"))
    fast(X)
    for other in (copy.copy(fast), fast._replicate_for_data_parallel()):
        other._modules = dict(fast._modules)
        other._modules["1"] = nn.Tanh()
        expected = nn.Sequential(*other._modules.values())(X)
        torch.testing.assert_close(other(X), expected)
    assert any("DataParallel" in entry.why_not for entry in fast.fastcnn_report.left)


def test_models_that_hold_tensors_with_a_history():
    class Loss(nn.Module):
        def forward(self, x):
            self.loss = [x.square().mean()]
            return x

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Loss(), nn.MaxPool2d(2))
    expected = model(X)
    with pytest.raises(RuntimeError, match=r"2\.loss.*inplace=True"):
        fastcnn.optimize(model)
    loss = model[2].loss[0].item()
    fast = fastcnn.optimize(model, inplace=True)
    torch.testing.assert_close(fast(X), expected)
    assert fast[2].loss[0].item() == pytest.approx(loss)


# -- where it runs ----------------------------------------------------------------------------------------------------


def test_threads():
    model = network("sequential").eval()
    fast, found, errors = fastcnn.optimize(model), {}, []

    def run(i):
        try:
            for j in range(4):
                x = torch.rand(
                    1 + i % 3, 3, 24 + 8 * i, 24 + 8 * j, generator=torch.Generator().manual_seed(i + 10 * j)
                )
                found[i, j] = fast(x), x
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for y, x in found.values():
        torch.testing.assert_close(y, model(x))
    assert not fast.fastcnn_report.plain


def _run(model, x, queue):
    torch.set_num_threads(1)
    queue.put((model(x).detach().numpy(), len(model.fastcnn_report.replaced)))


def test_spawned_processes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)).requires_grad_(False)
    fast = fastcnn.optimize(model)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_run, args=(fast, X, queue))
    process.start()
    y, replaced = queue.get(timeout=120)
    process.join()
    torch.testing.assert_close(torch.from_numpy(y), model(X))
    assert replaced == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_it(reentrant):
    model = network("sequential").train()
    fast = fastcnn.optimize(model)
    grads = []
    for m in (model, fast):
        x = leaf(X)
        checkpoint(m, x, use_reentrant=reentrant).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in m.parameters())])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", NETWORKS)
def test_double_backward(name):
    model = network(name).eval()
    found = []
    for m in (model, fastcnn.optimize(model)):
        x = leaf(X)
        y = m(x)
        y = y[0] if isinstance(y, tuple) else y
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, *(p for p in m.parameters())], allow_unused=True))
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)


def test_outputs_belong_to_the_caller():
    fast = fastcnn.optimize(network("sequential"), inference=True)
    first = fast(X)
    copied = first.clone()
    fast(X * 2)
    assert_bitwise(first, copied)


def test_nothing_is_printed(capfd):
    model = network("sequential")
    fast = fastcnn.optimize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(X)
        with contextlib.suppress(RuntimeError):
            fast(X[:, :, :3])
    assert capfd.readouterr() == ("", "")
