"""The layers: drop-in replacements for those of torch, and conversion from other frameworks' conventions."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from promises import assert_bitwise, assert_same_answer, gradients, leaf, randn, torch_tail

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams, PoolParams, reference
from fastcnn.nn import LocalResponseNorm, ReLULRNMaxPool2d

STAGE = {"relu": True, "lrn": LRNParams(5, 0.5, 0.75, 2.0), "pool": PoolParams(3, 2)}


# -- names and arguments ----------------------------------------------------------------------------------------------


def arguments(function, skip=()):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default, p.kind) for p in parameters if p.name not in skip]


def test_lrn_has_the_arguments_of_torch():
    assert arguments(FF.local_response_norm, ["groups"]) == arguments(F.local_response_norm)
    assert arguments(LocalResponseNorm.__init__, ["groups"]) == arguments(torch.nn.LocalResponseNorm.__init__)


def test_pool_has_the_arguments_of_torch():
    arguments_of_torch = dict.fromkeys(["kernel_size", "stride", "padding", "dilation", "ceil_mode"])
    assert list(inspect.signature(PoolParams).parameters) == list(arguments_of_torch)
    layer, pool = torch.nn.MaxPool2d(3), PoolParams(3)
    assert pool.op_args() == PoolParams(3, layer.stride, layer.padding, layer.dilation, layer.ceil_mode).op_args()


@pytest.mark.parametrize("name", ["local_response_norm", "relu_lrn_max_pool2d"])
def test_functional_and_reference_have_the_same_arguments(name):
    assert arguments(getattr(FF, name)) == arguments(getattr(reference, name))


# -- drop-in ----------------------------------------------------------------------------------------------------------


def test_lrn_layer_is_that_of_torch(each_backend):
    ours, theirs = LocalResponseNorm(4, 0.5, 0.6, 2.0), torch.nn.LocalResponseNorm(4, 0.5, 0.6, 2.0)
    x = randn(2, 6, 3, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours, torch.nn.LocalResponseNorm)
    assert repr(ours) == repr(theirs)
    assert repr(LocalResponseNorm(4, groups=2)).endswith("groups=2)")


def test_state_dict_goes_both_ways():
    def stage(norm):
        return torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), norm, torch.nn.Conv2d(6, 2, 1))

    ours, theirs = stage(LocalResponseNorm(5, groups=2)), stage(torch.nn.LocalResponseNorm(5))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_bitwise(ours[0].weight, theirs[0].weight)
    theirs.load_state_dict(stage(LocalResponseNorm(5)).state_dict(), strict=True)
    assert not ReLULRNMaxPool2d(**STAGE).state_dict()


def test_groups_of_the_layer_reach_the_operator(each_backend):
    x = randn(2, 6, 3, 5)
    expected = torch.cat([F.local_response_norm(part, 5, 0.5) for part in x.chunk(2, 1)], 1)
    torch.testing.assert_close(LocalResponseNorm(5, 0.5, groups=2)(x), expected)


def test_attributes_changed_after_construction_count(each_backend):
    layer, x = LocalResponseNorm(5), randn(2, 6, 3, 5)
    layer.size, layer.alpha, layer.groups = 3, 0.5, 2
    assert_bitwise(layer(x), FF.local_response_norm(x, 3, 0.5, groups=2))
    layer.size = 0
    with pytest.raises(RuntimeError, match="size=0"):
        layer(x)


def test_tail_layer_takes_the_bias_of_the_convolution(each_backend):
    layer = ReLULRNMaxPool2d(**STAGE)
    x, bias = leaf(randn(2, 6, 9, 9)), leaf(randn(6, seed=1))
    ours, theirs = layer(x, bias), torch_tail(x, bias, **STAGE)
    torch.testing.assert_close(ours, theirs)
    dy = randn(*ours.shape, seed=2)
    for a, b in zip(gradients(ours, (x, bias), dy), gradients(theirs, (x, bias), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), torch_tail(x, **STAGE))


def test_tail_layer_alone_rectifies(each_backend):
    x = randn(2, 6, 4, 4)
    assert_bitwise(ReLULRNMaxPool2d()(x), x.relu())
    assert_bitwise(ReLULRNMaxPool2d(relu=False)(x), x)


def test_layers_survive_pickling_and_deepcopy_inside_a_model(each_backend):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), LocalResponseNorm(5, groups=2), ReLULRNMaxPool2d(**STAGE))
    x = randn(1, 3, 13, 13)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_bitwise(twin(x).detach(), model(x).detach())
        assert repr(twin) == repr(model)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (RuntimeError, "got size=0", {"size": 0}),
        (TypeError, "'size' must be int, not float", {"size": 5.0}),
        (TypeError, "'alpha' must be a number, not str", {"size": 5, "alpha": "1"}),
        (ValueError, "got groups=0", {"size": 5, "groups": 0}),
    ],
    ids=str,
)
def test_lrn_layer_refuses_when_built_what_its_forward_would_refuse(error, match, arguments):
    with pytest.raises(error, match=match):
        LocalResponseNorm(**arguments)


@pytest.mark.parametrize(("name", "kind"), [("lrn", "LRNParams"), ("pool", "PoolParams")])
def test_tail_layer_refuses_parts_of_another_type(name, kind):
    with pytest.raises(TypeError, match=f"argument '{name}' must be {kind} or None, not int"):
        ReLULRNMaxPool2d(**{name: 3})(torch.zeros(1, 3, 4, 4))


# -- other conventions ------------------------------------------------------------------------------------------------


def windows(x, before, after):
    """For each channel of (N, C, H, W), the sum of squares over channels c - before ... c + after."""
    sums = np.zeros_like(x)
    for c in range(x.shape[1]):
        for other in range(max(c - before, 0), min(c + after, x.shape[1] - 1) + 1):
            sums[:, c] += x[:, other] ** 2
    return sums


def tensorflow_lrn(x, depth_radius=5, bias=1.0, alpha=1.0, beta=0.5):
    """tf.nn.local_response_normalization: alpha times the plain sum over 2 * depth_radius + 1 channels."""
    return x / (bias + alpha * windows(x, depth_radius, depth_radius)) ** beta


def caffe_lrn(x, local_size=5, alpha=1.0, beta=0.75, k=1.0):
    """Caffe's LRNLayer: pre_pad = (size - 1) / 2 channels on both sides, alpha over size."""
    pad = (local_size - 1) // 2
    return x * (k + alpha / local_size * windows(x, pad, pad)) ** -beta


