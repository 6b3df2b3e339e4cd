"""from_onnx: a network from a graph computes what onnxruntime computes; what it cannot express is refused."""

import copy
import pickle

import numpy
import pytest
import torch
from promises import assert_bitwise, randn
from torch import nn

import fastcnn
from fastcnn import models

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from .onnx_graphs import (  # noqa: E402
    PUBLISHED,
    assert_same_as_onnxruntime,
    node,
    randomized,
    save_graph,
    set_at_random,
)

pytestmark = pytest.mark.usefixtures("best_backend")

W = {"w": randn(8, 3, 3, 3), "b": randn(8)}
CONV = node("Conv", "image w b", "c", kernel_shape=[3, 3])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_graphs(name, tmp_path):
    small = {"bvlc_alexnet": 67, "vgg19": 32, "zfnet512": 100}  # where fc6 is most of the file
    size = small.get(name, 224)
    path = randomized(name, tmp_path / "graph.onnx", input_size=small.get(name))
    network = models.from_onnx(path)
    images = 64 * randn(1, 3, size, size)
    assert_same_as_onnxruntime(network, path, images)
    assert torch.isfinite(network(images)).all()
    assert not network.training


def test_layers_have_the_names_of_their_weights(tmp_path):
    network = models.from_onnx(randomized("inception_v1", tmp_path / "graph.onnx"))
    assert type(network).__name__ == "inception_v1"
    names = dict(network.named_modules())
    assert isinstance(names["conv1_7x7_s2"], nn.Conv2d)
    assert isinstance(names["conv1_7x7_s2_lrn"], fastcnn.nn.LocalResponseNorm)
    assert isinstance(names["inception_5b_pool_proj_relu"], nn.ReLU)
    assert "inception_3a_1x1.weight" in network.state_dict()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", ["alexnet", "vgg16", "squeezenet1_0", "googlenet"])
