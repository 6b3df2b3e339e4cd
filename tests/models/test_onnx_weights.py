"""load_weights of ONNX files: what is loaded computes what the file computes, or is refused."""

import pytest
import torch
import torch.nn.functional as F
from promises import assert_bitwise, randn
from torch import nn

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams, models
from fastcnn.models.layers import PaperDropout

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from .onnx_graphs import (  # noqa: E402
    assert_same_as_onnxruntime,
    node,
    randomized,
    save_graph,
    set_at_random,
    snapshot,
    unset,
)

pytestmark = pytest.mark.usefixtures("best_backend")


def refused(model, path, *said, **options):
    """The message names all of these, and the model is as it was."""
    before, modules = snapshot(model), repr(model)
    with pytest.raises(models.WeightsError) as error:
        models.load_weights(model, path, **options)
    assert [words for words in said if words not in str(error.value)] == []
    for key, value in model.state_dict().items():
        assert_bitwise(value, before[key])
    assert repr(model) == modules
    return error.value


# -- published graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "name", "options", "strict", "lrn"),
    [
        ("bvlc_alexnet", "alexnet", {"input_size": 67, "lrn_groups": 1}, False, LRNParams(5, 1e-4, 0.75, 1.0)),
        ("bvlc_alexnet", "alexnet", {"input_size": 96, "plain": True}, False, LRNParams(5, 1e-4, 0.75, 1.0)),
        ("zfnet512", "zfnet512", {"input_size": 100}, True, LRNParams(5, 5e-4, 0.75, 2.0)),
        ("inception_v1", "inception_v1", {}, False, LRNParams(5, 1e-4, 0.75, 1.0)),
        ("inception_v1", "inception_v1", {"plain": True, "ceil_mode": False}, True, LRNParams(5, 1e-4, 0.75, 1.0)),
        ("vgg19", "vgg_e", {"input_size": 32}, True, None),
        ("squeezenet", "squeezenet1_1", {}, False, None),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_published_graphs(graph, name, options, strict, lrn, tmp_path):
    model = unset(name, **options)
    size = None if graph in ("inception_v1", "squeezenet") else model.input_size
    path = randomized(graph, tmp_path / "graph.onnx", input_size=size)
    if not strict:
        refused(model, path, " in the file", "adapt=True would resolve all of this")
    report = models.load_weights(model, path, adapt=not strict, verify=True)
    assert_same_as_onnxruntime(model, path, 64 * randn(2, 3, model.input_size, model.input_size))
    assert report.verified < 1e-5
    assert report.lrn == ([lrn] * 2 if lrn else [])
    assert report.tensors == len(model.state_dict())
    from_caffe = graph != "zfnet512"
    assert (report.colours, report.mean) == (("BGR", (104.0, 117.0, 123.0)) if from_caffe else (None, None))
    assert (model.preprocessing.name == "caffe") or not from_caffe


def test_what_was_changed_is_reported(tmp_path):
    path = randomized("bvlc_alexnet", tmp_path / "graph.onnx", input_size=96, softmax=True)
    text = str(models.load_weights(unset("alexnet", input_size=96), path, adapt=True))
    for line in (
        "16 tensors from ",
        "LRN: LRNParams(size=5, alpha=0.0001, beta=0.75, k=1.0, groups=1), 2 times",
        "LRN features.conv1: k 2.0 became 1.0, as in LRN n2 of the file",
        "LRN features.conv1: groups 2 became 1, as in LRN n2 of the file",
        "Conv features.conv1: padding at the end (3, 3) became (0, 0), as in Conv n0 of the file",
        "MaxPool features.conv5: padding at the end (0, 0) became (1, 1), as in MaxPool n14 of the file",
        "classifier.fc8.weight is 2 times the file's: the model scales its input by 0.5",
        "colours: BGR",
        "mean: (104.0, 117.0, 123.0), of pixels 0 to 255",
        "note: the file ends with Softmax; the model returns the values before it",
    ):
        assert line in text


def test_images_of_another_size_are_refused_or_taken_over(tmp_path):
    path = randomized("zfnet512", tmp_path / "graph.onnx", input_size=100)
    model = unset("zfnet512", input_size=104)  # with as many features in front of fc6
    refused(model, path, "the model does not take images of 3x100x100: zfnet512(): ")
    assert "input_size 104 became 100" in str(models.load_weights(model, path, adapt=True))
    assert_same_as_onnxruntime(model, path, 64 * randn(1, 3, 100, 100))


def test_another_networks_graph_lists_every_mismatch(tmp_path):
    path = randomized("bvlc_alexnet", tmp_path / "graph.onnx", input_size=67)
    error = refused(
        unset("caffenet", input_size=67),
        path,
        "LRN n2 in the file, MaxPool features.conv1 in the model",
        "MaxPool n3 in the file, LRN features.norm1 in the model",
        "MaxPool n7 in the file, LRN features.norm2 in the model",
        adapt=True,
    )
    assert len(error.mismatches) == 4
    refused(
        unset("alexnet_one_tower", num_classes=10, input_size=67),
        path,
        "Conv n4: groups is 2 in the file and 1 in the model, Conv features.conv2",
        "features.conv4.weight is (384, 192, 3, 3) in the file and (384, 384, 3, 3) in the model",
        "classifier.fc8.bias is (1000,) in the file and (10,) in the model",
        adapt=True,
    )


# -- one thing is another in the file than in the model ---------------------------------------------------------------

W = randn(8, 3, 3, 3)
CONV = {"w": W, "b": randn(8)}
NORM = {"scale": randn(8).abs() + 0.5, "shift": randn(8), "mean": randn(8), "var": torch.full((8,), 1e-3)}
CONVOLVED = node("Conv", "image w b", "c", kernel_shape=[3, 3])
RELU = node("Relu", "c", "r")


def normed(before="c", **attributes):
    return node("BatchNormalization", f"{before} scale shift mean var", "n", **attributes)


def conv(**options):
    return nn.Conv2d(3, 8, 3, **options)


class Swapped(nn.Module):
    """Its layers are registered in another order than called."""

    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.third(self.second(F.relu(self.first(x))))


class Branches(nn.Module):
    """Branches of equal shapes, registered in another order than joined."""

    def __init__(self):
        super().__init__()
        self.b, self.a, self.c = (nn.Conv2d(3, 4, 1) for _ in range(3))

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x).relu(), self.c(x).relu()], 1)


