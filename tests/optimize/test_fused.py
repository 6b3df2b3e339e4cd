"""optimize(): the same network, fused."""

import copy
import random
from collections import OrderedDict

import numpy
import pytest
import torch
import torch.nn.functional as F
from narrow import assert_readable
from promises import FORMATS, assert_bitwise, ident, in_format, leaf, randn, recorded_calls
from torch import nn

import fastcnn
from fastcnn.optimize.graph import fuse

from .networks import (
    NETWORKS,
    STAGES,
    X,
    assert_same,
    called,
    network,
    outputs_and_gradients,
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_same_outputs_and_gradients(pair, training, format):
    model, fast = pair
    assert_same(fast.train(training), model.train(training), in_format(X, format))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_stage_is_fused(name):
    fast = fastcnn.optimize(network(name), example_inputs=[X])
    assert len(fast.fastcnn_report.replaced) >= STAGES[name]
    for layer in fast.modules():
        if type(layer) in (nn.MaxPool2d, nn.LocalResponseNorm):
            assert len(called(layer, X)) == 1
    if name == "sequential":
        assert called(fast) == ["relu_lrn_max_pool2d", "relu_lrn_max_pool2d", "lrn", "batch_norm_relu_max_pool2d"]
    if name == "functional":
        assert called(fast) == ["relu_lrn_max_pool2d", "relu_lrn_max_pool2d", "lrn"]


@pytest.mark.usefixtures("small_classifiers")
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", ["alexnet", "caffenet", "zfnet", "alexnet_bn", "vgg_a_lrn", "inception_v1"])
def test_networks_of_the_zoo(name, plain, inference):
    """LRN within towers is no single function in torch; every stage of a plain network is fused nevertheless."""
    size = 67 if "alexnet" in name or "caffe" in name else 96 if name == "zfnet" else 64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fastcnn.models.create_model(name, input_size=size, num_classes=5, init="kaiming", plain=plain).eval()
    for module in model.modules():
        if isinstance(module, nn.LocalResponseNorm):
            module.alpha = 0.5
    x = randn(2, 3, size, size, dtype=torch.float64)
    fast = fastcnn.optimize(model, inference=inference)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-9, atol=1e-9)
    assert not fast.fastcnn_report.plain
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    stages = [entry for entry in fast.fastcnn_report.replaced if "conv2d" in entry.now]
    if inference or plain:
        assert len(stages) == len(convolutions)
    if plain and name == "alexnet":
        assert ["LocalResponseNorm" in entry.what for entry in stages] == [True, True, False, False, False]


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
    again = fastcnn.optimize(fast, example_inputs=[X])
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


def test_autocast():
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU()
    model = nn.Sequential(*layers).float()
    fast = fastcnn.optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fast(X.float()), model(X.float())
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)


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
    assert [entry.now for entry in fast.fastcnn_report.replaced] == ["conv2d + relu"]
    (entry,) = fast.fastcnn_report.left
    assert (entry.where, entry.what) == ("0", "Scaled")
    assert "no ReLU is called on its output" in entry.why_not


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
    assert_bitwise(fast(X[0, 0, :, :3]), model(X[0, 0, :, :3]))
    assert not fast.fastcnn_report.entries
    assert str(fast.fastcnn_report).startswith("0 replaced, 0 left alone")


def test_report_is_a_readable_table():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.MaxPool2d(2, return_indices=True)
    )
    fast = fastcnn.optimize(model)
    before = str(fast.fastcnn_report)
    assert "0 replaced, 3 left alone" in before
    assert "it was not called yet" in before
    assert "it returns indices" in before
    fast(X)
    text = str(fast.fastcnn_report)
    assert "1 replaced, 2 left alone" in text
    assert "Conv2d -> ReLU" in text
    assert "conv2d +" in text
    assert "no ReLU is called on its output alone" in text
    assert "not called" not in text
    assert str(fastcnn.optimize(model, example_inputs=(X,)).fastcnn_report) == text


def test_report_is_readable_at_80_columns():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(5), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.Tanh()]
    deep = nn.Sequential(*layers)
    for _ in range(6):
        deep = nn.Sequential(OrderedDict(features=deep))
    fast = fastcnn.optimize(deep)
    fast(X)
    places = [place for entry in fast.fastcnn_report.entries for place in entry.where.split(" + ")]
    assert len(places) == 5
    assert_readable(str(fast.fastcnn_report), *places, "MaxPool2d runs as", "Conv2d is left alone: no ReLU")


def test_example_inputs_leave_no_trace():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.count = nn.BatchNorm2d(3), 0

        def forward(self, x):
            self.count += 1
            return self.norm(F.dropout(x)) * random.random() * numpy.random.rand() * self.count

    model = Draws()
    for generator in (random.seed, numpy.random.seed, torch.manual_seed):
        generator(0)
    fast = fastcnn.optimize(model, example_inputs=[X])
    assert fast.count == fast.norm.num_batches_tracked == 0
    assert fast.fastcnn_report.plain
    y = fast(X)
    for generator in (random.seed, numpy.random.seed, torch.manual_seed):
        generator(0)
    assert_bitwise(y, model(X))


def test_what_follows_padding_of_other_values_is_fused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU())
    fast = fastcnn.optimize(model)
    assert_same(fast, model, X)
    assert [entry.now for entry in fast.fastcnn_report.replaced] == ["conv2d + relu"]


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

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), recorded_calls() as calls:
            loss = m(x, in_format(target, format), normalize=True).sum()
        grads.append(torch.autograd.grad(loss, x)[0])
        saved.append(kept)
    torch.testing.assert_close(grads[1], grads[0])
    assert sum(saved[1].values()) < sum(saved[0].values())
    assert [name for name, _ in calls].count("fastcnn.conv2d_relu.default") >= 2
    assert all(p.grad is None for p in fast.parameters())


# -- arguments --------------------------------------------------------------------------------------------------------


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


# -- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ident)
def test_calls_that_change_the_dtype_are_no_part_of_a_stage(dtype):
    """As LRN does under autocast on GPUs."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(F.relu, (x,))
    z = graph.call_function(F.local_response_norm, (y, 5))
    graph.output(z)
    for node, of in ((x, torch.float32), (y, torch.float32), (z, dtype)):
        node.meta["example_value"] = torch.empty(2, 8, 6, 6, dtype=of, device="meta")
    found = fuse(graph, {})
    assert [bool(entry.now) for entry in found] == ([True] if dtype == torch.float32 else [])
    graph.lint()
