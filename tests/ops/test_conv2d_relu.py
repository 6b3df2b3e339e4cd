"""What is special to conv2d_relu; what it promises as every operator does is in test_promises.py."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from operators import conv2d_relu
from promises import (
    NARROW,
    assert_bitwise,
    gradients,
    ident,
    leaf,
    randn,
)

import fastcnn
import fastcnn.functional as FF
from fastcnn.ops import packed

OP, BACKWARD = torch.ops.fastcnn.conv2d_relu.default, torch.ops.fastcnn.conv2d_relu_backward.default
NAN, INF = float("nan"), float("inf")

# input, weight, arguments


# -- frozen weights, which are kept packed ----------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["in place", "data", "new data", "loaded", "nan"])
def test_frozen_weights_may_change_in_any_way(each_backend, change):
    (x, w, b), kwargs = conv2d_relu.call("alexnet_conv2", format=torch.channels_last)
    layer = torch.nn.Conv2d(8, 12, 5, padding=2, groups=2).requires_grad_(False)
    with torch.no_grad():
        layer.weight.copy_(w)
    x = leaf(x)
    for _ in range(2):
        gradients(FF.conv2d_relu(x, layer.weight, b, **kwargs).sum(), (x,), None)
    if change == "in place":
        layer.weight.mul_(-1)
    elif change == "data":
        layer.weight.data.mul_(-1)
    elif change == "new data":
        layer.weight.data = layer.weight.data.flip(0)
    elif change == "loaded":
        layer.load_state_dict({"weight": layer.weight.roll(1, 3), "bias": layer.bias})
    else:
        layer.weight.data[3, 1, 2, 2] = NAN
    results = []
    for run in (FF.conv2d_relu, conv2d_relu.counterpart):
        y = run(x, layer.weight, b, **kwargs)
        results.append((y.detach(), *gradients(y, (x,), torch.ones_like(y))))
    torch.testing.assert_close(*results, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_packed_weights_go_when_the_weight_goes(best_backend):
    (x, w, b), kwargs = conv2d_relu.call("vgg_conv1_1", format=torch.channels_last)
    before = len(packed._frozen)
    FF.conv2d_relu(x, w, b, **kwargs)
    layer = fastcnn.nn.ConvReLU2d(3, 16, 3, padding=1).requires_grad_(False)
    layer(x)
    assert len(packed._frozen) == before + (2 if best_backend == "cpu" else 0)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x))
    del w, layer
    assert len(packed._frozen) == before


def test_trained_weights_are_not_packed(best_backend):
    (x, w, b), kwargs = conv2d_relu.call("vgg_conv1_1", format=torch.channels_last)
    before = len(packed._frozen)
    for _ in range(2):
        FF.conv2d_relu(x, leaf(w), b, **kwargs).sum().backward()
    assert len(packed._frozen) == before


@pytest.mark.parametrize("elements", [1, 7, 64, 1000, 20_000, 100_003])
def test_fingerprint_sees_every_change(best_backend, elements):
    if best_backend != "cpu":
        pytest.skip("the C++ library is not built")
    fingerprint = torch.ops.fastcnn_cpu.fingerprint
    x = randn(elements)
    assert fingerprint(x) == fingerprint(x.clone())
    seen = {fingerprint(x), fingerprint(-x)}
    places = range(0, elements, max(1, elements // 50))
    for i in places:
        changed = x.clone()
        changed[i] = -changed[i]
        seen.add(fingerprint(changed))
    assert len(seen) == len(places) + min(elements, 2)
    with pytest.raises(RuntimeError, match="contiguous"):
        fingerprint(randn(4, 4).t())


# -- little memory, deterministic -------------------------------------------------------------------------------------


def test_weights_frozen_at_first_can_be_trained_later(each_backend):
    (x, _, _), _ = conv2d_relu.call("vgg_conv1_1")
    layer, x = fastcnn.nn.ConvReLU2d(3, 16, 3, padding=1).requires_grad_(False), leaf(x)
    y = layer(x)
    dy = randn(*y.shape, seed=5)
    layer.requires_grad_()  # between forward and backward: what was recorded counts
    (frozen,) = gradients(y, (x,), dy)
    assert layer.weight.grad is None
    trained = gradients(layer(x), (x, layer.weight, layer.bias), dy)
    expected = gradients(F.relu(torch.nn.Conv2d.forward(layer, x)), (x, layer.weight, layer.bias), dy)
    assert_bitwise(frozen, trained[0])
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-4)


# -- composes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_of_frozen_weights(each_backend, strict, asked):
    layer = fastcnn.nn.ConvReLU2d(3, 6, 3).requires_grad_(False)
    exported = torch.export.export(layer, (randn(2, 3, 5, 6).requires_grad_(asked),), strict=strict).module()
    x = leaf(randn(2, 3, 5, 6, seed=2))
    y, expected = exported(x), layer(x)
    dy = randn(*expected.shape, seed=1)
    torch.testing.assert_close(gradients(y, [x], dy), gradients(expected, [x], dy))


@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_over_an_input_that_asks_for_its_gradient_beside_frozen_weights(each_backend, in_dim):
    x, w, b = randn(3, 2, 4, 4, 5).movedim(0, in_dim), randn(6, 2, 3, 3, seed=1), randn(6, seed=2)

    def of(run):
        inner = leaf(x)
        y = torch.func.vmap(lambda x: run(x, w, b, padding=1, groups=2), in_dim)(inner)
        return [y, *gradients(y, [inner], randn(*y.shape, seed=3))]

    torch.testing.assert_close(of(FF.conv2d_relu), of(conv2d_relu.counterpart), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", NARROW, ids=ident)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_autocast_casts_as_for_the_convolution_of_torch(each_backend, frozen, dtype):
    (x, w, b), kwargs = conv2d_relu.call("alexnet_conv2")

    def of(run):
        args = leaf(x), *(t if frozen else leaf(t) for t in (w, b))
        with torch.autocast("cpu", dtype):
            y = run(*args, **kwargs)
        wanted = [t for t in args if t.requires_grad]
        return [y, *gradients(y, wanted, torch.ones_like(y))]

    ours, theirs = of(FF.conv2d_relu), of(conv2d_relu.counterpart)
    assert ours[0].dtype == dtype
    assert all(g.dtype == torch.float32 for g in ours[1:])
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-1)


def test_autocast_leaves_float64_and_what_is_narrow_already(each_backend):
    for dtype, expected in [(torch.float64, torch.float64), (torch.float16, torch.bfloat16)]:
        (x, w, b), kwargs = conv2d_relu.call("pairs", dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y, theirs = FF.conv2d_relu(x, w, b, **kwargs), conv2d_relu.counterpart(x, w, b, **kwargs)
        assert y.dtype == theirs.dtype == expected
    (x, w, b), kwargs = conv2d_relu.call("pairs")
    with torch.autocast("cpu", torch.bfloat16):  # of different dtypes: all are cast to one
        assert FF.conv2d_relu(x.bfloat16(), w, b.half(), **kwargs).dtype == torch.bfloat16


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "bias": False, "groups": 2},
        {"kernel_size": (3, 2), "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect", "stride": 2},
        {"kernel_size": (2, 3), "padding": "same", "padding_mode": "replicate"},
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    ],
    ids=lambda kwargs: "-".join(kwargs),
)
@pytest.mark.parametrize("shape", [(2, 4, 7, 8), (4, 7, 8)], ids=ident)
def test_layer_is_that_of_torch(each_backend, shape, kwargs):
    ours, theirs = fastcnn.nn.ConvReLU2d(4, 6, **kwargs), torch.nn.Conv2d(4, 6, **kwargs)
    assert isinstance(ours, torch.nn.Conv2d)
    assert repr(ours) == repr(theirs).replace("Conv2d", "ConvReLU2d")
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = leaf(randn(*shape))
    expected = F.relu(theirs(x))
    for layer in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(layer(x), expected)
    dy = randn(*expected.shape, seed=1)
    expected_gradients = gradients(expected, [x, *theirs.parameters()], dy)
    torch.testing.assert_close(gradients(ours(x), [x, *ours.parameters()], dy), expected_gradients)

    other = torch.nn.Conv2d(4, 6, **kwargs)  # new weights after the first call count
    ours.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), F.relu(other(x)))


# -- bad input --------------------------------------------------------------------------------------------------------

X, W = torch.zeros(1, 4, 9, 9), torch.zeros(6, 4, 3, 3)


def refused(match, *args, **kwargs):
    """With exactly the type of exception that torch raises, and a message of ours."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as theirs:
        F.conv2d(*args, **kwargs)
    with pytest.raises(theirs.type, match=match) as ours:
        FF.conv2d_relu(*args, **kwargs)
    assert ours.type is theirs.type