PADDED = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
ORDER = [
    node("Conv", "image first.weight first.bias", "a", **PADDED),
    node("Relu", "a", "r"),
    node("Conv", "r second.weight second.bias", "s", **PADDED),
    node("Conv", "s third.weight third.bias", "t", **PADDED),
]
BRANCHES = [
    node("Conv", "image a.weight a.bias", "x", kernel_shape=[1, 1]),
    node("Conv", "image b.weight b.bias", "y", kernel_shape=[1, 1]),
    node("Conv", "image c.weight c.bias", "z", kernel_shape=[1, 1]),
    node("Relu", "y", "yr"),
    node("Relu", "z", "zr"),
    node("Concat", "x yr zr", "joined", axis=1),
]


@pytest.mark.parametrize(("network", "nodes"), [(Swapped, ORDER), (Branches, BRANCHES)])
def test_the_graph_decides_which_weights_go_where(network, nodes, tmp_path):
    source = set_at_random(network())
    path = save_graph(tmp_path / "graph.onnx", nodes, source.state_dict())
    model = network()
    models.load_weights(model, path)
    for key, value in model.state_dict().items():
        assert_bitwise(value, source.state_dict()[key])
    assert_same_as_onnxruntime(model, path, randn(1, 3, 8, 8))


def test_branches_joined_in_another_order_are_refused(tmp_path):
    nodes = [*BRANCHES[:-1], node("Concat", "yr x zr", "joined", axis=1)]
    path = save_graph(tmp_path / "graph.onnx", nodes, Branches().state_dict())
    refused(Branches(), path, "Relu the_yr in the file, Conv a in the model")


