"""Serving: what clients do, what its figures mean, that nothing wrong has any."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import assert_readable
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from fastcnn.bench import peers
from fastcnn.bench.cases import ANY_FORMAT, Case
from fastcnn.bench.providers import NetworkProvider, network_providers
from fastcnn.bench.serve import Burst, ServeRow, add_figures, burst, measure_serving, percentile, serve_tables
from fastcnn.cli import app

pytest.importorskip("PIL")
pytestmark = pytest.mark.usefixtures("best_backend", "small_classifiers")

HERE = network_providers()
ALEXNET = Case("alexnet", (2, 3, 64, 64), "fp32", ANY_FORMAT, "inference")


def serve_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", *map(str, arguments)], env={"COLUMNS": "80", "TERM": "dumb"})


def text_of(rows: list[ServeRow]) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(*serve_tables(rows))
    return capture.get()


# Figures


def test_percentiles_are_latencies_that_so_many_do_not_exceed() -> None:
    latencies = [float(ms) for ms in range(200, 0, -1)]
    assert [percentile(latencies, percent) for percent in (50, 90, 99, 100)] == [100.0, 180.0, 198.0, 200.0]
    assert [percentile([3.0, 1.0], percent) for percent in (50, 51, 99)] == [1.0, 3.0, 3.0]
    assert percentile([7.0], 1) == 7.0


def test_figures_follow_from_the_calls() -> None:
    row = ServeRow("alexnet", 8, 64, "fp32", 2, "fastcnn")
    add_figures(row, Burst([ms / 1e3 for ms in range(1, 101)], elapsed=4.0))
    assert (row.calls, row.images_per_s) == (100, 8 * 100 / 4.0)
    assert (row.p50_ms, row.p90_ms, row.p99_ms) == pytest.approx((50.0, 90.0, 99.0))
    assert text_of([row]).splitlines()[-1].split() == ["fastcnn", "200.0", "50.00", "90.00", "99.00", "100"]


# Clients


def test_clients_call_at_once_from_their_own_threads() -> None:
    together = threading.Barrier(3)
    callers: list[int] = []

    def call() -> tuple[Tensor, ...]:
        callers.append(threading.get_ident())
        together.wait(10)  # is there only if all three are calling
        return (torch.ones(1),)

    seen = burst(call, 3, 0.0)
    assert len(set(callers)) == 3
    assert threading.get_ident() not in callers
    assert len(callers) == 3 + len(seen.latencies) == 6  # the first calls are not timed
    assert len(seen.answers) == 3


def test_clients_go_on_for_the_time_of_a_burst() -> None:
    seen = burst(lambda: (time.sleep(0.02), (torch.ones(1),))[1], 2, 0.1)
    assert 0.1 <= seen.elapsed < 1.0
    assert min(seen.latencies) >= 0.02
    assert sum(seen.latencies) <= 2 * seen.elapsed
    assert 2 <= len(seen.latencies) <= 2 * 6


def test_clients_compute_on_as_many_threads_as_their_caller() -> None:
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, before + 1):
            torch.set_num_threads(threads)
            burst(lambda: (seen.append(torch.get_num_threads()), ())[1], 2, 0.0)
    finally:
        torch.set_num_threads(before)
    assert seen == [1] * 4 + [before + 1] * 4


@pytest.mark.parametrize("first", [1, 4])
def test_a_client_that_fails_ends_the_burst(first: int) -> None:
    counted = iter(range(1, 100))

    def call() -> tuple[Tensor, ...]:
        if next(counted) >= first:
            raise RuntimeError("busy")
        return (torch.ones(1),)

    with pytest.raises(RuntimeError, match=r"^busy$"):
        burst(call, 3, 0.0)


# Providers


def test_right_networks_get_figures() -> None:
    rows = measure_serving(ALEXNET, [HERE["fastcnn"], HERE["torch.eager channels_last"]], [1, 2], 0.0, 2)
    assert [(r.provider, r.clients, r.failure) for r in rows] == [
        (name, clients, None) for name in ("fastcnn", "torch.eager channels_last") for clients in (1, 2)
    ]
    for r in rows:
        assert r.calls == 2 * r.clients
        assert 0 < (r.p50_ms or 0) <= (r.p90_ms or 0) <= (r.p99_ms or 0)
        assert r.images_per_s
        assert (r.error or 0) <= (r.tolerance or 0)


def test_wrong_answers_have_no_figures() -> None:
    def wrong(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
        return lambda x: network(x).detach() * 1.001

    def sharing(network: nn.Module, x: Tensor, dtype: torch.dtype) -> Any:
        """Right, unless another call runs meanwhile."""
        right, inside = network(x).detach(), [0]

        def run(x: Tensor) -> Tensor:
            inside[0] += 1
            time.sleep(0.1)
            alone = inside[0] == 1
            inside[0] -= 1
            return right if alone else right * 2

        return run

    providers = [NetworkProvider("wrong", export=wrong), NetworkProvider("shared", export=sharing)]
    rows = measure_serving(ALEXNET, providers, [1, 2], 0.0, 1)
    assert ["error" in (r.failure or "") for r in rows] == [True, True, False, True]
    assert [(r.calls > 0, r.images_per_s is not None) for r in rows] == [(not r.failure, not r.failure) for r in rows]
    assert "wrong: logits: error" in text_of(rows)
    assert text_of(rows).count("failed") == 3


def test_16_bits() -> None:
    case = Case("alexnet", (1, 3, 64, 64), "bf16", ANY_FORMAT, "inference")
    (r,) = measure_serving(case, [HERE["fastcnn"]], [2], 0.0, 1)
    assert r.failure is None
    assert (r.error or 0) > 1e-4
    assert "alexnet serving, batch 1, 64 px, bf16" in text_of([r])


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_other_runtimes_serve_several_clients(runtime: str) -> None:
    pytest.importorskip(runtime)
    pytest.importorskip("onnxscript")
    (r,) = measure_serving(ALEXNET, [HERE[runtime]], [3], 0.3, 1)
    assert r.failure is None
    assert r.calls >= 3


def test_openvino_has_a_request_for_each_thread() -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 9)).eval()
    run = peers.openvino(network, torch.ones(1, 3, 99, 99), torch.float32)
    images = [torch.full((1, 3, 99, 99), float(i)) for i in range(4)]
    expected = [run(x) for x in images]
    got: dict[int, Tensor] = {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: run(images[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], expected[i]) for i in range(4))


@pytest.mark.slow
def test_compiled_torch_serves() -> None:
    rows = measure_serving(ALEXNET, [HERE["torch.compile"]], [1, 2], 0.0, 1)
    assert [r.failure for r in rows] == [None, None]


# The command


def test_serve_prints_tables_and_writes_a_file(tmp_path: Path) -> None:
    who = ("--providers", "fastcnn", "--providers", "torch.eager channels_last", "--model", "alexnet")
    options = ("--size", 64, "--clients", 1, "--clients", 2, "--seconds", 0, "--repeats", 1, "--out", tmp_path)
    result = serve_command(*who, *options)
    assert result.exit_code == 0, result.output
    names = ("alexnet serving, batch 1, 64 px, fp32", "1 client", "2 clients", "p99 ms")
    assert_readable(result.stdout, *names, *who[1:4:2])
    document = json.loads((tmp_path / "serve.json").read_text())
    assert [(row["provider"], row["clients"], row["failure"]) for row in document["rows"]] == [
        (name, clients, None) for name in who[1:4:2] for clients in (1, 2)
    ]
    assert document["header"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "vgg16-features"),
        ("--dtype", "fp16"),
        ("--providers", "torch.eager"),
        ("--size", 63, "--model", "alexnet"),
        ("--clients", 0),
    ],
)
def test_serve_refuses(options: tuple[object, ...]) -> None:
    result = serve_command(*options)
    assert result.exit_code == 2
    assert str(options[0]) in result.output
