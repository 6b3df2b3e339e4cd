"""The other networks: published sizes, torchvision's keys, and fused and plain layers that agree."""

import copy
import pickle

import pytest
import torch
from promises import assert_bitwise, ident, randn
from torch import nn

from fastcnn import backends, models, ops

pytestmark = pytest.mark.usefixtures("best_backend")


def on_meta(name, **options):
    with torch.device("meta"):
        return models.create_model(name, **options)


def count(module):
    return sum(p.numel() for p in module.parameters())


# -- as published -----------------------------------------------------------------------------------------------------

# VGG: the sum of table 1's layers, and torchvision's documentation for A, B, D and E, their batch norm and alexnet_owt;
# ZFNet: figure 3's layers; GoogLeNet: Caffe's bvlc_googlenet, without and with its two heads; SqueezeNet: torchvision's
PARAMETERS = [
    ("alexnet_one_tower", {}, 62_378_344),
    ("alexnet_owt", {}, 61_100_840),
    ("caffenet", {}, 60_965_224),
    ("zfnet", {}, 62_357_608),
    ("vgg_a", {}, 132_863_336),
    ("vgg_a_lrn", {}, 132_863_336),
    ("vgg_b", {}, 133_047_848),
    ("vgg_c", {}, 133_638_952),
    ("vgg_d", {}, 138_357_544),
    ("vgg_e", {}, 143_667_240),
    ("vgg11", {}, 132_863_336),
    ("vgg13", {}, 133_047_848),
    ("vgg16", {}, 138_357_544),
    ("vgg19", {}, 143_667_240),
    ("vgg11_bn", {}, 132_868_840),
    ("vgg13_bn", {}, 133_053_736),
    ("vgg16_bn", {}, 138_365_992),
    ("vgg19_bn", {}, 143_678_248),
    ("inception_v1", {}, 6_998_552),
    ("inception_v1", {"aux": True}, 13_378_280),
    ("squeezenet1_0", {}, 1_248_424),
    ("squeezenet1_1", {}, 1_235_496),
]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("name", "options", "parameters"), PARAMETERS, ids=ident)
def test_published_number_of_parameters(name, options, parameters, plain):
    assert count(on_meta(name, plain=plain, **options)) == parameters


def test_batch_norm_has_two_parameters_a_map_in_place_of_a_bias():
    """The two-tower convolutions of AlexNet, and fully connected layers behind a global pool of 256 maps."""
    alexnet, batch_norm = on_meta("alexnet"), on_meta("alexnet_bn")
    assert count(batch_norm.features) - count(alexnet.features) == 96 + 256 + 384 + 384 + 256
    assert count(batch_norm.classifier) - count(alexnet.classifier) == 4096 * (256 - 9216)


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("alexnet_owt", "0 3 6 8 10"),
        ("vgg11", "0 3 6 8 11 13 16 18"),
        ("vgg13", "0 2 5 7 10 12 15 17 20 22"),
        ("vgg16", "0 2 5 7 10 12 14 17 19 21 24 26 28"),
        ("vgg19", "0 2 5 7 10 12 14 16 19 21 23 25 28 30 32 34"),
        ("vgg11_bn", "0 1 4 5 8 9 11 12 15 16 18 19 22 23 25 26"),
        ("vgg16_bn", "0 1 3 4 7 8 10 11 14 15 17 18 20 21 24 25 27 28 30 31 34 35 37 38 40 41"),
    ],
)
@pytest.mark.parametrize("plain", [False, True])
def test_keys_are_those_of_torchvision(name, features, plain):
    keys = on_meta(name, plain=plain).state_dict()
    classifier = "1 4 6" if name == "alexnet_owt" else "0 3 6"
    expected = [f"features.{i}" for i in features.split()] + [f"classifier.{i}" for i in classifier.split()]
    assert [key.removesuffix(".weight") for key in keys if key.endswith(".weight")] == expected
    assert {key.rsplit(".", 1)[0] for key in keys} == set(expected)


def test_keys_of_inception_are_those_of_torchvision_without_batch_norm():
    keys = list(on_meta("inception_v1", aux=True).state_dict())
    branches = ("branch1", "branch2.0", "branch2.1", "branch3.0", "branch3.1", "branch4.1")
    for block in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        inside = [key for key in keys if key.startswith(f"inception{block}.") and key.endswith("weight")]
        assert inside == [f"inception{block}.{branch}.conv.weight" for branch in branches]
    outside = [key for key in keys if not key.startswith("inception") and key.endswith("weight")]
    heads = [f"{head}.{layer}.weight" for head in ("aux1", "aux2") for layer in ("conv.conv", "fc1", "fc2")]
    assert outside == ["conv1.conv.weight", "conv2.conv.weight", "conv3.conv.weight", "fc.weight", *heads]


