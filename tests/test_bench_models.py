"""The network benchmark: what it measures, that nothing wrong gets a time, and what its figures mean."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import fastcnn
import fastcnn.functional as FF
from fastcnn.bench import network_workload, peers, report
from fastcnn.bench.cases import ANY_FORMAT, Case
from fastcnn.bench.measure import Budget, measure
from fastcnn.bench.memory import peak_bytes, resident_bytes
from fastcnn.bench.network_workload import NetworkWorkload
from fastcnn.bench.networks import NETWORKS, count_flop, select_networks
from fastcnn.bench.providers import NetworkProvider, network_providers
from fastcnn.bench.rows import Row, add_ratios

pytest.importorskip("PIL")
pytestmark = pytest.mark.usefixtures("best_backend", "small_classifiers")

ONCE = Budget(repeats=1)
HERE = network_providers()
EAGER = [HERE[name] for name in ("fastcnn", "fastcnn NCHW", "torch.eager", "torch.eager channels_last")]
INFERENCE = Case("alexnet", (2, 3, 67, 67), "fp32", ANY_FORMAT, "inference")
TRAINING = replace(INFERENCE, mode="training step")
GRADIENT = Case("vgg16-features", (2, 3, 32, 32), "fp32", ANY_FORMAT, "input gradient")


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_workload, "MATMUL", 64)


def run(case: Case, *providers: NetworkProvider) -> list[Row]:
    return measure([case], NetworkWorkload, providers, ONCE)


def plain(case: Case) -> Any:
    return NETWORKS[case.op].make(case.shape[-1], True)


def text_of(rows: list[Row]) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(*report.tables(rows))
    return capture.get()


def exporting(export: Any) -> NetworkProvider:
    return NetworkProvider("another", export=export)


# Cases


def test_usual_cases() -> None:
    assert [str(case) for case in select_networks(quick=True)] == [
        "alexnet inference, fp32 any format (32, 3, 227, 227)",
        "alexnet training step, fp32 any format (32, 3, 227, 227)",
        "vgg16-features input gradient, fp32 any format (4, 3, 224, 224)",
    ]
    every = select_networks()
    assert set(every) > set(select_networks(quick=True))
    assert Case("alexnet", (32, 3, 227, 227), "bf16", ANY_FORMAT, "inference") in every
    assert {case.op for case in every} == set(NETWORKS)
    for name in NETWORKS:  # what is asked for is run, also beside quick
        assert {case.op for case in select_networks(networks=[name], quick=True)} == {name}
    asked = select_networks(networks=["alexnet"], modes=["inference"], batches=[1, 8], dtypes=["fp32"], size=99)
    assert [case.shape for case in asked] == [(1, 3, 99, 99), (8, 3, 99, 99)]


def test_flop_are_those_of_the_layers() -> None:
    features = plain(GRADIENT)
    forward, size = 0, 32
    for layer in features.layers:
        size //= 2 if isinstance(layer, nn.MaxPool2d) else 1
        forward += 2 * layer.weight.numel() * size**2 if isinstance(layer, nn.Conv2d) else 0
    assert count_flop(GRADIENT, features) == 2 * 2 * forward
    network = plain(INFERENCE)
    inference, training = count_flop(INFERENCE, network), count_flop(TRAINING, network)
    conv1 = 2 * 2 * 96 * 15**2 * 3 * 11**2
    assert training == 3 * inference - conv1


def test_features_are_those_of_vgg16() -> None:
    features, vgg = plain(GRADIENT), fastcnn.models.create_model("vgg16", plain=True, input_size=32)
    vgg.features[:30].load_state_dict(features.layers.state_dict())
    assert not any(p.requires_grad for p in features.parameters())
    x, losses = torch.randn(2, 3, 32, 32), []
    expected = x
    for layer in vgg.features:
        if isinstance(layer, nn.MaxPool2d):  # after the last ReLU of each stage
            losses.append(expected.square().sum((1, 2, 3)))
        expected = layer(expected)
    torch.testing.assert_close(features(x), torch.stack(losses).sum(0))


# Checks and figures


@pytest.mark.parametrize("case", [INFERENCE, TRAINING, GRADIENT], ids=lambda case: case.mode)
def test_right_networks_get_a_time(case: Case) -> None:
    rows = run(case, *EAGER)
    assert [r.failure for r in rows] == [None] * 4
    for r in rows:
        assert r.error is not None
        assert r.tolerance is not None
        assert r.error <= r.tolerance
        assert r.median_ms
        assert r.images_per_s == pytest.approx(2e3 / r.median_ms)
        assert r.flop is not None
        assert r.gflop_per_s == pytest.approx(r.flop / r.median_ms / 1e6)
    ours = rows[0]
    faster = min(r.median_ms or 0 for r in rows[2:])
    assert ours.vs_eager == pytest.approx(faster / (ours.median_ms or 1))
    assert (ours.forward_ms is not None) == (case.mode == "training step")
    if case.mode != "inference":
        assert ours.saved_bytes is not None
        # of maps as small as here, optimize() leaves pools to PyTorch, which keeps their inputs
        most = {"training step": 0.5, "input gradient": 0.9}[case.mode]
        assert ours.saved_vs_eager == ours.saved_bytes / min(r.saved_bytes or 0 for r in rows[2:]) < most
    shown = text_of(rows)
    assert "fastcnn NCHW" in shown
    assert ("forward " in shown) == (case.mode == "training step")


def test_wrong_logits_are_shown_failed_without_a_time() -> None:
    def scaled(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
        return lambda x: network(x).detach() * 1.001

    def swapped(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
        return lambda x: network(x.flip(0)).detach()

    for wrong in (scaled, swapped):
        failed, good = run(INFERENCE, exporting(wrong), HERE["fastcnn"])
        assert "logits: error" in (failed.failure or "")
        assert (failed.median_ms, failed.images_per_s, good.failure) == (None, None, None)
        assert "another, fp32: failed: logits" in text_of([failed, good])


@pytest.mark.parametrize("case", [TRAINING, GRADIENT], ids=lambda case: case.mode)
def test_wrong_gradients_are_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of features that pass their gradient on with another factor."""
    relu = F.relu
    monkeypatch.setattr(F, "relu", lambda x, *_, **__: relu(x).detach() + 1.1 * (relu(x) - relu(x).detach()))

    def make(case: Case) -> NetworkWorkload:
        with monkeypatch.context() as undone:
            undone.setattr(F, "relu", relu)
            return NetworkWorkload(case)

    (failed,) = measure([case], make, [HERE["torch.eager"]], ONCE)
    assert "gradient: error" in (failed.failure or "")