@pytest.mark.parametrize("shape", [(), (6,), (6, 4, 3), (6, 4, 3, 3, 3)], ids=ident)
def test_weight_of_wrong_rank_raises_as_torch(each_backend, shape):
    refused("expected a 4D weight", X, torch.zeros(shape))


@pytest.mark.parametrize(
    ("weight", "groups"), [((6, 3, 3, 3), 1), ((6, 4, 3, 3), 2), ((5, 2, 3, 3), 2), ((6, 0, 3, 3), 1)], ids=ident
)
def test_channels_that_do_not_fit_raise_as_torch(each_backend, weight, groups):
    refused(f"groups={groups}", X, torch.zeros(weight), groups=groups)


@pytest.mark.parametrize("groups", [0, -1])
def test_groups_out_of_range_raise_as_torch(each_backend, groups):
    refused(f"groups={groups}", X, W, groups=groups)


@pytest.mark.parametrize("bias", [(), (1,), (4,), (0,), (6, 1), (1, 6)], ids=ident)
def test_bias_of_another_shape_raises_as_torch(each_backend, bias):
    refused("bias to be 1-dimensional with 6 elements", X, W, torch.zeros(bias))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("stride", "dilation") for value in (0, -1, (1, 0), (-3, 2))]
    + [("padding", value) for value in (-1, (0, -1), "full", "")],
    ids=ident,
)
def test_values_out_of_range_raise_as_torch(each_backend, name, value):
    refused(name, X, W, **{name: value})


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [(1, 1, 1), (), 1.5, (1.5, 1), (1, "1"), None], ids=repr)
def test_values_of_another_kind_raise_as_torch(each_backend, name, value):
    refused(name, X, W, **{name: value})