@pytest.mark.parametrize(
    ("name", "fires"), [("squeezenet1_0", "3 4 5 7 8 9 10 12"), ("squeezenet1_1", "3 4 6 7 9 10 11 12")]
)
@pytest.mark.parametrize("plain", [False, True])
def test_keys_of_squeezenet_are_those_of_torchvision(name, fires, plain):
    layers = [f"features.{i}.{part}" for i in fires.split() for part in ("squeeze", "expand1x1", "expand3x3")]
    expected = [f"{layer}.{kind}" for layer in ("features.0", *layers, "classifier.1") for kind in ("weight", "bias")]
    assert list(on_meta(name, plain=plain).state_dict()) == expected


def map_sides(model):
    """The sides of the maps, in the order in which they shrink."""
    sides = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            layer.register_forward_hook(lambda _, __, y: sides.append(y.shape[-1]))
    with torch.no_grad():
        model(torch.empty(1, 3, model.input_size, model.input_size, device="meta"))
    return list(dict.fromkeys(sides))


@pytest.mark.parametrize(
    ("name", "options", "sides"),
    [
        ("alexnet_one_tower", {}, [55, 27, 13, 6]),
        ("alexnet_owt", {}, [55, 27, 13, 6]),
        ("caffenet", {}, [55, 27, 13, 6]),
        ("alexnet_bn", {"head": "avg"}, [55, 27, 13]),
        ("alexnet_bn", {"head": "max"}, [55, 27, 13, 1]),
        ("zfnet", {}, [110, 55, 26, 13, 6]),
        ("zfnet512", {}, [109, 54, 25, 12, 6]),
        ("vgg_c", {}, [224, 112, 56, 28, 14, 7]),
        ("inception_v1", {}, [112, 56, 28, 14, 7]),
        ("inception_v1", {"ceil_mode": False}, [112, 55, 27, 13, 6]),
        ("squeezenet1_0", {}, [109, 54, 27, 13]),
        ("squeezenet1_1", {}, [111, 55, 27, 13]),
    ],
    ids=ident,
)
def test_published_sizes_of_the_maps(name, options, sides):
    assert map_sides(on_meta(name, plain=True, **options).eval()) == sides


def test_published_depths_of_inception():
    """Szegedy et al., table 1."""
    with torch.device("meta"):
        model, x = models.create_model("inception_v1", plain=True), torch.empty(1, 192, 28, 28)
        depths = []
        for name, layer in model.named_children():
            if name.startswith("inception"):
                x = layer(x)
                depths.append(x.shape[1])
                assert layer.out_channels == x.shape[1]
    assert depths == [256, 480, 512, 512, 512, 528, 832, 832, 1024]


def steps(model):
    return " ".join(type(layer).__name__ for layer in model.features if not isinstance(layer, nn.ReLU))


def test_order_of_pool_and_lrn():
    alexnet, caffenet = on_meta("alexnet", plain=True, lrn_groups=1), on_meta("caffenet", plain=True)
    assert steps(alexnet).startswith("Conv2d LocalResponseNorm MaxPool2d Conv2d LocalResponseNorm MaxPool2d")
    for model in (caffenet, on_meta("zfnet", plain=True)):
        assert steps(model).startswith("Conv2d MaxPool2d LocalResponseNorm Conv2d MaxPool2d LocalResponseNorm")
    assert caffenet.features.norm1.k == 1
    assert steps(on_meta("vgg_a_lrn", plain=True)).startswith("Conv2d LocalResponseNorm MaxPool2d Conv2d MaxPool2d")
    assert steps(on_meta("alexnet_bn", plain=True)).startswith("Conv2d BatchNorm2d MaxPool2d")
    stem = on_meta("inception_v1", plain=True)
    assert [type(layer).__name__ for layer in stem.conv1] == ["Conv2d", "ReLU", "MaxPool2d", "LocalResponseNorm"]
    assert [type(layer).__name__ for layer in stem.conv3] == ["Conv2d", "ReLU", "LocalResponseNorm", "MaxPool2d"]