def test_one_layer_of_the_model_for_two_of_the_file_is_refused(tmp_path):
    shared = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    tensors = {"v": randn(3, 3, 1, 1), "w": -randn(3, 3, 1, 1), "b": randn(3)}
    first = node("Conv", "image v b", "c", kernel_shape=[1, 1])
    nodes = [first, RELU, node("Conv", "r w b", "d", kernel_shape=[1, 1])]
    path = save_graph(tmp_path / "graph.onnx", nodes, tensors)
    refused(model, path, "0.weight of the model would have to hold two different tensors of the file")
    nodes[-1] = node("Conv", "r v b", "d", kernel_shape=[1, 1])
    models.load_weights(model, save_graph(tmp_path / "graph.onnx", nodes, tensors))
    assert_same_as_onnxruntime(model, tmp_path / "graph.onnx", randn(1, 3, 8, 8))


POOL = {"kernel_shape": [3, 3], "strides": [2, 2]}
# one thing each: nodes, the model, what is said, and whether adapt=True takes it over, None if the caller has to
OTHERS = {
    "epsilon": (
        [CONVOLVED, normed(epsilon=1e-3), node("Relu", "n", "y")],
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU()),
        "BatchNormalization the_n: epsilon is 0.001 in the file and 1e-05 in the model, BatchNormalization 1",
        True,
    ),
    "relu before the norm": (
        [CONVOLVED, RELU, normed("r")],
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8, eps=1e-5), nn.ReLU()),
        "BatchNormalization the_n in the file, Relu 2 in the model",
        False,
    ),
    "no relu": ([CONVOLVED], lambda: nn.Sequential(conv(), nn.ReLU()), "Conv the_c in the file, Relu 1 in", False),
    "a relu more": ([CONVOLVED, RELU], lambda: nn.Sequential(conv()), "Relu the_r in the file, Conv 0 in", False),
    "no relu in a fused layer": ([CONVOLVED], lambda: fastcnn.nn.ConvReLU2d(3, 8, 3), "Conv the_c in the file", False),
    "stride": (
        [node("Conv", "image w b", "c", kernel_shape=[3, 3], strides=[2, 1])],
        lambda: nn.Sequential(conv()),
        "Conv the_c: stride is (2, 1) in the file and (1, 1) in the model, Conv 0",
        True,
    ),
    "dilation": (
        [node("Conv", "image w b", "c", kernel_shape=[3, 3], dilations=[2, 2])],
        lambda: nn.Sequential(conv()),
        "dilation is (2, 2) in the file and (1, 1) in the model",
        True,
    ),
    "padding": (
        [node("Conv", "image w b", "c", kernel_shape=[3, 3], pads=[1, 0, 1, 0])],
        lambda: nn.Sequential(conv()),
        "padding at the start is (1, 0) in the file and (0, 0) in the model",
        True,
    ),
    "uneven padding": (
        [node("Conv", "image w b", "c", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])],
        lambda: nn.Sequential(conv(stride=2)),
        "padding at the end is (1, 1) in the file and (0, 0) in the model",
        False,
    ),
    "auto_pad": (
        [node("Conv", "image w b", "c", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER")],
        lambda: nn.Sequential(conv(stride=2)),
        "padding at the end is (1, 1) in the file and (0, 0) in the model",
        False,
    ),
    "Pad": (
        [node("Pad", "image pads", "p"), node("Conv", "p w b", "c", kernel_shape=[3, 3], strides=[2, 2])],
        lambda: nn.Sequential(conv(stride=2)),
        "padding at the end is (1, 1) in the file and (0, 0) in the model",
        False,
    ),
    "another padding module": (
        [node("Conv", "image w b", "c", kernel_shape=[3, 3], pads=[0, 0, 1, 1])],
        lambda: nn.Sequential(nn.ZeroPad2d((0, 2, 0, 2)), conv()),
        "padding at the end is (1, 1) in the file and (2, 2) in the model",
        True,
    ),
    "padding on the other side": (
        [node("Conv", "image w b", "c", kernel_shape=[3, 3], pads=[1, 1, 0, 0])],
        lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv()),
        "padding at the start is (1, 1) in the file and (0, 0) in the model",
        True,
    ),
    "another window with as many outputs": (
        [CONVOLVED, node("MaxPool", "c", "p", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)],
        lambda: nn.Sequential(conv(), nn.MaxPool2d(2)),
        "MaxPool the_p: kernel is (3, 3) in the file and (2, 2) in the model",
        True,
    ),
    "circular padding": (
        [node("Conv", "image w b", "c", **PADDED)],
        lambda: nn.Sequential(conv(padding=1, padding_mode="circular")),
        "nothing in the file, pad() 0 in the model",
        False,
    ),
    "rounding": (
        [CONVOLVED, node("MaxPool", "c", "p", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)],
        lambda: nn.Sequential(conv(), nn.MaxPool2d(3, 2)),
        "ceil_mode is True in the file and False in the model",
        True,
    ),
    "uneven padding of a pool": (
        [CONVOLVED, node("MaxPool", "c", "p", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1])],
        lambda: nn.Sequential(conv(), nn.MaxPool2d(3, 2)),
        "padding at the end is (1, 1) in the file and (0, 0) in the model",
        True,  # at this size it is what rounding up does
    ),
    "a pool of a function": (
        [CONVOLVED, node("MaxPool", "c", "p", kernel_shape=[2, 2])],
        lambda: Function(conv(), lambda x: F.max_pool2d(x, 2)),
        "MaxPool the_p: stride is (1, 1) in the file and (2, 2) in the model",
        False,  # there is nowhere to set it
    ),
    "padding counted": (
        [CONVOLVED, node("AveragePool", "c", "p", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])],
        lambda: nn.Sequential(conv(), nn.AvgPool2d(3, 2, 1)),
        "AveragePool the_p: count_include_pad is False in the file and True in the model",
        True,
    ),
    "average and maximum": (
        [CONVOLVED, node("AveragePool", "c", "p", kernel_shape=[2, 2], strides=[2, 2])],
        lambda: nn.Sequential(conv(), nn.MaxPool2d(2)),
        "AveragePool the_p in the file, MaxPool 1 in the model",
        False,
    ),
    "LRN": (
        [CONVOLVED, node("LRN", "c", "l", size=3, alpha=0.1, beta=0.5, bias=2.0)],
        lambda: nn.Sequential(conv(), nn.LocalResponseNorm(5)),
        "LRN the_l: size is 3 in the file and 5 in the model, alpha is 0.1 in the file and 0.0001 in the model",
        True,
    ),
    "LRN of a fused layer": (
        [CONVOLVED, RELU, node("LRN", "r", "l", size=3, alpha=0.1)],
        lambda: nn.Sequential(conv(), fastcnn.nn.ReLULRNMaxPool2d(lrn=LRNParams(5))),
        "LRN the_l: size is 3",
        True,
    ),
    "groups of LRN": (
        [CONVOLVED, node("LRN", "c", "l", size=5)],
        lambda: nn.Sequential(conv(), fastcnn.nn.LocalResponseNorm(5, groups=2)),
        "LRN the_l: groups is 1 in the file and 2 in the model, LRN 1",
        True,
    ),
    "order of features": (
        [
            CONVOLVED,
            node("Transpose", "c", "t", perm=[0, 2, 3, 1]),
            node("Flatten", "t", "f"),
            node("MatMul", "f fc", "y"),
        ],
        lambda: nn.Sequential(conv(), nn.Flatten(), nn.Linear(288, 2, bias=False)),
        "Transpose the_t in the file, Conv 0 in the model",
        False,
    ),
    "softmax": (
        [CONVOLVED, node("GlobalAveragePool", "c", "g"), node("Flatten", "g", "f"), node("Softmax", "f", "y", axis=1)],
        lambda: nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "Softmax the_y in the file, Flatten 2 in the model",
        None,  # with adapt=True the model gives the logits
    ),
    "arithmetic with the image": (
        [node("Sub", "image offset", "s"), node("Conv", "s w b", "c", kernel_shape=[3, 3])],
        lambda: nn.Sequential(conv()),
        "Sub the_s in the file, nothing in the model",
        None,
    ),
    "a factor": (
        [node("Mul", "image two", "m"), node("Conv", "m w b", "c", kernel_shape=[3, 3])],
        lambda: nn.Sequential(conv()),
        "Mul the_m in the file, nothing in the model",
        True,
    ),
    "a mean of another range": (
        [CONVOLVED, node("AveragePool", "c", "p", kernel_shape=[5, 5])],
        lambda: nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1)),
        "AveragePool the_p in the file, GlobalAveragePool 1 in the model",
        False,
    ),
    "groups": (
        [node("Conv", "image grouped b", "c", kernel_shape=[3, 3], group=1)],
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3)),
        "0.weight is (8, 3, 1, 1) in the file and (8, 3, 3, 3) in the model",
        False,
    ),
    "a leaky relu": ([CONVOLVED, RELU], lambda: nn.Sequential(conv(), nn.LeakyReLU()), "leaky_relu() 1 in", False),
    "a bound": ([CONVOLVED, RELU], lambda: nn.Sequential(conv(), nn.ReLU6()), "Relu the_r in the file, Clip 1", False),
}


