"""The command line: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from narrow import assert_readable
from typer.testing import CliRunner, Result

import fastcnn
from fastcnn.bench.environment import convolution_precision, environment
from fastcnn.cli import app
from fastcnn.ops import select_conv2d_relu
from fastcnn.ops.register import IMPLEMENTATIONS, what_runs

HAS_CPU = "cpu" in fastcnn.backends.available()
BEST = "cpu" if HAS_CPU else "reference"
COMMAND_NEEDS = ("typer", "rich")
OTHERS = (
    "matplotlib",
    "numpy",
    "onnx",
    "onnxruntime",
    "PIL",
    "safetensors",
    "tensorboard",
    "torchinfo",
    "torchvision",
    "triton",
)
TINY = ["--shape", "2,4,7,7", "--repeats", "2", "--providers", f"fastcnn.{BEST}", "--providers", "torch.eager"]


def fastcnn_command(*arguments: object, columns: int = 200) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns), "TERM": "dumb"})


# info


def test_info_says_what_is_here_and_what_runs() -> None:
    result = fastcnn_command("info")
    assert result.exit_code == 0
    for expected in (fastcnn.__version__, torch.__version__, "relu_lrn_max_pool2d_backward", *fastcnn.backends.NAMES):
        assert expected in result.output
    for why_not in filter(None, fastcnn.backends.status().values()):
        assert why_not.split()[0] in result.output


def test_info_is_readable_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/{'folder/' * 20}_C.so"
    monkeypatch.setattr(fastcnn.backends, "_C", None)
    monkeypatch.setattr(fastcnn.backends, "_why_no_cpu", f"{path}: undefined symbol")
    shown = fastcnn_command("info", columns=80).stdout
    titles = ("what runs on cpu", "the C++ library", "the CUDA library")
    assert_readable(shown, *titles, *environment(), *fastcnn.backends.NAMES, *IMPLEMENTATIONS)
    assert path in "".join(shown.split())


@pytest.mark.usefixtures("best_backend")
def test_info_as_json() -> None:
    facts = json.loads(fastcnn_command("info", "--json").output)
    assert facts["backends"] == fastcnn.backends.status()
    assert facts["environment"]["fastcnn"] == fastcnn.__version__
    assert facts["operators"]["cpu"]["lrn"] == BEST
    assert bool(facts["build"]) == HAS_CPU


@pytest.mark.usefixtures("best_backend")
def test_info_names_the_library_that_convolutions_call() -> None:
    facts = json.loads(fastcnn_command("info", "--json").output)
    expected = "oneDNN" if HAS_CPU else "reference"
    assert facts["operators"]["cpu"]["conv2d_relu"].startswith(expected)
    model = json.loads(fastcnn_command("info", "--model", "alexnet", "--json").output)
    runs = {layer["name"]: layer["runs"]["cpu"] for layer in model["layers"]}
    assert runs["features.conv1"].startswith(expected)  # its ReLU, LRN and pool are another operator's
    assert runs["features.pool1"] == f"relu_lrn_max_pool2d ({BEST})"
    assert runs["features.conv3"].startswith(f"conv2d_relu ({expected}")
    assert runs["classifier.fc8"] == "torch"


@pytest.mark.parametrize(
    ("forced", "cudnn_benchmark", "tune", "expected"),
    [
        (None, False, "1", "cuDNN"),
        (None, True, "0", "cuDNN"),
        (None, True, "1", "the fastest of cuDNN, triton, cuda"),
        ("triton", False, "1", "triton"),
        ("cuda", True, "1", "cuda"),
    ],
)
def test_what_runs_convolutions_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, forced, cudnn_benchmark, tune, expected
) -> None:
    monkeypatch.setattr(fastcnn.backends, "_forced", forced)
    monkeypatch.setattr(fastcnn.backends, "why_not", lambda name, device: "")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", cudnn_benchmark)
    monkeypatch.setenv("FASTCNN_TUNE", tune)
    with convolution_precision("tf32"):
        assert select_conv2d_relu.engine(forced or "cudnn", torch.device("cuda")) == expected


def test_both_are_named_where_the_size_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def preferred(op: str, x: torch.Tensor) -> tuple[str, ...]:
        return ("triton", "cuda") if x.numel() >= 2**20 else ("cuda", "triton")

    monkeypatch.setattr(fastcnn.backends, "runs_cpu_kernels", lambda: False)
    monkeypatch.setattr(fastcnn.backends, "_preferred", preferred)
    monkeypatch.setattr(fastcnn.backends, "why_not", lambda name, device: "")
    assert what_runs("lrn", "cpu") == "triton; cuda on small tensors"
    monkeypatch.setattr(fastcnn.backends, "_forced", "cuda")
    assert what_runs("lrn", "cpu") == "cuda"


def test_info_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastcnn.backends, "_C", None)
    monkeypatch.setattr(fastcnn.backends, "_why_no_cpu", "it is [not] built")
    facts = json.loads(fastcnn_command("info", "--json").output)
    assert facts["build"] == {}
    assert facts["environment"]["cpu_capability"] is None
    assert facts["operators"]["cpu"]["lrn"] == "reference"
    assert "it is [not] built" in fastcnn_command("info").output


def test_module_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fastcnn", "--help"], capture_output=True, text=True, check=True)
    assert "info" in done.stdout
    assert "bench" in done.stdout


def without(modules: Sequence[str], code: str) -> subprocess.CompletedProcess[str]:
    """A new process where none of these modules can be imported."""
    lines = ("import sys", f"sys.modules.update(dict.fromkeys({modules}))", code)
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)


def test_library_needs_only_torch() -> None:
    code = """
