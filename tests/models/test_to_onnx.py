"""to_onnx and ``fastcnn export``: plain nodes, which onnxruntime and from_onnx and load_weights read back."""

import pytest
import torch
from promises import assert_bitwise, randn
from torch import nn
from typer.testing import CliRunner

import fastcnn
import fastcnn.functional as FF
from fastcnn import LRNParams, models
from fastcnn.cli import app

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from .onnx_graphs import assert_same_as_onnxruntime, set_at_random  # noqa: E402

pytestmark = pytest.mark.usefixtures("best_backend")


def kinds(path):
    return [n.op_type for n in onnx.load(path).graph.node]


@pytest.fixture(autouse=True)
def _small(small_classifiers):
    """Hidden layers of a few units."""


SAME = ("vgg11", "vgg13", "vgg16", "vgg19")  # as A, B, D, E, but for what they expect of images


@pytest.mark.parametrize(
    ("name", "plain"),
    [(name, i % 2 == 1) for i, name in enumerate(models.list_models()) if name not in SAME],
)
def test_every_model_comes_back(name, plain, tmp_path):
    size = 67 if "alexnet" in name or name in ("caffenet", "zfnet", "zfnet512", "inception_v1") else 32
    options = {"num_classes": 5, "input_size": size, "init": "kaiming"}
    source = set_at_random(models.create_model(name, plain=plain, **options)).eval()
    path, images = tmp_path / "model.onnx", randn(2, 3, size, size)
    assert models.to_onnx(source, path) < 1e-5
    assert_same_as_onnxruntime(source, path, images)
    target = models.create_model(name, plain=not plain, **options)
    assert models.load_weights(target, path).changes == []
    for key, value in target.state_dict().items():
        if "num_batches" not in key:
            assert_bitwise(value, source.state_dict()[key])
    network = models.from_onnx(path)
    assert set(network.state_dict()) == set(source.state_dict())
    torch.testing.assert_close(network(images), source(images), rtol=1e-4, atol=1e-5)


def test_plain_nodes(tmp_path):
    models.to_onnx(
        set_at_random(models.create_model("alexnet", input_size=67, dropout="inverted")), tmp_path / "a.onnx"
    )
    stage = ["Split", "LRN", "LRN", "Concat", "MaxPool"]
    assert kinds(tmp_path / "a.onnx") == [
        *("Conv", "Relu", *stage, "Conv", "Relu", *stage),
        *("Conv", "Relu", "Conv", "Relu", "Conv", "Relu", "MaxPool", "Flatten"),
        *("Gemm", "Relu", "Dropout", "Gemm", "Relu", "Dropout", "Gemm"),
    ]
    model = onnx.load(tmp_path / "a.onnx")
    assert {n.name for n in model.graph.node} >= {"features.conv1", "classifier.fc8"}
    assert {t.name for t in model.graph.initializer} >= {"features.conv1.weight", "classifier.fc8.bias"}
    assert model.producer_name == "fastcnn"


@pytest.mark.parametrize("options", [{}, {"inference": True}], ids=str)
def test_optimized_models(options, tmp_path):
    model = models.create_model("vgg11_bn", plain=True, num_classes=5, input_size=32)
    optimized = fastcnn.optimize(set_at_random(model).eval(), **options)
    images = randn(2, 3, 32, 32)
    expected = optimized(images)
    models.to_onnx(optimized, tmp_path / "model.onnx")
    torch.testing.assert_close(models.from_onnx(tmp_path / "model.onnx")(images), expected, rtol=1e-4, atol=1e-5)
    assert not optimized.fastcnn_report.plain


def test_images_of_any_size(tmp_path):
    model = nn.Sequential(
        fastcnn.nn.ConvReLU2d(3, 8, 3, 2, padding=1),
        fastcnn.nn.ReLULRNMaxPool2d(lrn=LRNParams(3, 0.1), pool=fastcnn.PoolParams(3, 2, ceil_mode=True)),
        nn.AvgPool2d(3, 1, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
        nn.Softmax(1),
    )
    models.to_onnx(set_at_random(model), tmp_path / "model.onnx")
    for size in (16, 21, 30):
        assert_same_as_onnxruntime(model, tmp_path / "model.onnx", randn(2, 3, size, size + 4))
        network = models.from_onnx(tmp_path / "model.onnx")
        assert_same_as_onnxruntime(network, tmp_path / "model.onnx", randn(2, 3, size, size + 4))


class Network(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 8, 3), function

    def forward(self, x):
        return self.function(self.conv(x))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (torch.sigmoid, r"sigmoid\(\) of the model has no known counterpart"),
        (lambda y: FF.local_response_norm(y, 4), "LRN of the model: its size 4 is even"),
        (nn.Linear(6, 2), "Gemm function of the model goes over maps"),
        (lambda y: y.transpose(0, 1), r"transpose\(\) of the model has no known counterpart"),
        (lambda y: (y, y), "the model returns a tuple"),
    ],
)
def test_what_has_no_counterpart_is_refused_and_nothing_is_written(function, said, tmp_path):
    (tmp_path / "model.onnx").write_text("as it was")
    with pytest.raises(ValueError, match=said):
        models.to_onnx(Network(function), tmp_path / "model.onnx", input_size=8)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "as it was"