def test_torchvisions_networks(name, dynamo, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    source = set_at_random(torchvision.models.get_model(name, weights=None, **options)).eval()
    path, images = tmp_path / "graph.onnx", randn(2, 3, 224, 224)
    torch.onnx.export(source, (images,), path, dynamo=dynamo, verbose=False)
    network = models.from_onnx(path)
    assert_same_as_onnxruntime(network, path, images)
    if name != "googlenet":  # whose batch norm exporters put into the weights
        assert set(network.state_dict()) == set(source.state_dict())
        target = torchvision.models.get_model(name, weights=None).train()
        models.load_weights(target, path)
        torch.testing.assert_close(target.eval()(images), source(images), rtol=1e-4, atol=1e-5)


# -- operators one by one ---------------------------------------------------------------------------------------------

SMALL = {
    "pads": torch.tensor([0, 0, 0, 1, 0, 0, 2, 0]),
    "minus_inf": torch.tensor(float("-inf")),
    "one": torch.tensor(1.0),
    "zero": torch.tensor(0.0),
    "two": torch.tensor(2.0),
    "half": torch.tensor(0.5),
    "no": torch.tensor(False),
    "channel": randn(1, 8, 1, 1),
    "each": randn(8).abs() + 0.5,
    "fc": randn(288, 4),
    "fc_t": randn(4, 288),
    "row": randn(1, 4),
    "last": randn(6, 5),
    "flat": torch.tensor([0, -1]),
    "flat1": torch.tensor([-1, 288]),
    "map": torch.tensor([0, 4, 2, 6, 6]),
    "map2": torch.tensor([0, 8, 6, 6]),
    "axes": torch.tensor([2, 3]),
    "parts": torch.tensor([3, 5]),
    "begin": torch.tensor([2]),
    "end": torch.tensor([-1]),
    "axis1": torch.tensor([1]),
}


def pool(kind, **attributes):
    return [CONV, node(kind, "c", "p", **{"kernel_shape": [3, 3], "strides": [2, 2], **attributes})]


NORM = node("BatchNormalization", "c each b b each", "n", epsilon=1e-3)
GRAPHS = {
    "conv with everything": [
        node("Conv", "image w", "c", kernel_shape=[3, 3], strides=[2, 1], dilations=[1, 2], pads=[1, 2, 0, 1])
    ],
    "conv SAME_UPPER": [node("Conv", "image w b", "c", strides=[2, 2], auto_pad="SAME_UPPER")],
    "conv SAME_LOWER": [node("Conv", "image w b", "c", strides=[3, 2], auto_pad="SAME_LOWER")],
    "conv VALID": [node("Conv", "image w b", "c", strides=[3, 2], auto_pad="VALID")],
    "max-pool": pool("MaxPool", pads=[1, 0, 1, 1]),
    "max-pool padded by more than half": pool("MaxPool", pads=[2, 2, 2, 2]),
    "max-pool padded at one end": pool("MaxPool", pads=[2, 0, 0, 1]),
    "max-pool rounding up": pool("MaxPool", ceil_mode=1, dilations=[1, 2]),
    "max-pool SAME_UPPER": pool("MaxPool", auto_pad="SAME_UPPER"),
    "max-pool after Pad": [
        CONV,
        node("Pad", "c pads minus_inf", "p"),
        node("MaxPool", "p", "y", kernel_shape=[3, 3], strides=[1, 1]),
    ],
    "max-pool after Pad with zeros": [
        CONV,
        node("Pad", "c pads", "p"),
        node("MaxPool", "p", "y", kernel_shape=[3, 3], strides=[1, 1]),
    ],
    "average": pool("AveragePool", pads=[1, 1, 1, 1]),
    "average counting": pool("AveragePool", pads=[1, 1, 1, 1], count_include_pad=1),
    "average counting unevenly": pool("AveragePool", pads=[1, 0, 0, 1], count_include_pad=1),
    "average padded at the end": pool("AveragePool", pads=[0, 0, 1, 1]),
    "average rounding up": pool("AveragePool", ceil_mode=1, kernel_shape=[2, 3]),
    "average SAME_UPPER": pool("AveragePool", auto_pad="SAME_UPPER", kernel_shape=[2, 2], strides=[2, 2]),
    "average of all": pool("AveragePool", kernel_shape=[6, 6], strides=[1, 1]),
    "global pools": [
        CONV,
        node("GlobalMaxPool", "c", "m"),
        node("GlobalAveragePool", "c", "a"),
        node("Concat", "m a", "y", axis=1),
    ],
    "mean": [CONV, node("ReduceMean", "c", "m", axes=[-1, 2], keepdims=0)],
    "batch norm and its scale": [CONV, NORM, node("Mul", "n channel", "m"), node("Add", "m channel", "y")],
    "batch norm times a number": [CONV, NORM, node("Mul", "n half", "m")],
    "LRN": [CONV, node("LRN", "c", "l", size=3, alpha=0.1, beta=0.5, bias=2.0)],
    "LRN of parts": [
        CONV,
        node("Split", "c", "p q", axis=1),
        node("LRN", "p", "l", size=3, alpha=0.1),
        node("LRN", "q", "m", size=3, alpha=0.1),
        node("Concat", "l m", "y", axis=1),
    ],
    "LRN of swapped parts": [
        CONV,
        node("Split", "c", "p q", axis=1),
        node("LRN", "q", "l", size=3, alpha=0.1),
        node("LRN", "p", "m", size=3, alpha=0.1),
        node("Concat", "l m", "y", axis=1),
    ],
    "split unevenly": [CONV, node("Split", "c parts", "p q", axis=1), node("Concat", "q p", "y", axis=1)],
    "slice": [CONV, node("Slice", "c begin end axis1", "y")],
    "clip": [CONV, node("Clip", "c zero two", "y")],
    "clip below": [CONV, node("Clip", "c half", "y")],
    "gemm": [CONV, node("Flatten", "c", "f"), node("Gemm", "f fc row", "g", alpha=0.5, beta=2.0)],
    "gemm transposed": [CONV, node("Reshape", "c flat", "f"), node("Gemm", "f fc_t", "g", transB=1)],
    "matmul and its bias": [
        CONV,
        node("Reshape", "c flat1", "f"),
        node("MatMul", "f fc", "g"),
        node("Add", "row g", "y"),
    ],
    "matmul over rows of a map": [CONV, node("MatMul", "c last", "y")],
    "channel shuffle": [
        CONV,
        node("Reshape", "c map", "r"),
        node("Transpose", "r", "t", perm=[0, 2, 1, 3, 4]),
        node("Reshape", "t map2", "y"),
    ],
    "squeeze and unsqueeze": [
        CONV,
        node("GlobalAveragePool", "c", "a"),
        node("Squeeze", "a axes", "s"),
        node("Unsqueeze", "s axes", "y"),
    ],
    "arithmetic": [
        node("Sub", "image half", "s"),
        node("Conv", "s w b", "c"),
        node("Div", "c channel", "d"),
        node("Mul", "d c", "m"),
        node("Sub", "m d", "n"),
        node("Sum", "n m c", "y"),
    ],
    "bias of a convolution": [node("Conv", "image w", "c"), node("Add", "c channel", "y")],
    "dropout": [CONV, node("Dropout", "c half no", "d"), node("Relu", "d", "y")],
    "softmax over channels": [CONV, node("Softmax", "c", "y", axis=1)],
    "log softmax": [CONV, node("Flatten", "c", "f"), node("LogSoftmax", "f", "y")],
    "the same weight twice": [
        CONV,
        node("Relu", "image", "i"),
        node("Conv", "i w b", "d", kernel_shape=[3, 3]),
        node("Add", "c d", "y"),
    ],
    "numbers for names": [
        node("Conv", "image w b", "7"),
        node("Relu", "7", "8"),
        node("MaxPool", "8", "9", kernel_shape=[2, 2]),
    ],
    "names of methods": [node("Conv", "image w b", "forward"), node("Relu", "forward", "train")],
}


def save(path, nodes, **options):
    used = {name for n in nodes for name in n.input}
    return save_graph(path, nodes, {k: t for k, t in {**W, **SMALL}.items() if k in used}, **options)


@pytest.mark.parametrize("what", GRAPHS)
def test_operators(what, tmp_path):
    path = save(tmp_path / "graph.onnx", GRAPHS[what])
    network = models.from_onnx(path)
    assert_same_as_onnxruntime(network, path, randn(3, 3, 8, 8), 1e-6)
    assert len(network(randn(0, 3, 8, 8))) == 0


def test_a_layer_that_a_file_uses_twice_is_one(tmp_path):
    network = models.from_onnx(save(tmp_path / "graph.onnx", GRAPHS["the same weight twice"]))
    assert [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)] == ["w"]


