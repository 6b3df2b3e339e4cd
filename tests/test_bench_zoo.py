"""The zoo: what is in its grid, that nothing wrong gets a time, that a run goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from narrow import assert_readable
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from fastcnn.bench import report, zoo, zoo_cli
from fastcnn.bench.cases import ANY_FORMAT, Case
from fastcnn.bench.measure import Budget
from fastcnn.bench.providers import NetworkProvider
from fastcnn.bench.rows import EAGER, Row
from fastcnn.bench.zoo import (
    TORCHVISION,
    ZooCase,
    ZooNetwork,
    ZooResult,
    inception,
    measure_zoo,
    networks_of,
    select_zoo,
    zoo_providers,
)
from fastcnn.bench.zoo_report import is_done, read_results, write_results, zoo_summary, zoo_table
from fastcnn.cli import app

pytest.importorskip("PIL")
pytestmark = pytest.mark.usefixtures("best_backend", "small_classifiers")

ONCE = Budget(repeats=1)
NETWORKS = """
import torch
from torch import nn


class Viewed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.drop, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(0.5), nn.Linear(8 * 36, 10)

    def forward(self, x):
        return self.fc(self.drop(torch.relu(nn.functional.max_pool2d(self.conv(x), 6)).view(-1, 8 * 36)))


def normed():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.LocalResponseNorm(5), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, 3)),
    )


NETWORKS = {"viewed": (Viewed, 36), "normed": (normed, 32)}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some_networks.py"
    path.write_text(NETWORKS)
    return path


def zoo_command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "zoo", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})


def zoo_case(
    name: str = "normed", mode: str = "inference", batch: int = 2, size: int = 32, threads: int = 1
) -> ZooCase:
    return ZooCase(Case(name, (batch, 3, size, size), "fp32", ANY_FORMAT, mode), threads)


def result_of(case: ZooCase, **ms: float | None) -> ZooResult:
    """Of providers named with _ for what is in their names; None is a failure."""
    names = {"fastcnn_plain": "fastcnn plain", "eager": EAGER[0], "channels_last": EAGER[1], "compile": "torch.compile"}
    rows = [Row(**vars(case.case), provider=names.get(name, name), median_ms=value) for name, value in ms.items()]
    for row in rows:
        row.failure = None if row.median_ms else "wrong: logits: error 1.0e+00"
    return ZooResult(case, rows)