def test_images_that_a_model_does_not_take_and_other_dtypes(tmp_path):
    with pytest.raises(ValueError, match="the model does not take images of 3x2x2"):
        models.to_onnx(nn.Sequential(nn.Conv2d(3, 8, 3)), tmp_path / "model.onnx", input_size=2)
    with pytest.raises(ValueError, match=r"must be in float32, but has tensors in torch\.float16"):
        models.to_onnx(nn.Sequential(nn.Conv2d(3, 8, 3)).half(), tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError):
        models.to_onnx(nn.Sequential(nn.Conv2d(3, 8, 3)), tmp_path / "absent" / "model.onnx")


def test_nothing_is_written_that_onnxruntime_computes_otherwise(tmp_path, monkeypatch):
    from fastcnn.models.graph.onnxruntime import Runtime

    plain = Runtime.__call__
    monkeypatch.setattr(Runtime, "__call__", lambda self, x: 1.01 * plain(self, x))
    with pytest.raises(RuntimeError, match=r"differs from the model's by 1\.0e-02, not written"):
        models.to_onnx(nn.Sequential(nn.Conv2d(3, 8, 3)), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


# -- the command ------------------------------------------------------------------------------------------------------


def export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})


def test_export(tmp_path):
    options = {"num_classes": 5, "input_size": 67, "lrn_groups": 1}
    source = set_at_random(models.create_model("alexnet", **options)).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    first = ("--size", 67, "--classes", 5, "--option", "lrn_groups=1")
    result = export("alexnet", "--weights", tmp_path / "weights.pth", "--onnx", tmp_path / "a.onnx", *first)
    assert result.exit_code == 0, result.output
    assert "16 tensors from" in result.output
    assert "onnxruntime's output differs by " in result.output
    result = export("alexnet", "--weights", tmp_path / "a.onnx", "--onnx", tmp_path / "b.onnx", *first)
    assert result.exit_code == 0, result.output
    assert_same_as_onnxruntime(source, tmp_path / "b.onnx", 64 * randn(2, 3, 67, 67))


def test_export_refuses(tmp_path):
    torch.save(models.create_model("vgg_a", num_classes=5, input_size=32).state_dict(), tmp_path / "w.pth")
    for arguments, said in (
        (("vgg_x", "--weights", tmp_path / "w.pth"), "'vgg_x' is none of alexnet, "),
        (("vgg_a", "--weights", tmp_path / "absent.pth", "--size", 32), "there is no file"),
        (("vgg_a", "--weights", tmp_path / "w.pth", "--size", 32), "does not fit the model"),
    ):
        result = export(*arguments, "--onnx", tmp_path / "a.onnx")
        assert result.exit_code == 2
        assert said in " ".join(result.output.split())
        assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_default_dtype_and_device_do_not_matter(tmp_path, dtype, device):
    """Out into a file, back from it, and fused."""
    torch.manual_seed(0)
    net = models.create_model(
        "squeezenet1_1", input_size=32, plain=True, init="kaiming"
    ).eval()  # of few logits all may be 0
    norm = nn.BatchNorm2d(3, affine=False).eval()  # whose scale and shift the file has, and the model has not
    x = 64 * randn(1, 3, 32, 32)
    expected = net(norm(x))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            models.to_onnx(nn.Sequential(norm, net), tmp_path / "net.onnx", input_size=32)
            models.to_onnx(net, tmp_path / "net only.onnx")
            assert models.load_weights(net, tmp_path / "net only.onnx", verify=True).verified <= 1e-5
            back = models.from_onnx(tmp_path / "net.onnx")
            found = fastcnn.optimize(back, inference=True)(x)
    finally:
        torch.set_default_dtype(before)
    assert {t.dtype for t in back.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert (found - expected).norm() <= 1e-5 * expected.norm()