class Function(nn.Module):
    def __init__(self, layer, function):
        super().__init__()
        self.layer, self.function = layer, function

    def forward(self, x):
        return self.function(self.layer(x))


TENSORS = {
    **CONV,
    **NORM,
    "pads": torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]),
    "fc": randn(288, 2),
    "offset": randn(1, 3, 1, 1),
    "two": torch.tensor(2.0),
    "grouped": randn(8, 3, 1, 1),
}


def of_nodes(path, nodes, **options):
    used = {name for n in nodes for name in n.input}
    for n in nodes:  # a weight of another size than the kernel is none
        for attribute in n.attribute:
            if attribute.name == "kernel_shape" and "grouped" in n.input:
                attribute.ints[:] = [1, 1]
    return save_graph(path, nodes, {name: t for name, t in TENSORS.items() if name in used}, **options)


OF_ONE_SIZE = ("auto_pad", "order of features", "a mean of another range")


@pytest.mark.parametrize(
    ("what", "is_open"),
    [(what, is_open) for what in OTHERS for is_open in (False, True) if not (is_open and what in OF_ONE_SIZE)],
)
def test_what_is_another_in_the_file_is_refused(what, is_open, tmp_path):
    nodes, make, said, adaptable = OTHERS[what]
    shape = (1, 3, "height", "width") if is_open else (1, 3, 8, 8)
    path = of_nodes(tmp_path / "graph.onnx", nodes, shape=shape)
    model = set_at_random(make())
    refused(model, path, said)
    if what == "uneven padding of a pool":
        adaptable = not is_open
    if adaptable:
        models.load_weights(model, path, adapt=True)
        assert_same_as_onnxruntime(model, path, randn(1, 3, 8, 8))
        for other in (7, 9, 12) if is_open else ():
            assert_same_as_onnxruntime(model, path, randn(2, 3, other, other)[:1])
    elif adaptable is False:
        refused(model, path, said, adapt=True)