def text_of(*results: ZooResult, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(zoo_table(results))
    return capture.get()


# The grid


def test_grid_is_every_network_in_both_modes(file: Path) -> None:
    networks = {"other": ZooNetwork(nn.Identity), **networks_of(file)}
    cases = select_zoo(networks, threads=[1, 2])
    assert len(set(cases)) == len(cases) == 2 * (3 + 3 + 2) * 3 * 2
    sizes = {name: {c.case.shape[-1] for c in cases if c.case.op == name} for name in networks}
    assert sizes == {"other": {224, 64, 32}, "viewed": {36, 64, 32}, "normed": {32, 64}}
    assert {(c.case.mode, c.case.shape[0], c.threads) for c in cases} == {
        (mode, batch, threads) for mode in ("inference", "training") for batch in (1, 4, 16) for threads in (1, 2)
    }
    asked = select_zoo(networks, threads=[3], modes=["training"], batches=[5], sizes=[48])
    assert [str(case) for case in asked] == [f"{n} training, 48 px, batch 5, 3 threads" for n in networks]


@pytest.mark.parametrize("batches", [[], [1]])
def test_quick_is_a_sample_with_every_network_in_every_mode(batches: list[int]) -> None:
    networks = {name: ZooNetwork(nn.Identity) for name in "abcdefghijk"}
    every = select_zoo(networks, threads=[1], batches=batches)
    sample = select_zoo(networks, threads=[1], batches=batches, quick=True)
    assert sample == select_zoo(networks, threads=[1], batches=batches, quick=True)
    assert set(sample) < set(every)
    assert {(c.case.op, c.case.mode) for c in sample} == {(n, m) for n in networks for m in ("inference", "training")}
    assert {c.case.shape[-1] for c in sample} == {224, 64, 32}
    assert len(sample) <= max(len(every) / 6, 2 * len(networks))


def test_networks_without_torchvision_are_named_as_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    here, skipped = zoo_cli._networks((), None)
    assert list(here) == ["inception_v1"]
    assert skipped.startswith(f"skipped: {', '.join(TORCHVISION)}: torchvision is not installed; pip install")
    result = zoo_command("--model", "alexnet", "--model", "vgg16")
    assert result.exit_code == 2
    assert "skipped: alexnet, vgg16: torchvision is not installed; pip install 'fastcnn[zoo]'" in result.output


@pytest.mark.parametrize("name", ["squeezenet1_0", "googlenet", "resnet18"])
def test_torchvisions_networks_take_part(name: str) -> None:
    pytest.importorskip("torchvision")
    case = zoo_case(name, "inference", batch=1)
    result = measure_zoo(case, zoo.torchvision_networks()[name], zoo_providers("inference", False), ONCE)
    assert [row.failure for row in result.rows] == [None] * 4


# Cases


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", ["normed", "viewed"])
def test_right_networks_get_a_time(file: Path, name: str, mode: str) -> None:
    network = networks_of(file)[name]
    result = measure_zoo(zoo_case(name, mode, size=network.size), network, zoo_providers(mode, False), ONCE)
    plain = ["fastcnn plain"] if mode == "inference" else []
    assert [row.provider for row in result.rows] == ["fastcnn", *plain, *EAGER]
    failures = {row.provider: row.failure for row in result.rows if row.failure is not None}
    if name == "viewed":  # the view that channels_last maps do not have
        assert "view size is not compatible" in failures.pop(EAGER[1])
    assert failures == {}
    ms = {row.provider: row.median_ms or 0 for row in result.rows}
    faster = min(ms[name] for name in EAGER if ms[name])
    assert result.ratio() == pytest.approx(faster / ms["fastcnn"])
    assert not result.lost


def test_our_inception_takes_part() -> None:
    result = measure_zoo(zoo_case("inception_v1", "training"), inception(), zoo_providers("training", False), ONCE)
    assert [row.failure for row in result.rows] == [None] * 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_compiled_torch_takes_part(file: Path, mode: str) -> None:
    providers = [one for one in zoo_providers(mode, True) if one.name == "torch.compile"]
    (row,) = measure_zoo(zoo_case(mode=mode), networks_of(file)["normed"], providers, ONCE).rows
    assert row.failure is None
    assert row.median_ms


def test_training_is_in_training_mode_and_without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop, self.fc = nn.BatchNorm2d(3), nn.Dropout(0.9), nn.Linear(3, 10)

        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, self.norm.training, torch.is_grad_enabled(), self.drop.p, x.dtype))
            return self.fc(self.drop(self.norm(x)).mean((2, 3)))

    eager = [NetworkProvider(EAGER[0])]
    assert measure_zoo(zoo_case(mode="training"), ZooNetwork(lambda _: Seen()), eager, ONCE).rows[0].failure is None
    of_float = [call[:4] for call in seen if call[4] == torch.float32]
    assert of_float[1:] == [(True, False, True, 0.0), (True, True, True, 0.0), (True, True, True, 0.0)]
    seen.clear()
    measure_zoo(zoo_case(), ZooNetwork(lambda _: Seen()), eager, ONCE)
    assert {call[:4] for call in seen} == {(False, False, False, 0.0)}


def without_norms(network: nn.Module) -> nn.Module:
    network[1] = nn.Identity()
    return network


def without_means(network: nn.Module) -> nn.Module:
    network[1].running_mean.zero_()
    return network


def of_half_the_gradient(network: nn.Module) -> nn.Module:
    network[0].weight.register_hook(lambda grad: grad / 2)
    return network


def that_raises(network: nn.Module) -> nn.Module:
    raise RuntimeError("no [such] layer\nand a second line")


