"""AlexNet: the published network, and fused and plain layers that agree."""

import copy
import gc
import io
import pickle
from math import log

import pytest
import torch
import torch.nn.functional as F
from promises import FORMATS, assert_bitwise, ident, in_format, randn
from torch import nn

from fastcnn import data, models
from fastcnn.models.layers import PaperDropout

SMALL = 67  # one pixel is left of the last map: the same layers, and a fifth of the parameters
SMALLEST = 64  # the same padded, as 224 is beside 227
MEAN = torch.tensor((123.68, 116.78, 103.94)).view(3, 1, 1)  # of ImageNet's pixels

pytestmark = pytest.mark.usefixtures("best_backend")


def alexnet(**options):
    torch.manual_seed(0)
    return models.create_model("alexnet", **{"num_classes": 10, **options})


def small(**options):
    return alexnet(**{"input_size": SMALL, **options})


def on_meta(**options):
    with torch.device("meta"):
        return models.create_model("alexnet", **options)


def plain_twin(model, **options):
    """The plain network on the very parameters of ``model``, with gradients of its own."""
    plain = on_meta(num_classes=model.classifier.fc8.out_features, input_size=model.input_size, plain=True, **options)
    plain.load_state_dict(model.state_dict(), strict=True, assign=True)
    return plain.train(model.training)


def pixels(batch=2, size=SMALL, format=torch.contiguous_format):
    """Noise on the raw scale of pixels minus their mean."""
    return 64 * randn(batch, 3, size, size, format=format)


def photographs(size):
    return data.photographs(size).float() - MEAN


def difference(logits, expected):
    """Relative to what tells the classes apart."""
    return ((logits - expected).norm() / (expected - expected.mean(1, keepdim=True)).norm()).item()


def loss(logits):
    return (logits * randn(*logits.shape, dtype=logits.dtype)).sum()


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


# -- as published -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("input_size", [227, 224])
def test_published_number_of_parameters(plain, input_size):
    model = on_meta(plain=plain, input_size=input_size)
    assert sum(p.numel() for p in model.parameters()) == 60_965_224


def test_published_shapes():
    """3.5: kernels of conv2, conv4 and conv5 see the maps of their own tower only."""
    shapes = {name: tuple(p.shape) for name, p in on_meta().state_dict().items() if name.endswith("weight")}
    assert shapes == {
        "features.conv1.weight": (96, 3, 11, 11),
        "features.conv2.weight": (256, 48, 5, 5),
        "features.conv3.weight": (384, 256, 3, 3),
        "features.conv4.weight": (384, 192, 3, 3),
        "features.conv5.weight": (256, 192, 3, 3),
        "classifier.fc6.weight": (4096, 6 * 6 * 256),
        "classifier.fc7.weight": (4096, 4096),
        "classifier.fc8.weight": (1000, 4096),
    }


def test_published_order_of_the_layers():
    model = on_meta(plain=True)
    assert " ".join(name for name, _ in model.features.named_children()) == (
        "conv1 relu1 norm1 pool1 conv2 relu2 norm2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 pool5"
    )
    assert " ".join(name for name, _ in model.classifier.named_children()) == "fc6 relu6 drop6 fc7 relu7 drop7 fc8"
    for norm in (model.features.norm1, model.features.norm2):
        assert (norm.size, norm.alpha, norm.beta, norm.k, norm.groups) == (5, 1e-4, 0.75, 2.0, 2)
    for pool in (model.features.pool1, model.features.pool2, model.features.pool5):
        assert (pool.kernel_size, pool.stride, pool.padding) == (3, 2, 0)


def test_lrn_across_both_towers_is_the_layer_of_torch():
    model = on_meta(plain=True, lrn_groups=1)
    assert type(model.features.norm1) is type(model.features.norm2) is nn.LocalResponseNorm


def test_each_tower_normalizes_its_own_maps():
    """Scaling the last filters of tower one moves no map of tower two; with one group it does."""
    for lrn_groups, crosses in ((2, False), (1, True)):
        stage = small(lrn_groups=lrn_groups).features.conv1
        x = pixels()
        before = stage(x)
        with torch.no_grad():
            stage.weight[47] *= 100
        assert (stage(x)[:, 48:] != before[:, 48:]).any() == crosses