import torch, fastcnn, fastcnn.functional as FF
x = torch.randn(2, 4, 9, 9, requires_grad=True)
FF.max_pool2d(x, 3, stride=2).sum().backward()
torch.testing.assert_close(FF.max_pool2d(x, 3, stride=2), torch.nn.functional.max_pool2d(x, 3, stride=2))
fast = fastcnn.optimize(torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.ReLU()))
fast(x)
print(fast.fastcnn_report)
"""
    done = without([*COMMAND_NEEDS, *OTHERS], code)
    assert done.returncode == 0, done.stderr
    assert "Conv2d -> ReLU runs as conv2d + relu" in done.stdout


@pytest.mark.parametrize("missing", COMMAND_NEEDS)
def test_command_says_what_it_needs(missing: str) -> None:
    done = without([missing], "from fastcnn.__main__ import main; main()")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == 'fastcnn: the command needs typer and rich: pip install "fastcnn[cli]"\n'


def test_command_hides_no_other_missing_module() -> None:
    done = without(["fastcnn.predict"], "from fastcnn.__main__ import main; main()")
    assert "ModuleNotFoundError" in done.stderr
    assert "pip install" not in done.stderr


# bench kernels


def test_bench_prints_tables_and_writes_files(tmp_path: Path) -> None:
    options = ("--format", "NCHW", "--dtype", "fp32", "--out", tmp_path)
    result = fastcnn_command("bench", "kernels", *TINY, *options, columns=80)
    assert result.exit_code == 0, result.output
    titles = ("relu_lrn_max_pool2d forward+backward, input (2, 4, 7, 7)", "how many times faster")
    assert_readable(result.stdout, *titles, f"fastcnn.{BEST}", f"{torch.get_num_threads()} threads")
    assert (tmp_path / "kernels.json").exists()


def test_bench_json_is_what_it_writes(tmp_path: Path) -> None:
    filters = ("--op", "lrn", "--mode", "forward+backward", "--batch", 3)
    result = fastcnn_command("bench", "kernels", *TINY, *filters, "--json", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "kernels.json").read_text())
    assert {tuple(r["shape"]) for r in document["rows"]} == {(3, 4, 7, 7)}
    assert {r["mode"] for r in document["rows"]} == {"forward+backward"}
    ours = [r for r in document["rows"] if r["provider"] == f"fastcnn.{BEST}" and r["dtype"] == "fp32"]
    assert len(ours) == 2
    assert all(r["failure"] is None and r["n"] == 2 and r["vs_eager"] for r in ours)


def test_bench_on_photographs(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    options = ("--op", "lrn", "--mode", "forward", "--dtype", "fp32", "--format", "NCHW", "--repeats", 1)
    result = fastcnn_command(
        *("bench", "kernels", "--input", "photographs", "--shape", "stage2", "--batch", 1),
        *(*options, "--providers", f"fastcnn.{BEST}", "--json", "--out", tmp_path),
    )
    document = json.loads(result.stdout)
    assert document["header"]["input"] == "photographs"
    assert {tuple(r["shape"]) for r in document["rows"]} == {(1, 256, 27, 27)}
    assert [r["failure"] for r in document["rows"]] == [None] * len(document["rows"])


def test_threads_are_set_and_stated(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        options = ("--op", "lrn", "--mode", "forward", "--threads", 1, "--json", "--out", tmp_path)
        assert json.loads(fastcnn_command("bench", "kernels", *TINY, *options).stdout)["header"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--op", "conv"], ["--op", "'conv'", "lrn, max_pool2d, conv2d_relu, relu_lrn_max_pool2d"]),
        (["--providers", "fastcnn.abacus"], ["--providers", "'fastcnn.abacus'", "fastcnn.reference", "torch.eager"]),
        (["--dtype", "int8"], ["--dtype", "'int8'", "fp32, bf16, fp16"]),
        (["--format", "NHWC"], ["--format", "'NHWC'", "NCHW, channels_last"]),
        (["--mode", "sideways"], ["--mode", "'sideways'", "forward, backward, forward+backward"]),
        (["--input", "paintings"], ["--input", "'paintings'", "random, photographs"]),
        (["--shape", "1,2,3"], ["--shape", "'1,2,3'", "N,C,H,W", "stage1, stage2, conv2"]),
        (["--shape", "1,2,2,9"], ["--shape", "'1,2,2,9'", "at least 3"]),
        (["--shape", "2,4,7,7", "--input", "photographs"], ["--input", "N,96,55,55 or N,256,27,27", "2,4,7,7"]),
        (["--op", "augment", "--mode", "backward"], ["no operator has this combination"]),
        (["--op", "augment", "--shape", "2,4,9,9"], ["no operator has this combination", "N,3,H,W"]),
        (["--repeats", "0"], ["--repeats"]),
        (["--batch", "0"], ["--batch"]),
    ],
)
def test_unknown_values_are_named_with_what_is_allowed(options: list[str], said: list[str]) -> None:
    assert_refused(fastcnn_command("bench", "kernels", *options), said)


def assert_refused(result: Result, said: list[str]) -> None:
    assert result.exit_code == 2
    output = " ".join(re.sub(r"\x1b\[[0-9;]*m|│", "", result.output).split())  # without colours, frame, broken lines
    assert [words for words in said if words not in output] == []


# bench models


@pytest.mark.usefixtures("best_backend", "small_classifiers")
def test_bench_models_prints_tables_and_writes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    monkeypatch.setattr("fastcnn.bench.network_workload.MATMUL", 64)
    who = ("--providers", "fastcnn", "--providers", "torch.eager", "--model", "alexnet", "--model", "vgg16-features")
    options = ("--size", 67, "--batch", 2, "--dtype", "fp32", "--repeats", 1, "--out", tmp_path)
    result = fastcnn_command("bench", "models", *who, *options, columns=80)
    assert result.exit_code == 0, result.output
    titles = ("alexnet inference, input (2, 3, 67, 67)", "alexnet training step", "vgg16-features input gradient")
    assert_readable(result.stdout, *titles, *who[1:4:2], "matrix product", "resident")
    document = json.loads((tmp_path / "models.json").read_text())
    assert [r["failure"] for r in document["rows"]] == [None] * 6
    assert all(r["images_per_s"] and r["vs_eager"] and r["gflop_per_s"] for r in document["rows"])
    assert document["header"]["matmul_gflop_per_s"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "lenet"], ["--model", "'lenet'", "alexnet, vgg16, inception_v1"]),
        (["--mode", "sleep"], ["--mode", "'sleep'", "inference, training step, input gradient"]),
        (["--dtype", "fp16"], ["--dtype", "'fp16'", "fp32, bf16"]),
        (["--providers", "caffe"], ["--providers", "'caffe'", "fastcnn", "torch.eager", "openvino"]),
        (["--size", "63"], ["--size", "63", "alexnet needs at least 64"]),
        (["--mode", "training step", "--dtype", "bf16"], ["no network", "--mode"]),
        (["--batch", "0"], ["--batch"]),
    ],
)
def test_bench_models_refuses(options: list[str], said: list[str]) -> None:
    assert_refused(fastcnn_command("bench", "models", *options), said)