@pytest.mark.parametrize(
    ("mode", "wrong", "said"),
    [
        ("inference", without_norms, "wrong: logits: error"),
        ("inference", without_means, "wrong: logits: error"),
        ("training", of_half_the_gradient, "wrong: gradient: error"),
        ("inference", that_raises, "cannot run: RuntimeError: no [such] layer"),
    ],
)
def test_wrong_answers_have_no_time(file: Path, mode: str, wrong: Callable[[nn.Module], nn.Module], said: str) -> None:
    providers = [NetworkProvider("fastcnn", optimize=wrong), NetworkProvider(EAGER[0])]
    result = measure_zoo(zoo_case(mode=mode), networks_of(file)["normed"], providers, ONCE)
    failed, good = result.rows
    assert (failed.failure or "").startswith(said)
    assert (failed.median_ms, failed.n, good.failure, good.n) == (None, 0, None, 1)
    assert (result.ratio(), result.lost) == (None, True)
    assert f"normed {mode}, 32 px, fastcnn: {said}" in text_of(result)
    assert "second line" not in text_of(result)
    assert f"{mode}: fastcnn failed where eager runs: {result.case}" in zoo_summary([result])


def test_network_that_cannot_run_is_shown_so_once(file: Path) -> None:
    network = networks_of(file)["viewed"]
    results = [
        measure_zoo(zoo_case("viewed", batch=batch, size=32), network, zoo_providers("inference", False), ONCE)
        for batch in (1, 2)
    ]
    for result in results:
        assert all((row.failure or "").startswith("cannot run: RuntimeError: shape") for row in result.rows)
        assert (result.ratio(), result.lost) == (None, False)
    assert text_of(*results).count("viewed inference, 32 px, all: cannot run: RuntimeError: shape") == 1


def test_threads_are_those_of_the_case_and_put_back() -> None:
    before, seen = torch.get_num_threads(), []

    def count(network: nn.Module) -> nn.Module:
        seen.append(torch.get_num_threads())
        return network

    network = ZooNetwork(lambda _: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)))
    for threads in (1, before + 1):
        measure_zoo(zoo_case(threads=threads), network, [NetworkProvider("fastcnn", optimize=count)], ONCE)
    assert seen == [1, before + 1]
    assert torch.get_num_threads() == before


# Ratios


def test_ratio_is_to_the_faster_format() -> None:
    result = result_of(zoo_case(), fastcnn=2.0, fastcnn_plain=4.0, eager=6.0, channels_last=5.0, compile=1.0)
    assert (result.ratio(), result.ratio("fastcnn plain"), result.lost) == (2.5, 1.25, False)
    assert result_of(zoo_case(), fastcnn=2.0, eager=6.0, channels_last=None).ratio() == 3.0
    assert result_of(zoo_case(), fastcnn=2.0, eager=None, channels_last=None).ratio() is None


def test_worst_comes_first_and_is_summed_up() -> None:
    cases = [zoo_case(batch=batch) for batch in (1, 2, 3, 4)]
    training = result_of(zoo_case(mode="training"), fastcnn=1.0, eager=1.5)
    results = [
        result_of(cases[0], fastcnn=1.0, fastcnn_plain=2.0, eager=1.2),
        result_of(cases[1], fastcnn=1.0, fastcnn_plain=1.0, eager=0.9),
        result_of(cases[2], fastcnn=None, fastcnn_plain=1.0, eager=0.97),
        result_of(cases[3], fastcnn=1.0, fastcnn_plain=1.0, eager=0.96),
    ]
    assert zoo_summary([*results, training]) == [
        f"inference: 3 cases, worst ratio 0.90 ({cases[1]}), 2 under 0.97",
        f"inference without inference=True: 4 cases, worst ratio 0.60 ({cases[0]}), 3 under 0.97",
        f"inference: fastcnn failed where eager runs: {cases[2]}",
        f"training: 1 cases, worst ratio 1.50 ({training.case}), 0 under 0.97",
    ]
    order = [line.split()[5] for line in text_of(*results).splitlines() if "px, batch" in line]
    assert order == ["3,", "2,", "4,", "1,"]


def test_table_is_readable_at_80_columns() -> None:
    slow = {"fastcnn": 1234.5, "fastcnn_plain": 1234.5, "eager": 4321.0, "channels_last": 4321.0, "compile": 1234.5}
    right = result_of(zoo_case("mobilenet_v3_large", batch=16, size=224, threads=16), **slow)
    lost = result_of(zoo_case("squeezenet1_0", "training", size=224), **dict.fromkeys(slow))
    for row in lost.rows:
        row.failure = "cannot run: RuntimeError: no such layer"
    shown = text_of(right, lost, width=80)
    assert_readable(shown, "mobilenet_v3_large", "squeezenet1_0", "inference", "training", "threads")
    assert_readable(shown, "channels", "compile", "1234.50", "3.5x", "cannot", "no such layer")