@pytest.mark.parametrize("plain", [False, True])
def test_padding_of_the_original_code(plain):
    """224: zeros on the right and at the bottom only, so that the last of 55 windows fits. 227: none."""
    features = on_meta(input_size=224, plain=plain).features
    assert features.pad1.padding == (0, 3, 0, 3)
    assert not hasattr(on_meta(plain=plain).features, "pad1")
    padded = F.pad(torch.ones(1, 3, 224, 224), (0, 3, 0, 3))
    assert_bitwise(features.pad1(torch.ones(1, 3, 224, 224)), padded)
    convolved = F.conv2d(features.pad1(torch.empty(1, 3, 224, 224, device="meta")), features.conv1.weight, stride=4)
    assert convolved.shape == (1, 96, 55, 55)


# -- fused and plain --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(227, 2), (224, 1)], ids=ident)
def pair(request):
    """The fused and the plain network on the same parameters."""
    input_size, lrn_groups = request.param
    fused = alexnet(input_size=input_size, lrn_groups=lrn_groups, init="kaiming")
    yield fused, plain_twin(fused, lrn_groups=lrn_groups)
    gc.collect()


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_logits_of_photographs_agree(pair, format):
    fused, plain = pair
    x = in_format(photographs(fused.input_size), format)
    with torch.no_grad():
        logits, expected = fused.eval()(x), plain.eval()(x)
    assert logits.shape == (len(x), 10)
    assert difference(logits, expected) < 1e-5
    assert difference(logits.roll(1, 0), expected) > 0.1  # the logits tell the photographs apart


@pytest.mark.parametrize("format", FORMATS, ids=ident)
def test_gradients_in_training_agree(pair, format):
    """Dropout draws the same masks. Where rounding decides which of two values is the maximum, or on which side of
    zero one lies, the gradient goes another way, and one such place among the 9216 of the last map moves it by about
    1/100. So a tight bound needs float64, below."""
    for model in pair:
        torch.manual_seed(1)
        model.train().zero_grad()
        loss(model(pixels(1, model.input_size, format=format))).backward()
    expected = gradients(pair[1])
    for name, grad in gradients(pair[0]).items():
        assert expected[name].norm() > 0
        assert (grad - expected[name]).norm() <= 5e-2 * expected[name].norm(), name