def test_images_of_any_size_and_a_file_that_says_nothing_about_them(tmp_path):
    nodes = [CONVOLVED, node("MaxPool", "c", "p", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)]
    path = of_nodes(tmp_path / "graph.onnx", nodes, shape=None)
    refused(nn.Sequential(conv(), nn.MaxPool2d(3, 2)), path, "ceil_mode is True in the file and False in the model")
    model = nn.Sequential(conv(), nn.MaxPool2d(3, 2, ceil_mode=True))
    models.load_weights(model, path)
    for size in (7, 8, 9, 10):
        assert_same_as_onnxruntime(model, path, randn(2, 3, size, size))


def test_what_does_not_matter_at_the_size_of_the_images_may_differ(tmp_path):
    nodes = [CONVOLVED, node("MaxPool", "c", "p", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)]
    path = of_nodes(tmp_path / "graph.onnx", nodes)
    model = nn.Sequential(conv(), nn.MaxPool2d(2))
    assert models.load_weights(model, path).changes == []
    assert_same_as_onnxruntime(model, path, randn(1, 3, 8, 8))


def test_logits_and_images_are_prepared_by_whoever_adapts(tmp_path):
    path = of_nodes(tmp_path / "graph.onnx", OTHERS["softmax"][0])
    report = models.load_weights(OTHERS["softmax"][1](), path, adapt=True, verify=True)
    assert report.verified < 1e-5  # with the softmax
    assert report.notes == ["the file ends with Softmax; the model returns the values before it"]
    path = of_nodes(tmp_path / "graph.onnx", OTHERS["arithmetic with the image"][0])
    report = models.load_weights(nn.Sequential(conv()), path, adapt=True, verify=True)
    assert report.verified < 1e-5
    assert "the file applies this to the image, and the model does not: Sub the_s " in report.notes[0]