def test_16_bits_and_torch_without_them() -> None:
    ours, *torchs = run(replace(INFERENCE, dtype="bf16"), HERE["fastcnn"], HERE["torch.eager"])
    assert ours.failure is None
    assert ours.vs_eager
    if torchs[0].failure is not None:
        assert [r.provider for r in torchs] == ["torch.eager", "torch.eager (fp32)"]
        assert torchs[1].failure is None


def test_what_is_not_installed_is_shown_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = run(INFERENCE, HERE["onnxruntime"], HERE["openvino"])
    assert all((r.failure or "").startswith("not installed: pip install fastcnn[peers]") for r in rows)
    shown = text_of(rows)
    assert "failed" not in shown
    assert shown.count("not installed") == 4
    assert run(TRAINING, HERE["openvino"]) == []


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_other_runtimes_agree(runtime: str) -> None:
    pytest.importorskip(runtime)
    pytest.importorskip("onnxscript")
    (r,) = run(INFERENCE, HERE[runtime])
    assert r.failure is None


def test_onnxruntime_has_no_16_bits() -> None:
    with pytest.raises(NotImplementedError, match="fp32 only"):
        peers.onnxruntime(nn.ReLU(), torch.ones(1), torch.bfloat16)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_peak_is_what_a_call_adds() -> None:
    if (peak := peak_bytes(lambda: torch.ones(2**24))) is None:
        pytest.skip("the kernel does not let this process reset its peak")
    assert 60e6 < peak < 100e6


def test_plots_show_what_has_a_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fastcnn.bench.plots import write_plots

    options = {"median_ms": 3.0, "images_per_s": 99.0, "flop": 10**9, "gflop_per_s": 300.0, "matmul_gflop_per_s": 100.0}
    case = ("alexnet", (2, 3, 67, 67), "fp32", ANY_FORMAT, "inference", "fresh")
    rows = [Row(*case, name, **options) for name in ("fastcnn", "torch.eager")]  # type: ignore[arg-type]
    add_ratios(rows)
    document = report.report(rows, command="", source="photographs")
    written = write_plots(tmp_path, document, rows, "models")
    assert [path.name for path in written] == ["models_speedup.png", "models_roofline.png"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_resident_bytes_are_those_of_the_weights_and_what_is_prepared_from_them() -> None:
    hoarded = []

    def hoarding(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
        hoarded.append(torch.ones(2**25))
        return lambda x: network(x).detach()

    small = NetworkProvider("another", export=lambda network, x, dtype: lambda x: network(x).detach())
    weights = 4 * sum(p.numel() for p in plain(INFERENCE).parameters())
    for provider, least in ((small, weights), (exporting(hoarding), weights + 4 * 2**25)):
        (r,) = run(INFERENCE, provider)
        assert r.failure is None
        assert r.resident_bytes is not None
        assert 0.9 * least < r.resident_bytes < least + 60e6
        assert f"{r.resident_bytes / 1e6:.0f}" in text_of([r]).split()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_memory_that_is_only_kept_for_the_next_outputs_is_not_resident() -> None:
    torch.use_deterministic_algorithms(False)  # in which outputs are allocated otherwise
    before = resident_bytes()
    x = torch.randn(1, 64, 512, 512)
    FF.max_pool2d(x, 3, stride=1)
    del x
    assert (resident_bytes() or 0) - (before or 0) < 30e6


def test_results_that_have_fewer_columns_are_shown() -> None:
    results = Path(__file__).parent.parent / "benchmarks/results/amd-epyc-2-threads/inference/models.json"
    document = json.loads(results.read_text())
    for fields in document["rows"]:
        fields.pop("resident_bytes", None)
    shown = text_of(report.read_rows(document))
    assert "peak" in shown
    assert "resident" not in shown


@pytest.mark.parametrize("network", ["alexnet", "vgg16", "inception_v1"])
def test_bf16_inference_is_that_of_optimize(network: str) -> None:
    case = Case(network, (1, 3, 64, 64), "bf16", ANY_FORMAT, "inference")
    workload = NetworkWorkload(case)
    ours = workload.prepare(HERE["fastcnn"], "bf16")
    fused = workload.fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expected = fastcnn.optimize(fused, inference=True, dtype=torch.bfloat16)
    (logits,) = ours.call()
    assert torch.equal(logits, expected(workload.x.contiguous(memory_format=torch.channels_last)))