def test_convolutions_of_one_pixel_in_vgg_c():
    kernels = {name: layer.kernel_size for name, layer in on_meta("vgg_c").weighted_layers().items() if "conv" in name}
    assert [name for name, kernel in kernels.items() if kernel == (1, 1)] == ["conv3_3", "conv4_3", "conv5_3"]


# -- fused and plain --------------------------------------------------------------------------------------------------

SMALL = [
    ("alexnet_one_tower", 67, {}),
    ("alexnet_owt", 67, {}),
    ("alexnet_bn", 67, {"head": "avg"}),
    ("alexnet_bn", 70, {"head": "max"}),
    ("caffenet", 67, {}),
    ("zfnet", 63, {}),
    ("zfnet512", 59, {}),
    ("vgg_a_lrn", 32, {}),
    ("vgg_c", 32, {}),
    ("vgg_e", 32, {}),
    ("vgg13_bn", 32, {}),
    ("inception_v1", 80, {"aux": True}),
    ("squeezenet1_0", 67, {}),
    ("squeezenet1_1", 67, {}),
]


@pytest.mark.usefixtures("small_classifiers")
@pytest.mark.parametrize(("name", "size", "options"), SMALL, ids=ident)
def test_fused_and_plain_agree_in_training(name, size, options):
    """Outputs, the gradients of the image and of every parameter, and the running statistics, in float64."""
    torch.manual_seed(0)
    fused = models.create_model(name, num_classes=5, input_size=size, init="kaiming", **options).double()
    plain = on_meta(name, num_classes=5, input_size=size, plain=True, **options)
    assert list(plain.state_dict()) == list(fused.state_dict())
    state = {key: value.clone() if "running" in key else value for key, value in fused.state_dict().items()}
    plain.load_state_dict(state, assign=True)
    results = []
    for model in (fused, plain):
        torch.manual_seed(1)
        x = (64 * randn(2, 3, size, size, dtype=torch.float64)).requires_grad_()
        out = model(x)
        outputs = list(out) if isinstance(out, tuple) else [out]
        loss = sum((y * randn(*y.shape, dtype=y.dtype)).sum() for y in outputs)
        gradients = torch.autograd.grad(loss, [x, *model.parameters()])
        results.append([*outputs, *gradients, *(b for n, b in model.named_buffers() if "running" in n)])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 1e-11 * theirs.norm()


@pytest.mark.skipif(backends.cpu_capability() in ("", "baseline"), reason="torch's layers are faster")
@pytest.mark.usefixtures("small_classifiers")
@pytest.mark.parametrize(
    ("name", "size", "options", "layers"), [("alexnet", 67, {}, 3), ("inception_v1", 80, {"aux": True}, 5)], ids=ident
)
def test_fully_connected_layers_are_ours_in_training_unless_plain(name, size, options, layers, monkeypatch):
    monkeypatch.setattr(ops.linear, "_WEIGHTS", 0)
    for plain, backward in ((False, "LinearBackward"), (True, "AddmmBackward0")):
        model, seen = models.create_model(name, num_classes=5, input_size=size, plain=plain, **options), []
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(lambda _, __, y, seen=seen: seen.append(y.grad_fn.name()))
        model(64 * randn(2, 3, size, size))
        assert seen == [backward] * layers


def test_everything_but_the_tail_of_a_plain_network_is_of_torch():
    for name in models.list_models():
        for layer in on_meta(
            name, plain=True, dropout="inverted", **{"lrn_groups": 1} if name == "alexnet" else {}
        ).modules():
            assert type(layer).__module__.startswith(
                ("torch.nn.", "fastcnn.models.convnet", "fastcnn.models.inception", "fastcnn.models.squeezenet")
            )


@pytest.mark.parametrize("name", ["vgg_a", "zfnet", "inception_v1"])
def test_plain_networks_can_be_traced_and_copied(name):
    model = models.create_model(name, num_classes=3, input_size=64, plain=True, init="kaiming").eval()
    x = randn(1, 3, 64, 64)
    expected = model(x)
    assert_bitwise(torch.fx.symbolic_trace(model)(x), expected)
    assert_bitwise(copy.deepcopy(model)(x), expected)
    assert_bitwise(pickle.loads(pickle.dumps(model))(x), expected)