def test_an_image_that_goes_two_ways(tmp_path):
    """With adapt=True, one of them cannot be left to the caller."""
    nodes = [
        node("Sub", "image offset", "s"),
        node("Conv", "s w b", "c", kernel_shape=[3, 3]),
        node("Conv", "image w b", "d", kernel_shape=[3, 3]),
        node("Concat", "c d", "y", axis=1),
    ]

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x)], 1)

    refused(Network(), of_nodes(tmp_path / "graph.onnx", nodes), "Sub the_s in the file, nothing in", adapt=True)
    nodes[2] = node("Conv", "s w b", "d", kernel_shape=[3, 3])
    models.load_weights(Network(), of_nodes(tmp_path / "graph.onnx", nodes), adapt=True, verify=True)


def test_factors_of_weights_that_are_used_twice(tmp_path):
    """With adapt=True, one weight cannot make up for two factors, nor one that is no parameter for any."""
    once = [node("Conv", "image v z", "c", **PADDED), node("Mul", "c two", "m"), node("Conv", "m v z", "d", **PADDED)]
    tensors = {"v": randn(3, 3, 3, 3), "z": torch.zeros(3), "two": torch.tensor(2.0)}
    shared = nn.Conv2d(3, 3, 3, padding=1)
    path = save_graph(tmp_path / "graph.onnx", once, tensors)
    refused(nn.Sequential(shared, shared), path, "two different tensors of the file", adapt=True)
    two = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    models.load_weights(two, path, adapt=True, verify=True)
    constant = Function(nn.Conv2d(3, 3, 3, padding=1), lambda y: F.conv2d(y, tensors["v"], torch.zeros(3), padding=1))
    refused(constant, path, "Mul the_m in the file, Conv layer in the model")
    refused(constant, path, "cannot absorb a factor", adapt=True)
    models.load_weights(
        constant, save_graph(path, [once[0], node("Conv", "c v z", "d", **PADDED)], tensors), verify=True
    )