@pytest.mark.parametrize("format", FORMATS, ids=ident)
@pytest.mark.parametrize("lrn_groups", [1, 2])
@pytest.mark.parametrize("input_size", [SMALL, SMALLEST])
def test_features_and_their_gradients_agree_in_float64(input_size, lrn_groups, format):
    options = {"input_size": input_size, "lrn_groups": lrn_groups}
    fused = alexnet(**options, init="kaiming").features.double()
    plain = on_meta(**options, plain=True).features
    plain.load_state_dict(fused.state_dict(), assign=True)
    results = []
    for features in (fused, plain):
        x = in_format(pixels(1, input_size).double(), format).requires_grad_()
        y = features(x)
        loss(y).backward()
        results.append([y, x.grad, *(p.grad for p in features.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("input_size", [SMALL, SMALLEST])
def test_state_dict_goes_both_ways(input_size):
    fused = small(input_size=input_size)
    plain = on_meta(num_classes=10, input_size=input_size, plain=True)
    assert [(k, v.shape) for k, v in fused.state_dict().items()] == [
        (k, v.shape) for k, v in plain.state_dict().items()
    ]
    plain.load_state_dict(fused.state_dict(), strict=True, assign=True)
    fused_again = on_meta(num_classes=10, input_size=input_size)
    fused_again.load_state_dict(plain.state_dict(), strict=True, assign=True)
    x = pixels(1, input_size)
    assert_bitwise(fused_again.eval()(x), fused.eval()(x))


@pytest.mark.parametrize("init", ["paper", "kaiming"])
def test_same_seed_same_parameters(init):
    fused, plain = small(init=init), small(init=init, plain=True)
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        assert_bitwise(p, q)


def test_empty_batch():
    for plain in (False, True):
        assert small(plain=plain)(pixels(0)).shape == (0, 10)


# -- initialization ---------------------------------------------------------------------------------------------------

POSITIVE = {"conv2", "conv4", "conv5", "fc6", "fc7"}


@pytest.mark.parametrize(
    ("init", "std", "bias"),
    [
        ("paper", {}, 1.0),
        ("as_run", {"conv3": 0.03, "conv4": 0.03, "conv5": 0.03}, 1.0),
        ("caffe", {"fc6": 0.005, "fc7": 0.005}, 0.1),
        ("kaiming", {}, 0.0),
    ],
)
def test_initialization_of_every_layer(init, std, bias):
    model = small(init=init)
    layers = {**dict(model.features.named_children()), **dict(model.classifier.named_children())}
    for name, layer in layers.items():
        if not hasattr(layer, "weight"):
            continue
        expected = (2 / layer.weight[0].numel()) ** 0.5 if init == "kaiming" else std.get(name, 0.01)
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.02), name
        assert abs(layer.weight.mean()) < 0.02 * expected, name
        assert (layer.bias == (bias if name in POSITIVE else 0)).all(), name


def spread(model, images):
    """By how much the logits of different images differ."""
    logits = model(images)
    return (logits - logits.mean(0)).std().item()


@torch.no_grad()
def test_why_training_sticks():
    """With the paper's initialization and inputs of unit variance the logits do not depend on the image: whatever
    the loss, it tells nothing. Raw pixels raise the difference as much as they are larger, the wider conv3 to conv5
    of the authors' configuration up to 3 * 3 * 3 times; He's initialization leaves nothing to raise."""
    model = alexnet().eval()
    raw = photographs(227)
    unit = raw / raw.std()
    paper = spread(model, unit)
    assert paper < 1e-3
    assert 30 < spread(model, raw) / paper < 120
    model.reset_parameters("as_run")
    assert 27 / 2 < spread(model, unit) / paper < 27 * 2
    model.reset_parameters("kaiming")
    assert spread(model, unit) > 100 * paper
    assert spread(model, raw) > 1


def test_loss_at_the_start_is_that_of_guessing():
    guessed = F.cross_entropy(small().eval()(randn(10, 3, SMALL, SMALL)), torch.arange(10)).item()
    assert guessed == pytest.approx(log(10), rel=0.1)


# -- dropout ----------------------------------------------------------------------------------------------------------


def test_paper_dropout_masks_in_training_and_halves_at_test():
    x, layer = 1 + randn(64, 256).abs(), PaperDropout()
    y = layer(x)
    assert_bitwise(y, torch.where(y == 0, 0, x))
    assert (y == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert_bitwise(layer.eval()(x), x / 2)


def test_paper_dropout_gradient_is_the_mask():
    x = randn(8, 16).requires_grad_()
    y = PaperDropout()(x)
    y.sum().backward()
    assert_bitwise(x.grad, (y != 0).float())


@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
def test_paper_dropout_has_the_expectation_of_its_test_time(p):
    layer, x = PaperDropout(p), torch.ones(100_000)
    assert layer(x).mean().item() == pytest.approx(1 - p, abs=0.01)
    torch.testing.assert_close(layer.eval()(x), (1 - p) * x)
    assert repr(layer) == f"PaperDropout(p={p})"


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_dropout_probability_outside_of_0_to_1_raises_as_torch(p):
    with pytest.raises(ValueError, match="between 0 and 1"):
        nn.Dropout(p)
    with pytest.raises(ValueError, match=f"between 0 and 1, but got {p}"):
        PaperDropout(p)


def test_inverted_dropout_is_that_of_torch():
    kinds = {dropout: on_meta(dropout=dropout).classifier for dropout in ("paper", "inverted")}
    assert all(type(layer) is nn.Dropout and layer.p == 0.5 for layer in (kinds["inverted"][2], kinds["inverted"][5]))
    assert all(type(layer) is PaperDropout for layer in (kinds["paper"].drop6, kinds["paper"].drop7))
    assert not isinstance(kinds["paper"].drop6, nn.Dropout)  # or tools that drop it for inference would drop the factor


@pytest.mark.parametrize("plain", [False, True])
def test_dropout_of_the_whole_network(plain):
    """At test the paper's network halves both hidden layers, and torch's does not."""
    paper = small(plain=plain, init="kaiming").eval()
    inverted = small(plain=plain, init="kaiming", dropout="inverted").eval()
    x = pixels()
    assert difference(4 * paper(x), inverted(x)) < 1e-5  # He: biases are 0, so factors pass through
    assert (paper.train()(x) != paper(x)).any()


# -- in place ---------------------------------------------------------------------------------------------------------

IN_PLACE_ERROR = "one of the variables needed for gradient computation has been modified by an inplace operation"


def naive():
    """The head that is often written: it saves memory, and only fails once it is trained."""
    convolutions = [nn.Conv2d(3, 8, 11, 4), nn.ReLU(inplace=True), nn.LocalResponseNorm(5, k=2.0), nn.MaxPool2d(3, 2)]
    head = [nn.Flatten(), nn.Linear(8 * 7 * 7, 16), nn.ReLU(inplace=True), nn.Dropout(inplace=True), nn.Linear(16, 10)]
    return nn.Sequential(*convolutions, *head)


def test_in_place_dropout_behind_relu_fails_in_the_naive_network():
    outcome = loss(naive()(pixels()))
    with pytest.raises(RuntimeError, match=IN_PLACE_ERROR):
        outcome.backward()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dropout", ["paper", "inverted"])
def test_no_in_place_error_in_alexnet(plain, dropout):
    model = small(plain=plain, dropout=dropout, init="kaiming")
    assert not any(getattr(layer, "inplace", False) for layer in model.modules())
    loss(model(pixels())).backward()
    for name, grad in gradients(model).items():
        assert grad.isfinite().all(), name
        assert grad.norm() > 0, name


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv5"])
def test_pooled_maps_may_be_overwritten(name):
    """What a stage with a pool keeps for backward is not its output."""
    stage = small().features.get_submodule(name)
    x = randn(2, stage.in_channels, 21, 21)
    results = []
    for half in (lambda y: y.mul_(0.5), lambda y: y * 0.5):
        stage.zero_grad()
        half(stage(x)).sum().backward()
        results.append([p.grad for p in stage.parameters()])
    for in_place, expected in zip(*results, strict=True):
        assert_bitwise(in_place, expected)


# -- composes ---------------------------------------------------------------------------------------------------------


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = on_meta(num_classes=10, input_size=SMALL)
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    return other


@pytest.mark.parametrize("travel", [copy.deepcopy, through_pickle, through_file, through_state_dict])
def test_copies_are_the_same_network(travel):
    model = small().eval()
    x = pixels(1)
    logits = model(x)
    assert_bitwise(travel(model).eval()(x), logits)


def test_bfloat16_runs_fused_where_torch_cannot():
    model = small(init="kaiming").eval()
    with torch.no_grad():
        x = pixels()
        expected = model(x)
        logits = model.to(torch.bfloat16)(x.bfloat16())
        assert logits.dtype == torch.bfloat16
        assert difference(logits.float(), expected) < 0.05
        with pytest.raises(NotImplementedError):
            plain_twin(model)(x.bfloat16())


def test_autocast():
    model = small(init="kaiming").eval()
    x = pixels()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    assert difference(logits.float(), expected) < 0.05
    loss(logits.float()).backward()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(model).values())


def test_frozen_weights_leave_the_gradient_of_the_input():
    model = small(init="kaiming").eval()
    results = []
    for weights_too in (True, False):
        x = pixels().requires_grad_()
        model.requires_grad_(weights_too)(x).square().sum().backward()
        results.append(x.grad)
    assert difference(results[1].flatten(1), results[0].flatten(1)) < 1e-5


def test_plain_network_can_be_traced():
    plain = small(plain=True).eval()
    x = pixels()
    assert_bitwise(torch.fx.symbolic_trace(plain)(x), plain(x))


@pytest.mark.slow
def test_compile_in_one_graph():
    model = small(init="kaiming", dropout="inverted").eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        x = pixels(batch)
        expected = model(x)
        loss(expected).backward()
        before = gradients(model)
        model.zero_grad()
        logits = compiled(x)
        loss(logits).backward()
        assert difference(logits, expected) < 1e-5
        for name, grad in gradients(model).items():
            assert difference(grad.flatten()[None], before[name].flatten()[None]) < 1e-4, name
        model.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict):
    model = small(init="kaiming").eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (pixels(2),), dynamic_shapes=shapes, strict=strict).module()
    for batch in (1, 3):
        assert difference(exported(pixels(batch)), model(pixels(batch))) < 1e-5


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "init must be 'paper' or 'as_run' or 'caffe' or 'kaiming', but got init='he'", {"init": "he"}),
        (ValueError, "dropout must be 'paper' or 'inverted', but got dropout=0.5", {"dropout": 0.5}),
        (ValueError, "lrn_groups must be 1 or 2, but got lrn_groups=3", {"lrn_groups": 3}),
        (ValueError, "lrn_groups must be 1 or 2, but got lrn_groups=True", {"lrn_groups": True}),
        (ValueError, "plain must be False or True, but got plain='yes'", {"plain": "yes"}),
        (ValueError, "num_classes must be at least 1, but got num_classes=0", {"num_classes": 0}),
        (TypeError, "argument 'num_classes' must be int, not float", {"num_classes": 10.0}),
        (TypeError, "argument 'num_classes' must be int, not bool", {"num_classes": True}),
        (TypeError, "argument 'input_size' must be int, not tuple", {"input_size": (227, 227)}),
        (ValueError, "input_size must be at least 1, but got input_size=-1", {"input_size": -1}),
        (TypeError, "unexpected option depth=2; allowed are: num_classes, .*lrn_groups", {"depth": 2}),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_refused_options_name_the_option_its_value_and_what_is_allowed(error, match, options):
    with pytest.raises(error, match=rf"^alexnet\(\): .*{match}"):
        on_meta(**options)