def onnx_lrn(x, size, alpha=1e-4, beta=0.75, bias=1.0):
    """ONNX LRN: channels c - floor((size - 1) / 2) ... c + ceil((size - 1) / 2), alpha over size."""
    return x / (bias + alpha / size * windows(x, (size - 1) // 2, size // 2)) ** beta


CONVERSIONS = [
    (LocalResponseNorm.from_tf, tensorflow_lrn, {}),
    (LocalResponseNorm.from_tf, tensorflow_lrn, {"depth_radius": 0}),
    (LocalResponseNorm.from_tf, tensorflow_lrn, {"depth_radius": 2, "bias": 2.0, "alpha": 0.3, "beta": 0.75}),
    (LocalResponseNorm.from_caffe, caffe_lrn, {}),
    (LocalResponseNorm.from_caffe, caffe_lrn, {"local_size": 3, "alpha": 0.2, "beta": 0.6, "k": 2.0}),
    (LocalResponseNorm.from_onnx, onnx_lrn, {"size": 5}),
    (LocalResponseNorm.from_onnx, onnx_lrn, {"size": 3, "alpha": 0.5, "beta": 0.5, "bias": 2.0}),
    (LocalResponseNorm.from_onnx, onnx_lrn, {"size": 1}),
]


@pytest.mark.parametrize(("convert", "formula", "fields"), CONVERSIONS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_conversion_computes_the_formula_of_the_framework(each_backend, convert, formula, fields):
    x = randn(2, 13, 3, 4, dtype=torch.float64)
    assert_same_answer(convert(**fields)(x), torch.from_numpy(formula(x.numpy(), **fields)))


@pytest.mark.parametrize(("convert", "formula", "fields"), CONVERSIONS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_conversion_keeps_groups(convert, formula, fields):
    x = randn(2, 12, 3, 4, dtype=torch.float64)
    expected = np.concatenate([formula(part, **fields) for part in np.split(x.numpy(), 3, 1)], 1)
    with fastcnn.backends.use("reference"):
        assert_same_answer(convert(**fields, groups=3)(x), torch.from_numpy(expected))


def test_alexnet_as_printed_is_alexnet_as_run_with_another_alpha(each_backend):
    """The paper's alpha multiplies the plain sum, as TensorFlow's does."""
    x = randn(2, 13, 3, 4, dtype=torch.float64)
    printed = LocalResponseNorm.from_tf(2, 2.0, 1e-4, 0.75)
    assert_same_answer(printed(x), LocalResponseNorm(5, 5e-4, 0.75, 2.0)(x))


@pytest.mark.parametrize("size", [2, 4])
def test_even_onnx_window_is_refused_because_torch_has_none(size):
    x = randn(1, 6, 2, 2, dtype=torch.float64)
    expected = torch.from_numpy(onnx_lrn(x.numpy(), size, 0.5))
    assert (F.local_response_norm(x, size, 0.5) - expected).norm() > 1e-3
    with pytest.raises(ValueError, match=f"size must be odd, but got size={size}.*no torch equivalent"):
        LocalResponseNorm.from_onnx(size)


@pytest.mark.parametrize("local_size", [2, 4])
def test_even_caffe_window_is_refused_as_in_caffe(local_size):
    with pytest.raises(ValueError, match=f"local_size must be odd.*got local_size={local_size}"):
        LocalResponseNorm.from_caffe(local_size)


def test_negative_depth_radius_is_refused():
    with pytest.raises(ValueError, match="depth_radius must not be negative, but got depth_radius=-1"):
        LocalResponseNorm.from_tf(-1)


@pytest.mark.parametrize(
    "convert", [LocalResponseNorm.from_onnx, LocalResponseNorm.from_caffe], ids=lambda f: f.__name__
)
def test_conversion_refuses_a_window_that_is_not_positive(convert):
    with pytest.raises(RuntimeError, match="size must be greater than zero, but got size=-1"):
        convert(-1)
    with pytest.raises((RuntimeError, ValueError), match="size=0"):
        convert(0)


def test_conversion_makes_the_class_it_is_called_on():
    class Mine(LocalResponseNorm):
        pass

    assert type(Mine.from_tf()) is type(Mine.from_caffe()) is type(Mine.from_onnx(5)) is Mine