def test_a_constant_along_another_dimension(tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()
            self.register_buffer("mean", torch.zeros(3, 1, 1))

        def forward(self, x):
            return self.conv(x - self.mean)

    nodes = [node("Sub", "image mean", "s"), node("Conv", "s w b", "c", kernel_shape=[3, 3])]
    rows = save_graph(tmp_path / "rows.onnx", nodes, {**CONV, "mean": randn(1, 1, 3, 1)}, shape=(1, 3, 3, 8))
    refused(Network(), rows, "its constant is (1, 3, 1) in the file and (3, 1, 1) in the model")
    channels = save_graph(tmp_path / "c.onnx", nodes, {**CONV, "mean": randn(1, 3, 1, 1)}, shape=(1, 3, 3, 8))
    models.load_weights(Network(), channels, verify=True)


# -- what a model may be made of --------------------------------------------------------------------------------------


class Handwritten(nn.Module):
    """Functions, methods, buffers, views, work in place, and control flow."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, 2, 1, groups=2)
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(32, 5)
        self.register_buffer("mean", torch.rand(3))
        self.register_buffer("std", torch.rand(3, 1, 1) + 1)

    def forward(self, x):
        if x.dim() != 4 or not isinstance(x, torch.Tensor):
            raise ValueError("images, please")
        x = (x - self.mean[:, None, None]) / self.std
        x = F.relu(self.conv1(x), inplace=True)
        same = x
        x += 1
        x = F.max_pool2d(same, 3, 2, 1)
        x = FF.local_response_norm(x, 3, k=2.0) if len(x) else x
        x = self.norm(self.conv2(x)).relu_()
        a, b = x.chunk(2, 1)
        x = torch.cat([a, b.clamp(min=0)], 1) + x
        x = F.dropout(x, training=self.training).contiguous()
        return self.fc(x.view(x.size(0), -1)).log_softmax(1)


def optimized(model):
    return fastcnn.optimize(model, inplace=True)


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("prepare", [lambda m: m, optimized, compiled])
def test_any_code_that_calls_known_functions(prepare, tmp_path):
    source = set_at_random(Handwritten()).eval()
    models.to_onnx(source, tmp_path / "graph.onnx", input_size=8)
    target = set_at_random(Handwritten(), seed=1).train()
    models.load_weights(prepare(target), tmp_path / "graph.onnx", verify=True)
    assert target.training
    assert target.norm.training
    for key, value in target.state_dict().items():
        assert_bitwise(value, source.state_dict()[key])


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda self, x: self.conv(x) if x.sum() > 0 else x, "the model does not take images of 3x8x8: "),
        (lambda self, x: (self.conv(x), x), "the model returns a tuple, not one tensor"),
        (lambda self, x: F.conv2d(x, self.conv.weight * 2, self.conv.bias), "conv2d()"),
        (lambda self, x: self.conv(x).sigmoid(), "sigmoid()"),
        (lambda self, x: self.conv(x).flip(1), "flip()"),
        (lambda self, x: self.conv(torch.zeros_like(x)), "zeros_like()"),
        (lambda self, x: self.conv(x).mul(2).add(1, alpha=3), "add()"),
        (lambda self, x: torch.zeros(8, 6, 6).add_(self.conv(x)), "writes to a constant"),
        (lambda self, x: torch.zeros(1), "the output of the model does not depend on the image"),
    ],
)
def test_what_cannot_be_followed_is_refused(forward, said, tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv()

        def forward(self, x):
            return forward(self, x)

    refused(Network(), of_nodes(tmp_path / "graph.onnx", [CONVOLVED]), said)


def test_work_in_place_on_what_goes_elsewhere_too_is_seen_or_refused(tmp_path):
    class Network(nn.Module):
        def __init__(self, alias):
            super().__init__()
            self.conv, self.alias = conv(), alias

        def forward(self, x):
            y = self.conv(x)
            other = self.alias(y)
            F.relu(y, inplace=True)
            return torch.cat([y, other], 1)

    relu_twice = [CONVOLVED, RELU, node("Concat", "r r", "y", axis=1)]
    path = of_nodes(tmp_path / "graph.onnx", relu_twice)
    model = Network(lambda y: y)
    models.load_weights(model, path)
    assert_same_as_onnxruntime(model, path, randn(1, 3, 8, 8))
    refused(Network(lambda y: y.view(y.shape)), path, "is changed in place under another name")


def test_a_model_of_equal_tensors_and_one_on_the_meta_device(tmp_path):
    path = of_nodes(tmp_path / "graph.onnx", [CONVOLVED])
    with torch.device("meta"):
        model = nn.Sequential(conv())
    with pytest.raises(models.WeightsError, match=r"0\.weight of the model is on the meta device"):
        models.load_weights(model, path)
    model = nn.Sequential(conv()).to(torch.bfloat16)
    assert models.load_weights(model, path, verify=True).verified < 2e-2
    assert model[0].weight.dtype == torch.bfloat16


def test_bias_that_the_graph_leaves_out_is_zero(tmp_path):
    path = of_nodes(tmp_path / "graph.onnx", [node("Conv", "image w", "c", kernel_shape=[3, 3])])
    model = nn.Sequential(conv())
    assert models.load_weights(model, path).changes == ["0 has a bias of 0, for the file has none"]
    assert not model[0].bias.any()
    refused(
        nn.Sequential(conv(bias=False)), of_nodes(tmp_path / "b.onnx", [CONVOLVED]), "Conv 0 of the model has no bias"
    )


def test_layers_that_a_file_has_not(tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.aux = conv(), conv()

        def forward(self, x):
            return self.aux(x) if self.training else self.conv(x)

    path = of_nodes(tmp_path / "graph.onnx", [CONVOLVED])
    refused(Network(), path, "aux.weight is missing in the file; it is (8, 3, 3, 3) in the model")


def test_settings_after_optimize_are_refused(tmp_path):
    path = save_graph(tmp_path / "graph.onnx", [node("LRN", "image", "n", size=5, alpha=0.5)], {})
    models.load_weights(nn.Sequential(nn.LocalResponseNorm(5)), path, adapt=True)
    optimized = fastcnn.optimize(nn.Sequential(nn.LocalResponseNorm(5)))
    refused(optimized, path, "load the weights before", adapt=True)


@pytest.mark.parametrize("own", [PaperDropout, nn.Dropout])
@pytest.mark.parametrize("theirs", [PaperDropout, nn.Dropout])
def test_scale_of_the_papers_dropout(own, theirs, tmp_path):
    def network(dropout):
        return nn.Sequential(conv(), dropout(0.5), nn.Flatten(), dropout(0.2), nn.Linear(288, 5), dropout(0.5))

    path = tmp_path / "graph.onnx"
    models.to_onnx(set_at_random(network(theirs)), path, input_size=8)
    target = network(own)
    if own is not theirs:
        refused(target, path, "Mul ", "in the model")
        refused(target, path, "Mul ", "in the model", adapt=True)  # no weights come after the last
        path = tmp_path / "shorter.onnx"
        models.to_onnx(set_at_random(network(theirs))[:-1], path, input_size=8)
        target = target[:-1]
    models.load_weights(target, path, adapt=own is not theirs)
    assert_same_as_onnxruntime(target, path, randn(3, 3, 8, 8))


def test_verify_restores_a_model_that_differs(tmp_path, monkeypatch):
    from fastcnn.models.graph.onnxruntime import Runtime

    path = of_nodes(tmp_path / "graph.onnx", [CONVOLVED, normed(epsilon=1e-3)])
    plain = Runtime.__call__
    monkeypatch.setattr(Runtime, "__call__", lambda self, x: 1.01 * plain(self, x))
    model = set_at_random(nn.Sequential(conv(), nn.BatchNorm2d(8)))
    refused(model, path, "differs from onnxruntime's by 9.9e-03", adapt=True, verify=True)


def test_adapt_and_verify_are_of_onnx_files(tmp_path):
    torch.save(nn.Conv2d(3, 8, 3).state_dict(), tmp_path / "w.pth")
    for option in ("adapt", "verify"):
        with pytest.raises(ValueError, match=f"{option}=True needs an ONNX file"):
            models.load_weights(nn.Conv2d(3, 8, 3), tmp_path / "w.pth", **{option: True})
