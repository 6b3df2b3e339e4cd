"""load_weights: files of torch, safetensors and ONNX, and files that do not fit."""

import re
import sys

import pytest
import torch
from promises import assert_bitwise, randn
from torch import nn

import fastcnn
from fastcnn import models
from fastcnn.models.weights import KINDS

pytest.importorskip("onnx")
safetensors_torch = pytest.importorskip("safetensors.torch")

from .onnx_graphs import node, save_graph, snapshot  # noqa: E402

pytestmark = pytest.mark.usefixtures("best_backend")


def create(name="vgg_a", **options):
    torch.manual_seed(0)
    return models.create_model(name, **{"num_classes": 4, "input_size": 32, "init": "kaiming", **options})


def other(model):
    """Other values in every tensor."""
    return {key: value + 1 for key, value in model.state_dict().items()}


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


def save(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "onnx"])
@pytest.mark.parametrize("content", [b"", b"not weights at all, but text", b"\x89PNG\r\n\x1a\n" + bytes(99)])
def test_wrong_files(model, tmp_path, suffix, content):
    format = {"pth": "torch", "onnx": "ONNX"}.get(suffix, suffix)
    error = refused(model, save(tmp_path / f"w.{suffix}", content), f"w.{suffix} ")
    if content or suffix != "onnx":  # an empty file is one of protobuf, of nothing
        assert f"w.{suffix} cannot be read as {KINDS[format]}: " in str(error)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "onnx"])
@pytest.mark.parametrize("left", [0.1, 0.5, 0.999])
def test_truncated_files(model, tmp_path, suffix, left):
    path = tmp_path / f"whole.{suffix}"
    if suffix == "onnx":
        save_graph(path, [node("Conv", "image w", "c", kernel_shape=[3, 3])], {"w": randn(8, 3, 3, 3)})
    else:
        (safetensors_torch.save_file if suffix == "safetensors" else torch.save)(other(model), path)
    whole = path.read_bytes()
    refused(model, save(tmp_path / f"cut.{suffix}", whole[: int(left * len(whole))]), f"cut.{suffix} ")


def test_files_without_tensors_are_refused(model, tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    refused(model, tmp_path / "list.pth", "no dictionary in it holds tensors")
    torch.save({"0.weight": 3}, tmp_path / "ints.pth")
    refused(model, tmp_path / "ints.pth", "no dictionary in it holds tensors")


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
