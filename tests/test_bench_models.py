"""The network benchmark: what it measures, that nothing wrong gets a time, and what its figures mean."""

from __future__ import annotations

import copy
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
from fastcnn.bench import network_measure, peers, report
from fastcnn.bench.cases import ANY_FORMAT, Case
from fastcnn.bench.inputs import images
from fastcnn.bench.measure import Budget, held_bytes
from fastcnn.bench.network_measure import measure_network, peak_bytes, resident_bytes
from fastcnn.bench.network_providers import NetworkProvider, network_providers, prepare
from fastcnn.bench.networks import NETWORKS, Features, count_flop, make_network, select_networks
from fastcnn.bench.rows import Row, add_ratios

pytest.importorskip("PIL")
pytestmark = pytest.mark.usefixtures("best_backend")

ONCE = Budget(repeats=1)
HERE = network_providers()
EAGER = [HERE[name] for name in ("fastcnn", "fastcnn NCHW", "torch.eager", "torch.eager channels_last")]
INFERENCE = Case("alexnet", (2, 3, 67, 67), "fp32", ANY_FORMAT, "inference")
TRAINING = replace(INFERENCE, mode="training step")
GRADIENT = Case("vgg16-features", (2, 3, 32, 32), "fp32", ANY_FORMAT, "input gradient")


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_measure, "MATMUL", 64)


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
    features = make_network(GRADIENT, plain=True)
    maps = {1: 32, 2: 16, 3: 8, 4: 4, 5: 2}
    forward = sum(
        2 * layer.weight.numel() * maps[int(name[4])] ** 2
        for name, layer in features.named_children()
        if isinstance(layer, nn.Conv2d)
    )
    assert count_flop(GRADIENT, features) == 2 * 2 * forward
    network = make_network(INFERENCE, plain=True)
    inference, training = count_flop(INFERENCE, network), count_flop(TRAINING, network)
    conv1 = 2 * 2 * 96 * 15**2 * 3 * 11**2
    assert training == 3 * inference - conv1


def test_features_are_vgg16s() -> None:
    fused, plain = Features(plain=False), Features(plain=True)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert sum(p.numel() for p in fused.parameters()) == 14_714_688
    assert not any(p.requires_grad for p in fused.parameters())


# Checks and figures


@pytest.mark.parametrize("case", [INFERENCE, TRAINING, GRADIENT], ids=lambda case: case.mode)
def test_right_networks_get_a_time(case: Case) -> None:
    rows = measure_network(case, EAGER, ONCE)
    assert [r.failure for r in rows] == [None] * 4
    for r in rows:
        assert r.error is not None
        assert r.tolerance is not None
        assert r.error <= r.tolerance
        assert r.median_ms
        assert r.images_per_s == pytest.approx(2e3 / r.median_ms)
        assert r.flop is not None
        assert r.gflop_per_s == pytest.approx(r.flop / r.median_ms / 1e6)
    ours, eager = rows[0], rows[2]
    assert ours.vs_eager == pytest.approx((eager.median_ms or 0) / (ours.median_ms or 1))
    assert (ours.forward_ms is not None) == (case.mode == "training step")
    if case.mode != "inference":
        assert ours.saved_bytes is not None
        assert eager.saved_bytes is not None
        assert ours.saved_vs_eager == ours.saved_bytes / eager.saved_bytes < 0.5
    shown = text_of(rows)
    assert "fastcnn NCHW" in shown
    assert ("forward " in shown) == (case.mode == "training step")