@pytest.mark.parametrize("value", [1.5, "1", None, (1,)], ids=repr)
def test_groups_of_another_kind_raise_as_torch(each_backend, value):
    refused("groups", X, W, groups=value)


def test_same_padding_with_a_stride_raises_as_torch(each_backend):
    refused("'same' needs stride 1", X, W, padding="same", stride=(1, 2))


@pytest.mark.parametrize("shape", [(1, 4, 2, 9), (1, 4, 9, 2), (0, 4, 2, 2), (4, 2, 9)], ids=ident)
def test_kernel_greater_than_the_input_raises_as_torch(each_backend, shape):
    refused("kernel can't be greater than the padded input", torch.zeros(shape), W)


def test_dilated_kernel_greater_than_the_input_raises_as_torch(each_backend):
    refused("kernel can't be greater than the padded input", X, W, dilation=5)
    refused("kernel can't be greater than the padded input", X, W, dilation=6, padding=1)


@pytest.mark.parametrize("shape", [(1, 4, 0, 9), (1, 4, 9, 0)], ids=ident)
def test_empty_maps_raise_as_torch(each_backend, shape):
    refused("kernel can't be greater than the padded input", torch.zeros(shape), W)


@pytest.mark.parametrize("weight", [(6, 4, 0, 3), (6, 4, 3, 0), (0, 4, 3, 3)], ids=ident)
def test_empty_weight_raises_as_torch(each_backend, weight):
    refused("weight of size", X, torch.zeros(weight))


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64, None),
        (torch.bfloat16, torch.float32, None),
        (torch.float32, torch.float32, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.bfloat16),
        (torch.float32, torch.int64, None),
    ],
    ids=ident,
)
def test_different_dtypes_raise_as_torch(each_backend, dtypes):
    x, w, b = dtypes
    bias = None if b is None else torch.zeros(6, dtype=b)
    refused("should be the same", X.to(x), W.to(w), bias)


def test_another_device_raises(each_backend):
    with pytest.raises(RuntimeError, match=r"on cpu.*on meta"):
        FF.conv2d_relu(X, W.to("meta"))
    with pytest.raises(RuntimeError, match="input on cpu and bias on meta"):
        FF.conv2d_relu(X, W, torch.zeros(6, device="meta"))


@pytest.mark.parametrize("value", [[1.0], 3.0], ids=ident)
def test_what_is_no_tensor_raises_as_torch(each_backend, value):
    kind = type(value).__name__
    refused(f"argument 'input' must be Tensor, not {kind}", value, W)
    refused(f"argument 'weight' must be Tensor, not {kind}", X, value)
    refused(f"argument 'bias' must be Tensor or None, not {kind}", X, W, value)


def test_missing_tensors_raise_as_torch(each_backend):
    refused("argument 'input' must be Tensor, not NoneType", None, W)
    refused("argument 'weight' must be Tensor, not NoneType", X, None)