def test_operators_of_old_opsets(tmp_path):
    nodes = [
        node("Pad", "image", "p", pads=[0, 0, 1, 0, 0, 0, 0, 1]),
        node("Conv", "p w b", "c"),
        node("BatchNormalization", "c each b b each", "n"),
        node("Clip", "n", "l", min=0.0, max=6.0),
        node("AveragePool", "l", "a", kernel_shape=[2, 2], strides=[2, 2]),
        node("Split", "a", "q r", axis=1, split=[3, 5]),
        node("Dropout", "r", "d mask", ratio=0.25),
        node("Unsqueeze", "d", "u", axes=[2]),
        node("Squeeze", "u", "s", axes=[2]),
        node("ReduceMean", "s", "m", axes=[2, 3]),
        node("Softmax", "m", "y"),
    ]
    for opset in (7, 8, 10):
        path = save(tmp_path / f"{opset}.onnx", nodes, opset=opset)
        assert_same_as_onnxruntime(models.from_onnx(path), path, randn(2, 3, 8, 8), 1e-6)


def test_images_of_any_number_and_size(tmp_path):
    nodes = [
        CONV,
        node("Relu", "c", "r"),
        node("MaxPool", "r", "p", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        node("GlobalAveragePool", "p", "g"),
        node("Shape", "g", "s"),
        node("Gather", "s first", "n", axis=0),
        node("Unsqueeze", "n zeroth", "u"),
        node("Concat", "u rest", "shape", axis=0),
        node("Reshape", "g shape", "y"),
    ]
    tensors = {**W, "first": torch.tensor(0), "zeroth": torch.tensor([0]), "rest": torch.tensor([-1])}
    path = save_graph(tmp_path / "graph.onnx", nodes, tensors, shape=("batch", 3, "height", "width"))
    network = models.from_onnx(path)
    for shape in ((1, 3, 8, 8), (3, 3, 9, 12), (2, 3, 10, 7)):
        assert_same_as_onnxruntime(network, path, randn(*shape), 1e-6)


def external(tmp_path, location, **places):
    """A file whose weight is in another."""
    path = save(tmp_path / "graph.onnx", [node("Conv", "image w", "c")])
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    (tmp_path / "weights.bin").write_bytes(b"1234" + tensor.raw_data)
    onnx.external_data_helper.set_external_data(
        tensor, location, **{"offset": 4, "length": len(tensor.raw_data), **places}
    )
    tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    return path


def test_weights_in_another_file_of_the_folder(tmp_path):
    path = external(tmp_path, "weights.bin")
    network = models.from_onnx(path)
    assert_bitwise(network.w.weight.detach(), W["w"])
    assert_same_as_onnxruntime(network, path, randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("location", "places", "said"),
    [
        ("../weights.bin", {}, "not a file in its folder"),
        ("sub/../../weights.bin", {}, "not a file in its folder"),
        ("/etc/passwd", {}, "not a file in its folder"),
        ("link", {}, "not a file in its folder"),
        ("absent.bin", {}, "not a file in its folder"),
        (".", {}, "not a file in its folder"),
        ("weights.bin", {"offset": 8}, "beyond the end"),
        ("weights.bin", {"length": 1 << 40}, "beyond the end"),
        ("weights.bin", {"length": 12}, "graph.onnx"),
    ],
)
def test_weights_elsewhere_are_refused(location, places, said, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = external(folder, location, **places)
    (tmp_path / "weights.bin").write_bytes((folder / "weights.bin").read_bytes())
    (folder / "link").symlink_to(tmp_path / "weights.bin")
    with pytest.raises(models.WeightsError, match=said):
        models.from_onnx(path)


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    ([node("Sin", "image", "s")], {}, "Sin the_s: no such operator is supported"),
    ([node("LRN", "image", "n", size=4)], {}, "LRN the_n: its size is 4: an even window looks one channel further"),
    ([node("LRN", "image", "n", size=3, alpha=0.0)], {}, "LRN the_n: alpha=0.0"),
    ([node("Conv", "image image", "c")], {}, "Conv the_c: its input 'image' is not a constant"),
    ([node("Conv", "image w", "c", pads=[3, 0, 0, 0])], {}, "Conv the_c: its padding is as large as its window"),
    ([node("MaxPool", "image", "p", kernel_shape=[3])], {}, "the_p"),
    ([node("MaxPool", "image", "p", kernel_shape=[9, 9])], {}, "the_p"),
    ([node("MaxPool", "image", "p q", kernel_shape=[3, 3])], {}, "MaxPool the_p: its output 'q' is not supported"),
    ([node("MaxPool", "image", "p", kernel_shape=[3, 3], ceil_mode=2)], {}, "its ceil_mode is 2, neither 0 nor 1"),
    (
        [node("MaxPool", "image", "p", kernel_shape=[3, 3], auto_pad="SAME_UPPER", strides=[2, 2])],
        {"shape": (1, 3, None, None)},
        "auto_pad with a stride depends on the size of the map",
    ),
    ([node("AveragePool", "image", "p", kernel_shape=[3, 3], pads=[1, 0, 0, 0])], {}, "no layer that pads like this"),
    ([node("Pad", "image pads", "p", mode="reflect")], {}, "Pad the_p: its mode is 'reflect'"),
    ([node("Gemm", "image fc", "g", transA=1)], {"shape": (288, 1)}, "Gemm the_g: its image is transposed"),
    ([node("Dropout", "image half yes", "d")], {}, "Dropout the_d: it drops values, as in training"),
    (
        [CONV, node("BatchNormalization", "c each b b each", "n m v", training_mode=1)],
        {"opset": 15},
        "BatchNormalization the_n: only batch norm by stored statistics of each channel is supported",
    ),
    (
        [CONV, node("BatchNormalization", "c each b b each", "n", training_mode=1)],
        {"opset": 15},
        "the_n",
    ),
    ([node("Flatten", "image", "f", axis=2)], {}, "Flatten the_f: its axis is 2"),
    ([node("Reshape", "image one_row", "r")], {"shape": (2, 3, 8, 8)}, "does not leave the batch as it is"),
    ([node("Concat", "image image", "c", axis=0)], {}, "Concat the_c: operations across the batch"),
    ([node("Transpose", "image", "t", perm=[1, 0, 2, 3])], {}, "moves the batch"),
    ([node("Softmax", "image", "y", axis=1)], {"opset": 11}, "a softmax over several dimensions"),
    ([node("Add", "image image2", "y")], {}, "image2"),
    ([node("Div", "two image", "y")], {}, "Div the_y: a constant minus an output"),
    ([node("Relu", "image", "r", nonsense=1)], {}, "nonsense"),
    ([node("Relu", "image", "r")], {"opset": 6}, "its opset is 6; supported are 7 to 25"),
    ([node("Relu", "image", "r")], {"opset": 99}, "its opset is 99"),
    ([node("Relu", "image", "r")], {"shape": (0, 3, 8, 8)}, "length 0"),
]  # fmt: skip
SMALL.update(yes=torch.tensor(True), one_row=torch.tensor([1, -1]))


@pytest.mark.parametrize(
    ("nodes", "options", "said"), REFUSED, ids=lambda v: v[-1].op_type if isinstance(v, list) else ""
)
def test_what_is_refused(nodes, options, said, tmp_path):
    path = save(tmp_path / "graph.onnx", nodes, **options)
    with pytest.raises(models.WeightsError) as error:
        models.from_onnx(path)
    assert said in str(error.value)


def test_every_unsupported_node_is_named(tmp_path):
    path = save(tmp_path / "graph.onnx", [node("Sin", "image", "s"), node("Relu", "s", "r"), node("Elu", "r", "e")])
    with pytest.raises(models.WeightsError) as error:
        models.from_onnx(path)
    assert error.value.mismatches == [
        "Sin the_s: no such operator is supported",
        "Elu the_e: no such operator is supported",
    ]


def test_inputs_outputs_types_and_versions(tmp_path):
    def changed(change):
        model = onnx.load(save(tmp_path / "graph.onnx", [CONV, node("Relu", "c", "r")]))
        change(model)
        (tmp_path / "changed.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(models.WeightsError) as error:
            models.from_onnx(tmp_path / "changed.onnx")
        return str(error.value)

    info = onnx.helper.make_tensor_value_info
    assert "it has 2 outputs, not one: r, c" in changed(lambda m: m.graph.output.append(info("c", 1, None)))
    assert "it has 2 inputs, not one: image, x" in changed(lambda m: m.graph.input.append(info("x", 1, None)))
    assert "it has 0 outputs" in changed(lambda m: m.graph.output.pop())
    half = onnx.numpy_helper.from_array(W["w"].numpy().astype(numpy.float16), "w")
    assert "changed.onnx" in changed(lambda m: m.graph.initializer[0].CopyFrom(half))
    assert "its IR version is 0" in changed(lambda m: m.ClearField("ir_version"))
    assert "it contains no graph" in changed(lambda m: m.ClearField("graph"))
    assert "changed.onnx" in changed(lambda m: m.graph.node.reverse())


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"from_onnx\(\): there is no file .*absent\.onnx"):
        models.from_onnx(tmp_path / "absent.onnx")


# -- what the network is good for -------------------------------------------------------------------------------------


@pytest.fixture
def stages(tmp_path):
    """A network of the stages that optimize() fuses."""
    nodes = [
        node("Conv", "image conv1.weight conv1.bias", "c1", strides=[1, 1]),
        node("Relu", "c1", "r1"),
        node("LRN", "r1", "n1", size=5, alpha=0.01),
        node("MaxPool", "n1", "p1", kernel_shape=[3, 3], strides=[2, 2]),
        node("Conv", "p1 conv2.weight conv2.bias", "c2", group=2, pads=[1, 1, 1, 1]),
        node("Relu", "c2", "r2"),
        node("MaxPool", "r2", "p2", kernel_shape=[3, 3], strides=[2, 2]),
        node("Flatten", "p2", "f"),
        node("Dropout", "f", "d"),
        node("Gemm", "d fc.weight fc.bias", "y", transB=1),
    ]
    tensors = {
        "conv1.weight": randn(8, 3, 3, 3),
        "conv1.bias": randn(8),
        "conv2.weight": randn(12, 4, 3, 3),
        "conv2.bias": randn(12),
        "fc.weight": randn(5, 12 * 9),
        "fc.bias": randn(5),
    }
    path = save_graph(tmp_path / "graph.onnx", nodes, tensors, shape=("batch", 3, 17, 17))
    return models.from_onnx(path), path


def test_it_is_fused(stages):
    network, path = stages
    optimized = fastcnn.optimize(network)
    assert_same_as_onnxruntime(optimized, path, randn(2, 3, 17, 17))
    assert not optimized.fastcnn_report.plain
    assert len(optimized.fastcnn_report.replaced) == 2


def test_it_is_trained_and_saved(stages):
    network, _ = stages
    network.train()
    images, classes = randn(8, 3, 17, 17), torch.arange(8) % 5
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(network(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert_bitwise(other.eval()(images), network.eval()(images))