# The file


def test_results_come_back_from_the_file(tmp_path: Path) -> None:
    results = {case: result_of(case, fastcnn=1.0, eager=2.0) for case in (zoo_case(), zoo_case(threads=2))}
    results[zoo_case()].command = "fastcnn bench zoo --threads 1"
    write_results(tmp_path / "zoo.json", results, "fastcnn bench zoo")
    assert read_results(tmp_path / "zoo.json") == results
    assert read_results(tmp_path / "another.json") == {}
    document = json.loads((tmp_path / "zoo.json").read_text())
    assert [found["ratio"] for found in document["cases"]] == [2.0, 2.0]
    assert [found["command"] for found in document["cases"]] == ["fastcnn bench zoo --threads 1", ""]
    assert document["header"]["torch"] == torch.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["zoo.json"]


def test_done_is_what_has_the_same_versions_sources_and_every_provider() -> None:
    result = result_of(zoo_case(), fastcnn=1.0, eager=None)
    assert is_done(result, ["fastcnn", EAGER[0]])
    assert not is_done(result, ["fastcnn", EAGER[0], "torch.compile"])
    assert not is_done(None, [])
    assert not is_done(replace(result, torch="1.0"), ["fastcnn"])
    assert not is_done(replace(result, fastcnn="0"), ["fastcnn"])
    assert not is_done(replace(result, sources="of another commit"), ["fastcnn"])


def test_old_file_stays_where_the_new_one_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write_json(tmp_path / "zoo.json", {"old": 1})

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write_json(tmp_path / "zoo.json", {"new": 1})
    assert json.loads((tmp_path / "zoo.json").read_text()) == {"old": 1}


def test_interrupted_run_goes_on(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    results: dict[ZooCase, ZooResult] = {}

    def measured(case: ZooCase, *arguments: Any) -> ZooResult:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(str(case))
        if case not in results:
            results[case] = measure_zoo(case, *arguments)
        return results[case]

    monkeypatch.setattr(zoo_cli, "measure_zoo", measured)
    options = ("--networks", file, "--model", "normed", "--mode", "inference", "--size", 32, "--repeats", 1)
    options += ("--threads", 1, "--threads", 2, "--batch", 1, "--batch", 2, "--out", tmp_path)
    first = zoo_command(*options)
    assert first.exit_code == 130
    assert "interrupted" in first.output
    assert "inference: 3 cases" in first.output
    before = ran.copy()
    assert len(read_results(tmp_path / "zoo.json")) == 3
    ran.clear()
    second = zoo_command(*options)
    assert second.exit_code == 0, second.output
    assert [*before, *ran] == [str(case) for case in read_results(tmp_path / "zoo.json")]
    assert len(ran) == 1
    assert "inference: 4 cases" in second.output
    assert "faster eager / fastcnn" in second.output
    ran.clear()
    assert zoo_command(*options).exit_code == 0
    assert ran == []
    assert zoo_command(*options, "--batch", 4, "--fresh").exit_code == 130  # all six anew, of which three come
    assert ran == [*before[:2], "normed inference, 32 px, batch 2, 1 thread"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("NETWORKS = 1 / 0", "ZeroDivisionError"),
        ("", "AttributeError: module"),
        ("NETWORKS = {'vgg16': (None, 32)}", "the name 'vgg16' is taken"),
    ],
)
def test_files_that_do_not_do_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "bad.py").write_text(text)
    result = zoo_command("--networks", tmp_path / "bad.py", "--out", tmp_path)
    assert result.exit_code == 2
    assert said in result.output
    assert not (tmp_path / "zoo.json").exists()


def test_unknown_names_are_refused(file: Path) -> None:
    result = zoo_command("--networks", file, "--model", "lenet")
    assert result.exit_code == 2
    assert "'lenet'" in result.output
    assert "normed" in result.output
    assert zoo_command("--networks", file, "--mode", "training step").exit_code == 2
    assert zoo_command("--networks", file.with_name("none.py")).exit_code == 2