def test_heads_of_inception_take_part_in_training_only():
    model = models.create_model("inception_v1", num_classes=3, input_size=80, aux=True)
    x = randn(2, 3, 80, 80)
    out = model(x)
    assert isinstance(out, models.InceptionOutputs)
    assert [y.shape for y in out] == [(2, 3)] * 3
    assert model.eval()(x).shape == (2, 3)
    assert models.create_model("inception_v1", num_classes=3, input_size=64)(x[..., :64, :64]).shape == (2, 3)


# -- initialization ---------------------------------------------------------------------------------------------------


def test_paper_initialization_of_vgg_has_variance_01():
    model = models.create_model("vgg_a", num_classes=10, input_size=32, init="paper")
    for name, layer in model.weighted_layers().items():
        assert layer.weight.std().item() == pytest.approx(0.1, rel=0.1), name
        assert (layer.bias == 0).all()


def test_deeper_vgg_starts_from_a_trained_a():
    trained = models.create_model("vgg_a", num_classes=4, input_size=32, init="paper")
    model = models.create_model("vgg_c", num_classes=4, input_size=32, start_from=trained)
    ours, theirs = model.weighted_layers(), trained.weighted_layers()
    copied = {name for name in ours if name in theirs and torch.equal(ours[name].weight, theirs[name].weight)}
    assert copied == {"conv1_1", "conv2_1", "conv3_1", "conv3_2", "fc6", "fc7", "fc8"}


def test_start_from_something_else_lists_what_does_not_fit():
    with pytest.raises(TypeError, match=r"vgg_b\(\): argument 'start_from' must be a VGG network, not dict"):
        on_meta("vgg_b", start_from={})
    with pytest.raises(ValueError, match=r"fc6 is \(4096, 512\), not \(4096, 25088\); fc8 is \(7, 4096\), not \(1000"):
        on_meta("vgg_b", start_from=on_meta("vgg_a", num_classes=7, input_size=32))
    with pytest.raises(ValueError, match="conv1_1 is missing"):
        on_meta("vgg_b", start_from=on_meta("zfnet"))


def test_initialization_of_inception_is_caffes():
    model = models.create_model("inception_v1", num_classes=5, input_size=80, aux=True)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            assert layer.weight.abs().max() <= (3 / fan_in) ** 0.5
            assert layer.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.1), name
            bias = 0.0 if name in ("fc", "aux1.fc2", "aux2.fc2") else 0.2
            assert_bitwise(layer.bias, torch.full_like(layer.bias, bias))


def test_initialization_again_resets_batch_norm():
    model = models.create_model("alexnet_bn", num_classes=3, input_size=67)
    model(64 * randn(2, 3, 67, 67))
    assert model.features.bn1.running_mean.any()
    model.reset_parameters("paper")
    assert not model.features.bn1.running_mean.any()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "match", "options"),
    [
        ("alexnet_bn", "head must be 'avg' or 'max', but got head='mean'", {"head": "mean"}),
        ("vgg_d", "init must be 'paper' or 'glorot' or 'kaiming', but got init='caffe'", {"init": "caffe"}),
        ("vgg_d", "at least 32, but got input_size=31: nothing is left of the map at pool5_3", {"input_size": 31}),
        ("zfnet", "nothing is left of the map at conv2", {"input_size": 12}),
        ("inception_v1", "nothing is left of the map at maxpool4", {"input_size": 30}),
        ("inception_v1", "nothing is left of the map at aux1", {"input_size": 60, "aux": True}),
        ("squeezenet1_0", "nothing is left of the map at the pool before fire9", {"input_size": 17}),
        ("squeezenet1_1", "init must be 'caffe' or 'kaiming'", {"init": "paper"}),
        ("inception_v1", "aux must be False or True, but got aux=1", {"aux": 1}),
        ("inception_v1", "dropout must be 'paper' or 'inverted', but got dropout=0.4", {"dropout": 0.4}),
    ],
    ids=ident,
)
def test_refused_options(name, match, options):
    with pytest.raises(ValueError, match=rf"^{name}\(\): .*{match}"):
        on_meta(name, **options)


@pytest.mark.parametrize("name", ["vgg_a", "inception_v1"])
def test_images_of_another_shape_are_refused(name):
    with pytest.raises(
        RuntimeError, match=rf"{name}\(\): expected an input of shape \(N, 3, 224, 224\), but got \(1, 3, 2"
    ):
        on_meta(name)(torch.empty(1, 3, 256, 224, device="meta"))