@pytest.mark.parametrize(("size", "layer"), [(7, "conv1"), (8, "pool1"), (15, "pool1"), (31, "pool2"), (63, "pool5")])
def test_input_too_small_names_the_layer_where_the_map_vanishes(size, layer):
    message = (
        f"input_size must be at least {SMALLEST}, but got input_size={size}: nothing is left of the map at {layer}"
    )
    with pytest.raises(ValueError, match=message):
        on_meta(input_size=size)
    message = rf"\(N, 3, 227, 227\), but got \(1, 3, 400, {size}\): nothing would be left of the map at {layer}"
    with pytest.raises(RuntimeError, match=message):
        on_meta()(torch.empty(1, 3, 400, size, device="meta"))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 3, 224, 224), (1, 3, 227, 224), (3, 227, 227), (1, 1, 227, 227), (2,)], ids=ident
)
def test_images_of_another_shape_are_refused(plain, shape):
    with pytest.raises(RuntimeError, match=r"expected an input of shape \(N, 3, 227, 227\), but got \(") as error:
        on_meta(plain=plain)(torch.empty(shape, device="meta"))
    assert str(shape) in str(error.value)
    assert ("create the model with their input_size" in str(error.value)) == (shape[:2] == (1, 3))


def test_input_that_is_no_tensor_raises_as_torch():
    with pytest.raises(TypeError):
        F.conv2d([1.0], torch.zeros(1, 3, 1, 1))
    with pytest.raises(TypeError, match="argument 'input' must be Tensor, not list"):
        on_meta()([1.0])


@pytest.mark.parametrize("plain", [False, True])
def test_photographs_that_are_still_uint8_raise_as_torch(plain):
    with pytest.raises(RuntimeError, match=r"unsigned char|Byte"):
        small(plain=plain)(torch.zeros(1, 3, SMALL, SMALL, dtype=torch.uint8))
