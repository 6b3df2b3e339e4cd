"""load_weights: files of torch, safetensors and ONNX, and files that do not fit."""

import re
import sys
from pathlib import Path

import numpy
import pytest
import torch
from promises import assert_bitwise, randn
from torch import nn

import fastcnn
from fastcnn import LRNParams, models

onnx = pytest.importorskip("onnx")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.usefixtures("best_backend")


def create(name="vgg_a", **options):
    torch.manual_seed(0)
    return models.create_model(name, **{"num_classes": 4, "input_size": 32, "init": "kaiming", **options})


def other(model):
    """Other values in every tensor."""
    return {key: value + 1 for key, value in model.state_dict().items()}


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_state(model, expected):
    state = model.state_dict()
    assert list(state) == list(expected)
    for key, value in state.items():
        assert_bitwise(value, expected[key])


@pytest.fixture
def model():
    """A network with every kind of layer and small tensors."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LocalResponseNorm(3), nn.Flatten(), nn.Linear(8, 2))
    for value in model.state_dict().values():
        value.fill_(3)
    return model


# -- torch and safetensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"epoch": 3, "state_dict": s}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_of_torch(model, tmp_path, legacy, wrap, prefix):
    expected = other(model)
    content = wrap({prefix + key: value for key, value in expected.items()})
    torch.save(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=not legacy)
    report = models.load_weights(model, tmp_path / "weights.pth")
    assert_state(model, expected)
    assert (report.format, report.tensors, report.changes) == ("torch", len(expected), [])
    assert str(report).startswith(f"{len(expected)} tensors from ")


def test_safetensors(model, tmp_path):
    expected = other(model)
    safetensors_torch.save_file(expected, tmp_path / "weights.safetensors")
    assert models.load_weights(model, str(tmp_path / "weights.safetensors")).format == "safetensors"
    assert_state(model, expected)


def test_other_dtypes_are_converted(model, tmp_path):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in other(model).items()}, tmp_path / "half.pt")
    models.load_weights(model.double(), tmp_path / "half.pt")
    assert {v.dtype for v in model.state_dict().values()} == {torch.float64, torch.int64}
    assert (model[0].weight == 4).all()


def test_counters_of_batches_may_be_missing(model, tmp_path):
    torch.save({k: v for k, v in other(model).items() if "num_batches" not in k}, tmp_path / "old.pth")
    models.load_weights(model, tmp_path / "old.pth")
    assert model[1].num_batches_tracked == 3
    assert (model[1].running_var == 4).all()


def test_what_optimize_made_loads_the_same_files(tmp_path):
    source, target = create(plain=True), create(plain=True, init="glorot")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    optimized = fastcnn.optimize(target.eval())
    models.load_weights(optimized, tmp_path / "weights.pth")
    x = randn(2, 3, 32, 32)
    torch.testing.assert_close(optimized(x), source.eval()(x))


# -- ONNX -------------------------------------------------------------------------------------------------------------

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def randomized(name, path, model, *, seed=0):
    """The published graph in the onnx package, its constants replaced by values from He's initialization.

    It takes images of the model's size; where they are smaller than published, so is fc6.
    """
    file = onnx.load(LIGHT / f"light_{name}.onnx")
    graph, generator = file.graph, numpy.random.default_rng(seed)
    values = generator.standard_normal(1_000_003, dtype=numpy.float32)  # a prime: no two layers repeat it alike
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    shapes = {name: a.shape for name, a in arrays.items() if a.dtype == numpy.float32}
    shapes |= {n.output[0]: tuple(arrays[n.input[0]]) for n in graph.node if n.op_type == "ConstantOfShape"}
    nodes = [n for n in graph.node if n.op_type not in ("ConstantOfShape", "Softmax")]
    used = {name for node in nodes for name in node.input}
    constants = {name: a for name, a in arrays.items() if name in used and name not in shapes}
    for name, shape in shapes.items():
        if name.endswith("fc6_w_0"):
            columns = next(layer for layer in model.modules() if isinstance(layer, nn.Linear)).in_features
            shape = (shape[0], columns)
            constants["OC2_DUMMY_1"] = numpy.array([1, columns])
        std = 0.1 if len(shape) == 1 else (2 / numpy.prod(shape[1:])) ** 0.5
        constants[name] = numpy.resize(values, shape) * numpy.float32(std)
    (image,) = (i for i in graph.input if i.name.endswith("data_0"))
    for dimension in image.type.tensor_type.shape.dim[2:]:
        dimension.dim_value = model.input_size
    logits = onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
    tensors = [onnx.numpy_helper.from_array(a, name) for name, a in constants.items()]
    made = onnx.helper.make_graph(nodes, graph.name, [image], [logits], tensors)
    opset = [onnx.helper.make_opsetid("", 9)]
    onnx.save(onnx.helper.make_model(made, producer_name=file.producer_name, opset_imports=opset, ir_version=4), path)
    return path


def difference(logits, expected):
    """Relative to what tells the classes apart."""
    return ((logits - expected).norm() / (expected - expected.mean(1, keepdim=True)).norm()).item()


def unset(name, **options):
    """The network with whatever was in memory, for a file to fill."""
    with torch.device("meta"):
        model = models.create_model(name, **options)
    return model.to_empty(device="cpu").eval()


@pytest.mark.parametrize(
    ("graph", "name", "options", "lrn"),
    [
        ("bvlc_alexnet", "alexnet", {"lrn_groups": 1}, LRNParams(5, 1e-4, 0.75, 1.0)),
        ("bvlc_alexnet", "alexnet", {"input_size": 96, "plain": True}, LRNParams(5, 1e-4, 0.75, 1.0)),
        ("zfnet512", "zfnet512", {"input_size": 100}, LRNParams(5, 5e-4, 0.75, 2.0)),
        ("inception_v1", "inception_v1", {}, LRNParams(5, 1e-4, 0.75, 1.0)),
        ("inception_v1", "inception_v1", {"plain": True, "ceil_mode": False}, LRNParams(5, 1e-4, 0.75, 1.0)),
        ("vgg19", "vgg_e", {"input_size": 64}, None),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_published_graphs_give_the_outputs_of_onnxruntime(graph, name, options, lrn, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = unset(name, **options)
    path = randomized(graph, tmp_path / "graph.onnx", model)
    report = models.load_weights(model, path)
    x = 64 * randn(1, 3, model.input_size, model.input_size)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    with torch.no_grad():
        assert difference(model(x), expected) < 1e-4
    assert expected.std() > 1
    assert report.lrn == ([lrn] * 2 if lrn else [])
    assert report.tensors == len(model.state_dict())
    from_caffe = graph != "zfnet512"
    assert (report.colours, report.mean) == (("BGR", (104.0, 117.0, 123.0)) if from_caffe else (None, None))
    assert (model.preprocessing.name == "caffe") or not from_caffe


def test_what_was_changed_is_reported(tmp_path):
    model = unset("alexnet", input_size=96)
    text = str(models.load_weights(model, randomized("bvlc_alexnet", tmp_path / "graph.onnx", model)))
    for line in (
        "16 tensors from ",
        "LRN: LRNParams(size=5, alpha=0.0001, beta=0.75, k=1.0, groups=1), 2 times",
        "k=2.0, groups=2) became LRNParams(",
        "features.pad1 adds 0 zeros behind",
        "features.conv5 pools with ceil_mode=True",
        "classifier.fc8.weight is 2 times the file's: the model scales its input by 0.5",
        "colours: BGR",
        "mean: (104.0, 117.0, 123.0), of pixels 0 to 255",
    ):
        assert line in text


def exported(model, path, size=32):
    torch.onnx.export(model, (torch.zeros(1, 3, size, size),), path, dynamo=False)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dropout", ["paper", "inverted"])
@pytest.mark.parametrize("file_dropout", ["paper", "inverted"])
def test_scale_of_the_papers_dropout(dropout, file_dropout, tmp_path):
    source = create("vgg_a", plain=True, dropout=file_dropout).eval()
    target = create("vgg_a", init="glorot", dropout=dropout).eval()
    models.load_weights(target, exported(source, tmp_path / "vgg.onnx"))
    x = randn(2, 3, 32, 32)
    assert difference(target(x), source(x)) < 1e-5


def small_graph(path, *nodes, producer="", **tensors):
    """A graph of these nodes, on values from 0 on as weights."""
    constants = [
        onnx.numpy_helper.from_array(numpy.arange(numpy.prod(s), dtype=numpy.float32).reshape(s), name)
        for name, s in tensors.items()
    ]
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, 8, 8])
    graph = onnx.helper.make_graph(nodes, "small", [image], [], constants)
    onnx.save(onnx.helper.make_model(graph, producer_name=producer), path)
    return path


def node(kind, inputs, output, **attributes):
    return onnx.helper.make_node(kind, inputs.split(), [output], **attributes)


def test_bias_that_the_graph_leaves_out_is_zero(tmp_path):
    path = small_graph(tmp_path / "g.onnx", node("Conv", "image w", "c", kernel_shape=[3, 3]), w=(8, 3, 3, 3))
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    assert models.load_weights(model, path).changes == ["0 has a bias of 0, for the file has none"]
    assert not model[0].bias.any()


def test_mean_in_the_graph_matrix_product_and_batch_norm(tmp_path):
    path = small_graph(
        tmp_path / "small.onnx",
        node("Sub", "image mean", "centred"),
        node("Conv", "centred w", "c", kernel_shape=[3, 3]),
        node("BatchNormalization", "c scale b mean3 var", "n"),
        node("MatMul", "n fc", "product"),
        node("Add", "product fc_bias", "logits"),
        mean=(3, 1, 1),
        w=(3, 3, 3, 3),
        scale=(3,),
        b=(3,),
        mean3=(3,),
        var=(3,),
        fc=(3, 2),
        fc_bias=(2,),
    )
    model = nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Linear(3, 2))
    report = models.load_weights(model, path)
    assert_bitwise(model[1].running_mean, torch.arange(3.0))
    assert_bitwise(model[2].weight.detach(), torch.arange(6.0).view(3, 2).t())
    assert_bitwise(model[2].bias.detach(), torch.arange(2.0))
    assert "the model does not: - 0, 1, 2" in report.notes[0]


# -- files that do not fit --------------------------------------------------------------------------------------------


def refused(model, path, *said):
    """The message names all of these, and the model is as it was."""
    before, modules = snapshot(model), repr(model)
    with pytest.raises(models.WeightsError) as error:
        models.load_weights(model, path)
    assert [words for words in said if words not in str(error.value)] == []
    assert_state(model, before)
    assert repr(model) == modules
    return error.value


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_mismatch_is_listed(model, tmp_path, suffix):
    state = other(model)
    state["0.weight"] = torch.zeros(8, 3, 5, 5)
    state["4.bias"] = torch.zeros(2, dtype=torch.int64)
    state["extra.weight"] = torch.zeros(7)
    del state["4.weight"], state["1.running_mean"]
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pth" else safetensors_torch.save_file(state, path)
    error = refused(
        model,
        path,
        "0.weight is (8, 3, 5, 5) in the file and (8, 3, 3, 3) in the model",
        "4.bias is torch.int64 in the file and torch.float32 in the model",
        "extra.weight (7,) is in the file only",
        "4.weight is missing in the file; it is (2, 8) in the model",
        "1.running_mean is missing",
    )
    assert len(error.mismatches) == 5


def test_another_networks_graph_lists_every_mismatch(tmp_path):
    model = unset("caffenet", input_size=67)
    error = refused(
        model,
        randomized("bvlc_alexnet", tmp_path / "graph.onnx", model),
        "LRN r2 in the file, max-pool features.conv1 in the model",
        "max-pool r3 in the file, LRN features.norm1 in the model",
        "max-pool r7 in the file, LRN features.norm2 in the model",
    )
    assert len(error.mismatches) == 4
    error = refused(
        unset("alexnet_one_tower", num_classes=10, input_size=67),
        tmp_path / "graph.onnx",
        "features.conv2: groups is 2 in the file and 1 in the model",
        "features.conv4.weight is (384, 192, 3, 3) in the file and (384, 384, 3, 3) in the model",
        "classifier.fc8.bias is (1000,) in the file and (10,) in the model",
    )
    assert len(error.mismatches) == 8


def test_longer_and_shorter_graphs(tmp_path):
    path = small_graph(tmp_path / "g.onnx", node("Conv", "image w b", "c", kernel_shape=[3, 3]), w=(8, 3, 3, 3), b=(8,))
    refused(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2)), path, "nothing in the file, max-pool 1 in the model")
    refused(nn.Sequential(nn.Flatten()), path, "convolution w in the file, nothing in the model")
    refused(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)), path, "0 of the model has no bias")
    refused(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2)), path, "0: stride is (1, 1) in the file and (2, 2) in the model"
    )


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([node("LRN", "image", "n", size=4)], "LRN n: its size 4 is even: ONNX then looks one channel further ahead"),
        ([node("Sin", "image", "s")], "Sin s: these networks have no such operator"),
        ([node("Conv", "image image", "c", kernel_shape=[3, 3])], "its input 'image' is not a constant"),
        ([node("MaxPool", "image", "p", kernel_shape=[3, 3], auto_pad="SAME_UPPER")], "auto_pad=SAME_UPPER"),
        ([node("MaxPool", "image", "p", kernel_shape=[3])], "MaxPool p: it has 1 dimensions, not 2"),
        ([node("Gemm", "image w", "g", transA=1)], "Gemm w: its image is transposed"),
    ],
    ids=lambda v: "" if isinstance(v, str) else v[0].op_type,
)
def test_what_torch_has_not(nodes, said, tmp_path, model):
    refused(model, small_graph(tmp_path / "graph.onnx", *nodes, w=(2, 2)), said, "nothing in the file, convolution 0")


def test_lrn_after_optimize_is_refused(tmp_path):
    path = small_graph(tmp_path / "graph.onnx", node("LRN", "image", "n", size=5, alpha=0.5))
    models.load_weights(nn.Sequential(nn.LocalResponseNorm(5)), path)
    refused(fastcnn.optimize(nn.Sequential(nn.LocalResponseNorm(5))), path, "load the weights before")


def save(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "onnx"])
@pytest.mark.parametrize("content", [b"", b"not weights at all, but text", b"\x89PNG\r\n\x1a\n" + bytes(99)])
def test_wrong_files(model, tmp_path, suffix, content):
    format = {"pth": "torch", "onnx": "ONNX"}.get(suffix, suffix)
    refused(
        model, save(tmp_path / f"w.{suffix}", content), f"w.{suffix} cannot be read as a file of {format} weights: "
    )


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "onnx"])
@pytest.mark.parametrize("left", [0.1, 0.5, 0.999])
def test_truncated_files(model, tmp_path, suffix, left):
    path = tmp_path / f"whole.{suffix}"
    if suffix == "onnx":
        small_graph(path, node("Conv", "image w", "c", kernel_shape=[3, 3]), w=(8, 3, 3, 3))
    else:
        (safetensors_torch.save_file if suffix == "safetensors" else torch.save)(other(model), path)
    whole = path.read_bytes()
    refused(model, save(tmp_path / f"cut.{suffix}", whole[: int(left * len(whole))]), "cannot be read as")


def test_other_objects_than_tensors_are_refused_not_run(model, tmp_path):
    torch.save(model, tmp_path / "model.pth")
    refused(model, tmp_path / "model.pth", "cannot be read as a file of torch weights: Weights only load failed")
    torch.save([1, 2], tmp_path / "list.pth")
    refused(model, tmp_path / "list.pth", "it holds a list, not a state_dict")
    torch.save({"0.weight": 3}, tmp_path / "ints.pth")
    refused(model, tmp_path / "ints.pth", "other things than tensors: '0.weight' is a int")


def test_model_on_the_meta_device_is_refused(model, tmp_path):
    torch.save(other(model), tmp_path / "weights.pth")
    with pytest.raises(models.WeightsError, match=r"0\.weight of the model is on the meta device"):
        models.load_weights(model.to("meta"), tmp_path / "weights.pth")


def test_no_such_file(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.pth"):
        models.load_weights(model, tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        models.load_weights(model, tmp_path)


@pytest.mark.parametrize(("suffix", "package"), [("onnx", "onnx"), ("safetensors", "safetensors.torch")])
def test_missing_package_is_named(model, tmp_path, monkeypatch, suffix, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=re.escape("pip install fastcnn[models]")):
        models.load_weights(model, save(tmp_path / f"weights.{suffix}", b""))
