"""``make gpu``: the budget holds, what was found is written as it is found, and nothing that fails stops the rest."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from fastcnn.bench import gpu
from fastcnn.bench.cases import ANY_FORMAT, Case
from fastcnn.bench.gpu import RESERVE, SHARES, Clock, kernel_cases, network_cases, outcomes, read_rows, run
from fastcnn.bench.rows import Row


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.txt"


def test_parts_get_their_share_of_what_is_left() -> None:
    now = 1000.0
    clock = Clock(RESERVE + 100, lambda: now)
    assert clock.share("tests") == pytest.approx(100 * SHARES["tests"])
    now += 60
    assert clock.left() == pytest.approx(RESERVE + 40)
    assert clock.share("networks") == pytest.approx(40)
    now += 45
    assert clock.share("networks") == 0
    now += 1000
    assert clock.left() == 0


def test_all_parts_together_end_within_the_budget() -> None:
    now = 0.0
    clock = Clock(500, lambda: now)
    for part in SHARES:
        now += clock.share(part)
        assert clock.left() >= RESERVE


def test_a_part_is_stopped_with_all_it_started(log: Path, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    write = f"pathlib.Path({str(alive)!r}).write_text(str(time.time()))"
    child = f"import time, pathlib\nwhile True:\n {write}\n time.sleep(.02)"
    before, polled = time.monotonic(), []
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    assert run(python(code), 1.5, log, lambda: polled.append(1)) == "stopped after 2 s"
    assert time.monotonic() - before < 10
    assert polled
    assert "begun" in log.read_text()
    time.sleep(0.2)
    last = alive.read_text()
    time.sleep(0.2)
    assert alive.read_text() == last


def test_how_a_part_ended_is_told(log: Path) -> None:
    assert run(python("print(1)"), 20, log, lambda: None) == "done"
    assert run(python("raise SystemExit(3)"), 20, log, lambda: None) == "exit status 3"
    assert log.read_text().count("\n$ ") == 2


def test_outcomes_of_an_unfinished_test_run_count() -> None:
    log = """
tests/ops/test_lrn.py::test_a[x y-1] PASSED                              [ 10%]
tests/ops/test_lrn.py::test_b FAILED                                     [ 20%]
tests/ops/test_lrn.py::test_c SKIPPED (needs an NVIDIA GPU)              [ 30%]
tests/ops/test_lrn.py::test_d ERROR                                      [ 40%]
tests/ops/test_lrn.py::test_e """
    assert outcomes(log) == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
        "error": 1,
        "failures": ["tests/ops/test_lrn.py::test_b", "tests/ops/test_lrn.py::test_d"],
    }


def test_rows_that_are_half_written_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    assert read_rows(file) == []
    gpu.measure_part("kernels", "cpu", 1, 0.0, file)
    assert read_rows(file) == []
    line = json.dumps(vars(Row("lrn", (1, 2, 3, 4), "fp32", "NCHW", "forward", "fresh", "fastcnn", median_ms=1.0)))
    file.write_text(f"{line}\n{line}\n{line[:40]}")
    rows = read_rows(file)
    assert len(rows) == 2
    assert rows[0].case == Case("lrn", (1, 2, 3, 4), "fp32", "NCHW", "forward")


def test_cases_are_bf16_first_and_hold_every_convolution_of_both_networks() -> None:
    cases = list(kernel_cases(256))
    assert len(set(cases)) == len(cases)
    assert [case.dtype for case in cases] == sorted(case.dtype for case in cases)
    layers = [case.layer for case in cases if case.dtype == "bf16" and case.layer]
    assert layers == [f"AlexNet conv{i}" for i in range(1, 6)] + [
        f"VGG-16 conv{i}" for i in ("1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "4_1", "4_2", "5")
    ]
    conv1 = next(case for case in cases if case.layer == "AlexNet conv1")
    assert conv1.output_shape == (256, 96, 55, 55)
    assert conv1.flop == 2 * 256 * 96 * 55 * 55 * 3 * 11 * 11
    conv4 = next(case for case in cases if case.layer == "AlexNet conv4")
    assert (conv4.weight_shape, conv4.output_shape) == ((384, 192, 3, 3), (256, 384, 13, 13))
    assert {case.format for case in network_cases(256)} == {ANY_FORMAT}


def test_without_a_gpu_it_says_what_can_be_done(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu --batch 1" in capsys.readouterr().err


@pytest.mark.slow
def test_rehearsal_writes_everything_though_parts_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On CPU, with a test run that fails, a sanitizer that finds errors, and time for a few rows only."""
    pytest.importorskip("matplotlib")
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text("#!/bin/sh\necho '========= ERROR SUMMARY: 2 errors'\nexit 1\n")
    sanitizer.chmod(0o755)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: str(sanitizer))
    monkeypatch.setattr(gpu, "SHARES", {"tests": 0.2, "sanitizer": 0.1, "kernels": 0.9, "networks": 0.0})
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_wrong(): assert 0\n@pytest.mark.gpu\ndef test_right(): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    out, started = tmp_path / "out", time.time()
    gpu.main(["--device", "cpu", "--batch", "1", "--budget", str(RESERVE + 25), "--out", str(out)])
    assert time.time() - started < RESERVE + 25
    document = json.loads((out / "results.json").read_text())
    assert document["parts"]["tests"]["passed"] == 1
    assert document["parts"]["tests"]["failures"] == ["tests/test_one.py::test_wrong"]
    assert document["parts"]["sanitizer"]["errors"] == 2
    assert document["parts"]["kernels"]["rows"] == len(document["rows"]) > 0
    assert document["parts"]["networks"]["end"].startswith("stopped")
    text = (out / "report.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "- failed: `tests/test_one.py::test_wrong`" in text
    assert "| relu_lrn_max_pool2d forward | 1x96x55x55 | bf16 | channels_last |" in text
    assert {path.name for path in out.iterdir()} == {"results.json", "report.md", "log.txt", "kernels_roofline.png"}