def test_wrong_logits_are_shown_failed_without_a_time() -> None:
    def scaled(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
        return lambda x: network(x).detach() * 1.001

    def swapped(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
        return lambda x: network(x.flip(0)).detach()

    for wrong in (scaled, swapped):
        failed, good = measure_network(INFERENCE, [exporting(wrong), HERE["fastcnn"]], ONCE)
        assert "logits: error" in (failed.failure or "")
        assert (failed.median_ms, failed.images_per_s, good.failure) == (None, None, None)
        assert "another, fp32: failed: logits" in text_of([failed, good])


@pytest.mark.parametrize("case", [TRAINING, GRADIENT], ids=lambda case: case.mode)
def test_wrong_gradients_are_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of features that pass their gradient on with another factor."""
    relu = F.relu
    monkeypatch.setattr(F, "relu", lambda x, *_, **__: relu(x).detach() + 1.1 * (relu(x) - relu(x).detach()))
    right = network_measure.expected_of_network

    def expected(*args: Any) -> tuple[Tensor, ...]:
        with monkeypatch.context() as undone:
            undone.setattr(F, "relu", relu)
            return right(*args)

    monkeypatch.setattr(network_measure, "expected_of_network", expected)
    (failed,) = measure_network(case, [HERE["torch.eager"]], ONCE)
    assert "gradient: error" in (failed.failure or "")


def test_16_bits_and_torch_without_them() -> None:
    ours, *torchs = measure_network(replace(INFERENCE, dtype="bf16"), [HERE["fastcnn"], HERE["torch.eager"]], ONCE)
    assert ours.failure is None
    assert ours.vs_eager
    if torchs[0].failure is not None:
        assert [r.provider for r in torchs] == ["torch.eager", "torch.eager (fp32)"]
        assert torchs[1].failure is None


def test_what_is_not_installed_is_shown_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    rows = measure_network(INFERENCE, [HERE["onnxruntime"], HERE["openvino"]], ONCE)
    assert all((r.failure or "").startswith("not installed: pip install fastcnn[peers]") for r in rows)
    shown = text_of(rows)
    assert "failed" not in shown
    assert shown.count("not installed") == 4
    assert measure_network(TRAINING, [HERE["openvino"]], ONCE) == []


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_other_runtimes_agree(runtime: str) -> None:
    pytest.importorskip(runtime)
    pytest.importorskip("onnxscript")
    (r,) = measure_network(INFERENCE, [HERE[runtime]], ONCE)
    assert r.failure is None


def test_onnxruntime_has_no_16_bits() -> None:
    with pytest.raises(NotImplementedError, match="fp32 only"):
        peers.onnxruntime(nn.ReLU(), torch.ones(1), torch.bfloat16)


def test_held_bytes_leave_parameters_out_and_count_tapped_features() -> None:
    layer = nn.Linear(10, 10)
    x = torch.randn(5, 10, requires_grad=True)
    assert held_bytes(lambda: layer(x), layer.parameters()) == 200
    assert held_bytes(lambda: layer(x).square().sum(), layer.parameters()) == 400


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells")
def test_peak_is_what_a_call_adds() -> None:
    if (peak := peak_bytes(lambda: torch.ones(2**24))) is None:
        pytest.skip("the kernel does not let this process reset its peak")
    assert 60e6 < peak < 100e6


def test_plots_show_what_has_a_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fastcnn.bench.plots import write_plots

    options = {"median_ms": 3.0, "flop": 10**9, "gflop_per_s": 300.0, "matmul_gflop_per_s": 100.0}
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
    weights = 4 * sum(p.numel() for p in make_network(INFERENCE, plain=True).parameters())
    for provider, least in ((small, weights), (exporting(hoarding), weights + 4 * 2**25)):
        (r,) = measure_network(INFERENCE, [provider], ONCE)
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


def test_rows_of_older_results_have_no_resident_bytes() -> None:
    results = Path(__file__).parent.parent / "benchmarks/results/amd-epyc-2-threads/models.json"
    rows = [Row(**fields) for fields in json.loads(results.read_text())["rows"]]
    assert {r.resident_bytes for r in rows} >= {None}
    assert "resident MB" in text_of(rows)


@pytest.mark.parametrize("network", ["alexnet", "vgg16", "inception_v1"])
def test_bf16_inference_is_that_of_optimize(network: str) -> None:
    case = Case(network, (1, 3, 64, 64), "bf16", ANY_FORMAT, "inference")
    fused = make_network(case, plain=False)
    x = images(1, 64)
    ours = prepare(HERE["fastcnn"], case, copy.deepcopy(fused), x, torch.zeros(1, dtype=torch.long))
    expected = fastcnn.optimize(fused.to(memory_format=torch.channels_last), inference=True, dtype=torch.bfloat16)
    (logits,) = ours.call()
    assert torch.equal(logits, expected(x.contiguous(memory_format=torch.channels_last)))
