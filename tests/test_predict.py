"""``fastcnn predict`` and ``fastcnn info --model``."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from narrow import assert_readable
from rich.console import Console
from typer.testing import CliRunner, Result

import fastcnn
from fastcnn import cli, models, predict
from fastcnn.cli import app
from fastcnn.models import PREPROCESSINGS
from fastcnn.models.summary import layer_table

Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.usefixtures("best_backend")
PHOTOGRAPHS = sorted((Path(fastcnn.data.__file__).parent / "photographs").glob("*.jpg"))
LABELS = ["astronaut", "cat [tabby]", "coffee", "rocket"]
SIZE = 64


def fastcnn_command(*arguments: object, columns: int = 200) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns), "TERM": "dumb"})


def assert_refused(result: Result, *said: str) -> None:
    assert result.exit_code == 2
    output = " ".join(re.sub(r"\x1b\[[0-9;]*m|│", "", result.output).split())
    assert [words for words in said if words not in output] == []


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return models.create_model("inception_v1", num_classes=4, input_size=SIZE).eval()


@pytest.fixture(scope="module")
def weights(network: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def command(weights: Path) -> list[object]:
    return ["predict", "--model", "inception_v1", "--weights", weights, "--size", SIZE, "--classes", 4]


# -- predict ----------------------------------------------------------------------------------------------------------


def expected_probabilities(network: torch.nn.Module, path: Path, preprocessing: str = "caffe") -> list[float]:
    picture = predict.read_image(path)
    with torch.no_grad():
        return network(PREPROCESSINGS[preprocessing](picture, SIZE)[None])[0].double().softmax(0).tolist()


@pytest.mark.parametrize("preprocessing", [None, "torchvision"])
def test_json_has_the_probabilities_of_the_network(
    command: list[object], network: torch.nn.Module, preprocessing: str | None
) -> None:
    options = ["--preprocessing", preprocessing] if preprocessing else []
    result = fastcnn_command(*command, *PHOTOGRAPHS, *options, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["model"], told["preprocessing"]) == ("inception_v1", preprocessing or "caffe")
    assert [image["image"] for image in told["images"]] == [str(path) for path in PHOTOGRAPHS]
    for image, path in zip(told["images"], PHOTOGRAPHS, strict=True):
        expected = expected_probabilities(network, path, preprocessing or "caffe")
        probabilities = [guess["probability"] for guess in image["top"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert {guess["index"]: guess["probability"] for guess in image["top"]} == pytest.approx(
            dict(enumerate(expected))
        )
        assert sum(probabilities) == pytest.approx(1)


def test_table_with_labels(command: list[object], network: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(LABELS) + "\n")
    result = fastcnn_command(*command, PHOTOGRAPHS[0], "--top", 2, "--labels", tmp_path / "labels.txt")
    assert result.exit_code == 0, result.output
    best = sorted(enumerate(expected_probabilities(network, PHOTOGRAPHS[0])), key=lambda pair: -pair[1])
    rows = [line.split() for line in result.output.splitlines() if re.match(r" *\d ", line)]
    assert [(int(row[0]), " ".join(row[1:-1]), row[-1]) for row in rows] == [
        (i, LABELS[i], f"{probability:.4f}") for i, probability in best[:2]
    ]
    assert "116 tensors from" in result.output
    assert "preprocessing: caffe" in result.output


def test_long_labels_are_readable_at_80_columns() -> None:
    words, chained = " ".join(LABELS * 5), "-".join(LABELS * 5).replace(" ", "")
    table = predict._table([predict.Guess(12345, words, 0.5), predict.Guess(67890, chained, 0.25)])
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    assert_readable(capture.get(), "12345", "67890", "probability", "0.5000", "0.2500")
    assert chained in "".join(capture.get().replace("0.2500", "").split())


@pytest.mark.parametrize("pictures", [1, 2])
def test_plot(command: list[object], tmp_path: Path, pictures: int) -> None:
    pytest.importorskip("matplotlib")
    result = fastcnn_command(*command, *PHOTOGRAPHS[:pictures], "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size == (9 * 120, 3 * 120 * pictures)
        assert len(plot.convert("RGB").getcolors(10**7)) > 1000  # a photograph is in it


def test_labels_say_how_many_classes(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(LABELS))
    common = ("predict", PHOTOGRAPHS[0], "--model", "inception_v1", "--weights", weights, "--size", SIZE)
    assert fastcnn_command(*common, "--labels", tmp_path / "labels.txt").exit_code == 0
    assert_refused(fastcnn_command(*common), "--weights", "fc.weight is (4, 1024) in the file and (1000, 1024)")


def test_options_reach_the_model(command: list[object]) -> None:
    result = fastcnn_command(*command, PHOTOGRAPHS[0], "--option", "ceil_mode=False", "--option", "dropout=paper")
    assert result.exit_code == 0, result.output
    assert_refused(fastcnn_command(*command, PHOTOGRAPHS[0], "--option", "width=2"), "unexpected option width=2")
    assert_refused(fastcnn_command(*command, PHOTOGRAPHS[0], "--option", "plain"), "'plain'", "name=value")
    for value in ("{[]: 1}", "-" * 100_000 + "1"):  # which Python does not read
        assert_refused(
            fastcnn_command(*command, PHOTOGRAPHS[0], "--option", f"width={value}"), "unexpected option width="
        )


def test_entry_chooses_among_the_networks_of_a_file(
    command: list[object], network: torch.nn.Module, tmp_path: Path
) -> None:
    uniform = {key: torch.zeros_like(value) for key, value in network.state_dict().items()}
    torch.save({"model": network.state_dict(), "model_ema": uniform}, tmp_path / "both.pth")
    other = [*command[:4], tmp_path / "both.pth", *command[5:], PHOTOGRAPHS[0], "--json"]
    expected = max(expected_probabilities(network, PHOTOGRAPHS[0]))
    for entry, probability in (([], expected), (["--entry", "model_ema"], 0.25)):
        told = json.loads(fastcnn_command(*other, *entry).stdout)
        assert told["images"][0]["top"][0]["probability"] == pytest.approx(probability)
    assert_refused(
        fastcnn_command(*other, "--entry", "none"), "--weights", "no entry 'none'; available: 'model', 'model_ema'"
    )


def test_labels_of_a_file_with_a_mark_in_front(command: list[object], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes("\ufeffone\r\ntwo\u2028or so\r\nthree\r\nfour\r\n".encode())
    told = json.loads(fastcnn_command(*command, PHOTOGRAPHS[0], "--labels", tmp_path / "labels.txt", "--json").stdout)
    assert {guess["label"] for guess in told["images"][0]["top"]} == {"one", "two\u2028or so", "three", "four"}


def test_wrong_arguments_of_classify(network: torch.nn.Module) -> None:
    image = predict.read_image(PHOTOGRAPHS[0])
    with pytest.raises(ValueError, match=r"classify\(\): expected 4 labels, but got 2"):
        predict.classify(network, image, labels=["a", "b"])
    with pytest.raises(ValueError, match=r"classify\(\): top must be at least 1, but got top=0"):
        predict.classify(network, image, top=0)


def test_models_in_other_dtypes_classify(network: torch.nn.Module) -> None:
    image = predict.read_image(PHOTOGRAPHS[0])
    guesses = predict.classify(copy.deepcopy(network).double(), image)
    for ours, expected in zip(guesses, predict.classify(network, image), strict=True):
        assert (ours.index, ours.probability) == (expected.index, pytest.approx(expected.probability, rel=1e-4))


def test_every_bad_picture_is_named(command: list[object], tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = PHOTOGRAPHS[0].read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    paths = [tmp_path / name for name in ("absent.jpg", "text.jpg", "empty.png", "half.jpg", ".")]
    result = fastcnn_command(*command, PHOTOGRAPHS[0], *paths)
    assert_refused(result, "absent.jpg: not a file", "text.jpg: not an image", "empty.png: not an image")
    assert_refused(result, "half.jpg: cannot be read: image file is truncated", f"{tmp_path}: not a file")


def test_wrong_arguments_are_refused(command: list[object], weights: Path, tmp_path: Path) -> None:
    picture = PHOTOGRAPHS[0]
    (tmp_path / "labels.txt").write_text("one\ntwo")
    (tmp_path / "text.pth").write_text("no weights")
    for options, said in (
        (["--model", "lenet"], ["--model", "'lenet'", "alexnet, alexnet_bn", "zfnet"]),
        (["--weights", tmp_path / "absent.pth"], ["--weights", "there is no file"]),
        (["--weights", tmp_path / "text.pth"], ["--weights", "cannot be read as a PyTorch checkpoint"]),
        (["--labels", tmp_path / "labels.txt"], ["--labels", "2 lines for 4 classes"]),
        (["--labels", tmp_path / "absent.txt"], ["--labels", "absent.txt cannot be read"]),
        (["--preprocessing", "none"], ["--preprocessing", "'none'", "raw, caffe, torchvision"]),
        (["--size", 12], ["input_size must be at least 31", "maxpool"]),
        (["--top", 0], ["--top"]),
        (["--plot", tmp_path / "plot.docx"], ["--plot", "docx"]),
        (["--plot", tmp_path / "absent" / "plot.png"], ["--plot", "absent"]),
    ):
        assert_refused(fastcnn_command(*command, picture, *options), *said)
    assert_refused(fastcnn_command("predict", picture, "--model", "vgg_a"), "--weights")


# -- preprocessing ----------------------------------------------------------------------------------------------------


def test_preprocessing_of_one_pixel() -> None:
    red = torch.tensor((200, 100, 50), dtype=torch.uint8).view(3, 1, 1)
    for name, expected in (
        ("raw", (200 - 123.68, 100 - 116.779, 50 - 103.939)),
        ("caffe", (50 - 104, 100 - 117, 200 - 123)),
        ("torchvision", ((200 / 255 - 0.485) / 0.229, (100 / 255 - 0.456) / 0.224, (50 / 255 - 0.406) / 0.225)),
    ):
        assert PREPROCESSINGS[name].normalized(red).flatten().tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("width", "height"), [(256, 256), (400, 256), (256, 300)])
def test_centre_of_the_picture_is_cropped(width: int, height: int) -> None:
    """A short side of 256 is not scaled: the crop is that of the pixels."""
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crop = PREPROCESSINGS["raw"](Image.fromarray(pixels.numpy()), 224)
    top, left = (height - 224) // 2, (width - 224) // 2
    expected = PREPROCESSINGS["raw"].normalized(pixels.permute(2, 0, 1)[:, top : top + 224, left : left + 224])
    torch.testing.assert_close(crop, expected)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (5, 1000), (1000, 5)])
def test_pictures_of_any_size(width: int, height: int) -> None:
    assert PREPROCESSINGS["torchvision"](Image.new("L", (width, height)), 67).shape == (3, 67, 67)


def test_each_model_has_a_preprocessing() -> None:
    with torch.device("meta"):
        names = {name: models.create_model(name).preprocessing.name for name in models.list_models()}
    assert names["alexnet"] == names["vgg_d"] == names["zfnet"] == "raw"
    assert names["caffenet"] == names["inception_v1"] == "caffe"
    assert names["alexnet_owt"] == names["vgg16"] == names["vgg19_bn"] == "torchvision"


# -- info --model -----------------------------------------------------------------------------------------------------

torchinfo = pytest.importorskip("torchinfo")


@pytest.mark.parametrize("name", ["alexnet", "vgg16_bn", "inception_v1"])
def test_layer_table_adds_up(name: str) -> None:
    rows = layer_table(name)
    with torch.device("meta"):
        model = models.create_model(name)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert rows[-1].output == (1000,)


def test_multiply_adds_of_the_convolutions_of_alexnet() -> None:
    """By hand: output positions times weights, and a bias each."""
    macs = {row.name: row.multiply_adds for row in layer_table("alexnet")}
    assert macs["features.conv1"] == 55 * 55 * 96 * (3 * 11 * 11 + 1)
    assert macs["features.conv2"] == 27 * 27 * 256 * (48 * 5 * 5 + 1)
    assert macs["classifier.fc6"] == 4096 * (9216 + 1)


def test_what_runs_each_layer() -> None:
    runs = {row.name.rpartition(".")[2]: row.operator for row in layer_table("caffenet")}
    assert runs["conv1"] == "conv2d"
    assert runs["fc6"] is runs["relu6"] is None
    assert runs["relu1"] == runs["pool1"] == runs["pool5"] == "relu_lrn_max_pool2d"
    assert runs["norm1"] == "lrn"
    assert runs["conv3"] == runs["relu3"] == "conv2d_relu"


def test_info_of_a_model() -> None:
    best = "cpu" if "cpu" in fastcnn.backends.available() else "reference"
    result = fastcnn_command("info", "--model", "alexnet")
    assert result.exit_code == 0, result.output
    for expected in ("features.conv1", "96x55x55", "60,965,224", "105,705,600", "what runs on cpu"):
        assert expected in result.output
    assert re.search(rf"relu_lrn_max_pool2d +{best}", result.output)
    told = json.loads(fastcnn_command("info", "--model", "alexnet", "--json").output)
    assert told["parameters"] == 60_965_224
    assert told["layers"][0]["runs"]["cpu"].startswith("oneDNN" if best == "cpu" else "reference")
    assert_refused(fastcnn_command("info", "--model", "lenet"), "--model", "'lenet'", "alexnet, alexnet_bn")


@pytest.mark.parametrize("name", models.list_models())
def test_layers_of_every_model_are_readable_at_80_columns(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(cli, "_devices", lambda: ["cpu", "cuda"])
    monkeypatch.setattr(cli, "_runs", lambda operator, device: "the fastest of cuDNN, triton, cuda")
    shown = fastcnn_command("info", "--model", name, columns=80).stdout
    lines, rows = [line.split() for line in shown.splitlines()], layer_table(name)
    for row in rows:
        counts = [f"{count:,}" for count in (row.parameters, row.multiply_adds) if count]
        assert [row.name, row.kind, "x".join(map(str, row.output)), *counts] in lines
    assert_readable(shown, "multiply-adds", "what runs on cuda", *{row.operator or "torch" for row in rows})


def test_info_of_a_model_without_torchinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchinfo", None)
    assert_refused(fastcnn_command("info", "--model", "alexnet"), "torchinfo", "pip install fastcnn[models]")
