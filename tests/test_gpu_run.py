"""``make gpu``: the budget holds, what is found is written as it is found, and nothing that fails stops the rest."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from fastcnn import backends
from fastcnn.bench.cases import ANY_FORMAT, Case
from fastcnn.bench.operators import OPERATORS
from fastcnn.bench.rows import Row
from tools.gpu import __main__ as gpu
from tools.gpu import cache, calibration, carry, measure, results_plugin
from tools.gpu.process import Clock, Process
from tools.gpu.report import Report, read_rows

needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="there is no nvcc")
compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or backends.INTERPRETING, reason="Triton compiles nothing here"
)


# -- processes --------------------------------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_process_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    alive, log = tmp_path / "alive", tmp_path / "log"
    write = f"pathlib.Path({str(alive)!r}).write_text(str(time.time()))"
    child = f"import time, pathlib\nwhile True:\n {write}\n time.sleep(.02)"
    before, polled = time.monotonic(), []
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    assert Process(python(code), log, {}).wait(1.5, lambda: polled.append(1)) == "stopped after 2 s"
    assert time.monotonic() - before < 10
    assert polled
    assert "begun" in log.read_text()
    time.sleep(0.2)
    last = alive.read_text()
    time.sleep(0.2)
    assert alive.read_text() == last


def test_how_a_process_ended_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert Process(python("import os; print(os.environ['A'])"), log, {"A": "42"}).wait(20) == "done"
    assert Process(python("raise SystemExit(3)"), log, {}).wait(20) == "exit status 3"
    assert "\n42\n" in log.read_text()
    assert log.read_text().count("\n$ ") == 2


def test_all_parts_together_end_within_the_budget() -> None:
    now = 0.0
    clock = Clock(360, lambda: now)
    for part in gpu.PARTS.values():
        now += part.seconds(clock.left() - gpu.RESERVE)
        assert clock.left() >= gpu.RESERVE - 1e-9
    assert clock.left() < 2 * gpu.RESERVE


# -- tests and their results ------------------------------------------------------------------------------------------

TESTS = """
import os, pytest, torch

def test_right(): pass

@pytest.mark.parametrize("i", range(3))
def test_wrong(i):
    assert i == 7, "as it should not be"

@pytest.mark.skip(reason="not today")
def test_skipped(): pass
"""


def pytest_run(folder: Path, code: str, *options: str) -> Path:
    """The results of tests in a process of their own."""
    (folder / "test_some.py").write_text(textwrap.dedent(code))
    file = folder / "results.jsonl"
    command = [sys.executable, "-m", *gpu.PYTEST, "--rootdir", str(folder), "--noconftest", *options, str(folder)]
    subprocess.run(command, env={**os.environ, "FASTCNN_RESULTS": str(file)}, capture_output=True, check=False)
    return file


def test_results_tell_counts_failures_and_reasons(tmp_path: Path) -> None:
    results = results_plugin.read(pytest_run(tmp_path, TESTS))
    assert (results["passed"], results["failed"], results["skipped"]) == (1, 3, 1)
    assert results["reasons_to_skip"] == ["Skipped: not today"]
    first = results["failures"][0]
    assert first["test"].endswith("test_wrong[0]")
    assert "as it should not be" in first["message"]
    assert results["under_way"] == []


def test_results_tell_of_a_file_that_cannot_be_imported(tmp_path: Path) -> None:
    (failure,) = results_plugin.read(pytest_run(tmp_path, "import no_such_package"))["failures"]
    assert (failure["test"], failure["when"]) == ("test_some.py", "collect")
    assert "No module named 'no_such_package'" in failure["message"]


def test_a_part_that_ends_by_itself_is_told_with_its_last_words(tmp_path: Path, monkeypatch) -> None:
    def crash(run: gpu.Run, seconds: float, progress: gpu.Progress) -> dict[str, str]:
        command = python("raise SystemExit('no kernel image is available')")
        return {"end": Process(command, run.log, {}).wait(seconds)}

    monkeypatch.setitem(gpu.PARTS, "calibration", gpu.Part(crash, 0.5))
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--budget", "60", "--only", "calibration", "--out", str(tmp_path)])
    assert ended.value.code == 1
    told = (tmp_path / "report.md").read_text()
    assert "| calibration | exit status 1 |" in told
    assert "\nno kernel image is available\n" in told.partition("## The first error of calibration")[2]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ({"end": "done", "passed": 3}, False),
        ({"end": "compute-sanitizer is not there"}, False),
        ({"end": "stopped after 9 s", "passed": 3, "failed": 0}, False),
        ({"end": "stopped after 9 s", "passed": 3, "failed": 1}, True),
        ({"end": "memcheck: exit status 1. racecheck: done. ", "errors": 0}, True),
        ({"end": "done", "wrong": 1}, True),
    ],
)
def test_when_a_run_has_failed(tmp_path: Path, part: dict[str, object], expected: bool) -> None:
    report = Report(tmp_path, "cpu", "test", {})
    report.parts["part"] = part
    assert gpu.failed(report) == expected


def test_results_of_a_run_that_was_stopped(tmp_path: Path) -> None:
    file = tmp_path / "results"
    assert results_plugin.read(file)["failures"] == []
    lines = [
        {"test": "a", "outcome": "started"},
        {"test": "a", "outcome": "passed"},
        {"test": "b", "outcome": "started"},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"test": "c", "outc')
    results = results_plugin.read(file)
    assert results["passed"] == 1
    assert results["under_way"] == ["b"]


LOST = """
import pytest, torch
lost = []

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize

def test_before(): pass

def test_that_loses_the_context():
    lost.append(1)
    assert 0

@pytest.mark.parametrize("i", range(3))
def test_after(i):
    assert not lost
"""


def test_a_run_ends_where_the_cuda_context_is_lost(tmp_path: Path) -> None:
    results = results_plugin.read(pytest_run(tmp_path, LOST))
    assert (results["passed"], results["failed"]) == (1, 1)
    assert results["failures"][0]["test"].endswith("test_that_loses_the_context")


@pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed")
def test_workers_go_on_where_the_cuda_context_is_lost(tmp_path: Path) -> None:
    results = results_plugin.read(pytest_run(tmp_path, LOST, "-n", "1"))
    assert (results["passed"], results["failed"]) == (4, 1)


def test_a_failure_tells_the_worst_element_and_what_was_drawn(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    shutil.copy(tests / "conftest.py", tmp_path)
    code = f"""
    import sys
    sys.path.insert(0, {str(tests)!r})
    import torch
    from promises import assert_same_answer, randn
    def test_wrong():
        x = randn(2, 3, 4, 5, dtype=torch.float32, format=torch.channels_last, seed=7)
        y = x.clone()
        y[1, 2, 0, 3] = 100.0
        y[0, 0, 0, 0] = float("nan")
        assert_same_answer(y, x.double())
    """
    (tmp_path / "test_some.py").write_text(textwrap.dedent(code))
    file = tmp_path / "results.jsonl"
    environment = {**os.environ, "FASTCNN_RESULTS": str(file), "PYTHONPATH": str(tests)}
    command = [sys.executable, "-m", *gpu.PYTEST, "--rootdir", str(tmp_path), str(tmp_path)]
    subprocess.run(command, env=environment, capture_output=True, check=False)
    (failure,) = results_plugin.read(file)["failures"]
    assert "worst at [0, 0, 0, 0]: nan, " in failure["message"]
    assert "1 and 0 of 120 are NaN" in failure["message"]
    assert "float32 2x3x4x5, strides (60, 1, 15, 3)" in failure["message"]
    assert failure["sections"]["Drawn"] == "randn(2, 3, 4, 5), float32, channels_last, seed 7"


STOOD_IN = """
import pytest, torch
import fastcnn.functional as FF
from fastcnn import backends

def test_right():
    x = torch.randn(2, 8, 9, 9)
    with backends.use("cuda"):
        y = FF.max_pool2d(x.cuda(), 3, 2)
    torch.testing.assert_close(y.cpu(), torch.nn.functional.max_pool2d(x, 3, 2))

def test_two_devices():
    x = torch.randn(2, 8, 9, 9)
    with pytest.raises(RuntimeError, match="on the same device"):
        x.cuda() + x
    with pytest.raises(RuntimeError, match="on the same device"):
        x.double().cuda().to(torch.float32) * torch.ones(9)
    x.cuda() + x.to("cuda") + torch.ones(9, device="cuda") + x.to(x.cuda()) + 1
"""


@compiles
def test_tests_for_a_gpu_are_tried_without_one(tmp_path: Path) -> None:
    """The CPU answers, and tensors that would be on two devices are noticed."""
    (tmp_path / "tests").mkdir()
    results = results_plugin.read(pytest_run(tmp_path / "tests", STOOD_IN, "-p", "tools.gpu.stand_in"))
    assert results["failures"] == []
    assert results["passed"] == 2


# -- what is measured -------------------------------------------------------------------------------------------------


def test_cases_are_bf16_first_and_hold_every_convolution_of_both_networks() -> None:
    cases = list(measure.kernel_cases(256))
    assert len(set(cases)) == len(cases)
    operators = [case for case in cases if not case.layer]
    assert [case.dtype for case in operators] == sorted(case.dtype for case in operators)
    layers = [case.layer for case in cases if case.dtype == "bf16" and case.layer]
    assert layers == [f"AlexNet conv{i}" for i in range(1, 6)] + [
        f"VGG-16 conv{i}" for i in ("1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "4_1", "4_2", "5")
    ]
    conv1 = next(case for case in cases if case.layer == "AlexNet conv1")
    operator = OPERATORS["conv2d_relu"]
    assert operator.output_shape(conv1) == (256, 96, 55, 55)
    assert operator.flop(conv1) == 2 * 256 * 96 * 55 * 55 * 3 * 11 * 11
    assert {case.format for case in measure.network_cases(256)} == {ANY_FORMAT}
    assert set(measure.cases_to_compile(256)) <= {*cases, *measure.network_cases(256)}


@pytest.mark.parametrize("op", ["lrn", "max_pool2d", "relu_lrn_max_pool2d", "conv2d_relu"])
def test_tuning_checks_and_times_every_candidate(op: str) -> None:
    for mode in ("forward", "backward") if op != "conv2d_relu" else ("forward",):
        rows = measure.tune(Case(op, (2, 96, 27, 27), "fp32", "channels_last", mode), "cpu")
        assert rows
        assert all(row.failure is None and row.median_ms and row.error <= row.tolerance for row in rows)


def test_who_loses_the_context_is_left_out_of_the_case_which_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, file = Case("lrn", (2, 96, 27, 27), "bf16"), tmp_path / "rows"

    def run(case: Case, device: str, without: list[str]) -> list[Row]:
        failures = {"fastcnn": None, "torch.eager": "no such kernel", "torch.compile": "AcceleratorError: CUDA error"}
        of = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "format": case.format, "mode": case.mode}
        return [Row(**of, memory="fresh", provider=p, failure=f) for p, f in failures.items() if p not in without]

    starts: list[list[str]] = []

    class Started(Exception):
        pass

    def execv(program: str, command: list[str]) -> None:
        starts.append(command[3:])
        raise Started

    monkeypatch.setitem(measure.PARTS, "kernels", (lambda batch: iter([case, case]), run))
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(measure, "_context_is_lost", lambda: True)
    with pytest.raises(Started):
        measure.main("kernels", "cuda", 2, 60.0, file)
    assert starts[0][0:3] == ["kernels", "cuda", "2"]
    assert starts[0][-2:] == ["0", "torch.compile"]
    assert [row.provider for row in read_rows(file)] == ["torch.compile"]
    monkeypatch.setattr(measure, "_context_is_lost", lambda: False)
    measure.main("kernels", "cuda", 2, 60.0, file, 0, ["torch.compile"])
    rest = ["fastcnn", "torch.eager", "fastcnn", "torch.eager", "torch.compile"]
    assert [row.provider for row in read_rows(file)][1:] == rest


def test_rows_that_are_half_written_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    assert read_rows(file) == []
    line = json.dumps(vars(Row("lrn", (1, 2, 3, 4), "fp32", "NCHW", "forward", "fresh", "fastcnn", median_ms=1.0)))
    file.write_text(f"{line}\n{line}\n{line[:40]}")
    rows = read_rows(file)
    assert len(rows) == 2
    assert rows[0].case == Case("lrn", (1, 2, 3, 4), "fp32", "NCHW", "forward")


def test_the_report_compares_with_torch_in_its_better_format(tmp_path: Path) -> None:
    report = Report(tmp_path, "cpu", "test", {})
    of = {"op": "lrn", "shape": (2, 96, 27, 27), "dtype": "bf16", "mode": "forward", "memory": "fresh"}
    for provider, format, ms in (
        ("fastcnn.cuda", "NCHW", 2.0),
        ("fastcnn.triton", "channels_last", 1.0),
        ("torch.eager", "NCHW", 9.0),
        ("torch.eager", "channels_last", 3.0),
        ("torch.compile", "NCHW", 1.5),
    ):
        report.rows["kernels"].append(Row(**of, provider=provider, format=format, median_ms=ms))
    line = next(line for line in report.markdown({}).splitlines() if line.startswith("| lrn forward"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3:5] == ["fastcnn.triton channels_last", "1.000"]
    assert cells[-3:] == ["3.000 channels_last", "3.00x", "1.50x"]


def test_the_report_has_what_was_predicted_beside_what_was_measured(tmp_path: Path) -> None:
    report = Report(tmp_path, "cpu", "test", {})
    of = {"op": "lrn", "shape": (256, 96, 55, 55), "dtype": "bf16", "mode": "forward", "memory": "fresh"}
    report.rows["kernels"].append(Row(**of, provider="fastcnn.triton", format="NCHW", median_ms=2.0))
    lines = report.markdown({"gpu": "NVIDIA H200"}).splitlines()
    line = next(line for line in lines if "fastcnn.triton | 2.000" in line)
    document = json.loads((carry.ROOT / "docs" / "roofline.json").read_text())
    wanted = {"op": "lrn", "layer": "AlexNet conv1", "dtype": "bf16", "format": "NCHW", "language": "triton"}
    row = next(r for r in document["rows"] if {**r, **wanted, "mode": "forward"} == r)
    assert f"| {row['predictions']['H200']['ms']:.3f} |" in line


# -- what is taken along ----------------------------------------------------------------------------------------------


@compiles
def test_kernels_compiled_here_are_found_by_triton_elsewhere(tmp_path: Path) -> None:
    """Compiled in one folder, packed, unpacked into another: nothing is compiled there."""
    code = """
    import torch
    from fastcnn import PoolParams
    from fastcnn.ops.triton import max_pool2d
    from tools.gpu.compilation import compiling_into_cache
    with compiling_into_cache(90):
        max_pool2d.forward(torch.empty(2, 8, 9, 9, device="meta"), PoolParams(2), True)
    """

    def run(folder: Path) -> None:
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
        subprocess.run(python(textwrap.dedent(code)), env=environment, check=True, cwd=carry.ROOT)

    run(tmp_path / "here")
    kernels = cache.kernels(tmp_path / "here")
    assert list(kernels.values()) == ["max_pool2d_forward_kernel"]
    cache.pack(tmp_path / "here", tmp_path / "archive")
    shutil.rmtree(tmp_path / "here")
    cache.unpack(tmp_path / "archive", tmp_path / "there")
    before = {file: file.stat().st_mtime_ns for file in cache.kernels(tmp_path / "there")}
    assert len(before) == 1
    run(tmp_path / "there")
    assert {file: file.stat().st_mtime_ns for file in cache.kernels(tmp_path / "there")} == before


def test_kernels_of_torch_compile_are_counted_together() -> None:
    assert cache.counted(["forward", "triton_poi_fused_0", "forward", "triton_red_1"]) == {
        "forward": 2,
        "torch.compile's": 2,
    }


def test_libraries_taken_along_fit_only_the_same_sources_and_python(tmp_path: Path, monkeypatch) -> None:
    installs: list[dict[str, str]] = []
    monkeypatch.setattr(carry, "_pip_install", lambda **environment: installs.append(environment))
    monkeypatch.setattr(carry, "_LIBRARIES", tmp_path / "libraries")
    monkeypatch.setattr(carry, "_MANIFEST", tmp_path / "libraries.json")
    monkeypatch.setattr(carry, "_loads", lambda: True)
    (tmp_path / "libraries").mkdir()
    for manifest, environment in (
        (None, {"FASTCNN_BUILD_CPP": "1"}),
        ({**carry._fingerprint(), "platform": "another"}, {"FASTCNN_BUILD_CPP": "1"}),
        (carry._fingerprint(), {"FASTCNN_BUILD_CPP": "0", "FASTCNN_BUILD_CUDA": "0"}),
    ):
        if manifest is not None:
            (tmp_path / "libraries.json").write_text(json.dumps(manifest))
        carry.install()
        assert installs.pop() == environment
    monkeypatch.setattr(carry, "_loads", lambda: False)
    carry.install()
    assert installs[-1] == {"FASTCNN_BUILD_CPP": "1"}


def test_without_an_installer_the_checkout_is_used_as_it_is(tmp_path: Path, monkeypatch) -> None:
    def fail(**environment: str) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries.json").write_text(json.dumps(carry._fingerprint()))
    monkeypatch.setattr(carry, "_pip_install", fail)
    monkeypatch.setattr(carry, "_LIBRARIES", tmp_path / "libraries")
    monkeypatch.setattr(carry, "_MANIFEST", tmp_path / "libraries.json")
    monkeypatch.setattr(carry, "_KERNELS", tmp_path / "kernels")
    monkeypatch.setattr(carry, "_loads", lambda: True)
    carry.install()
    assert (tmp_path / "kernels").readlink() == Path("../kernels")


# -- calibration ------------------------------------------------------------------------------------------------------


@needs_nvcc
@pytest.mark.slow
def test_calibration_times_the_instructions_it_names(tmp_path: Path) -> None:
    """In machine code: so many of them as it counts, and next to nothing else in the loop."""
    pytest.importorskip("triton")
    from tools.machine_code.compiled_cuda import kernels

    calibration.build("90", tmp_path / "calibration.so")
    found = {}
    for kernel in kernels(tmp_path / "calibration.so", 90):
        for kind, instructions in calibration.INSTRUCTIONS.items():
            counts = [sum(n for op, n in kernel.opcodes.items() if op.startswith(part)) for part in kind.split("+")]
            expected = calibration.STEPS * instructions / len(counts)
            if all(expected <= count < 1.02 * expected for count in counts):
                rest = sum(kernel.opcodes.values()) - sum(counts)
                found[kind] = rest, kernel.spills
    assert set(found) == set(calibration.INSTRUCTIONS)
    assert all(rest < 80 and spills == 0 for rest, spills in found.values())


def test_rates_of_a_cpu() -> None:
    rates = calibration.rates("cpu")
    assert set(rates) == {"copy_gb_per_s", "matmul_bfloat16_tflop_per_s", "matmul_float32_tflop_per_s"}
    assert all(rate > 0 for rate in rates.values())


# -- all of it --------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_what_can_be_done(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu is a rehearsal" in capsys.readouterr().err


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--only", "smoke, lunch"])
    assert "'lunch' is none of calibration, smoke, sanitizer" in capsys.readouterr().err


@pytest.mark.slow
def test_rehearsal_writes_everything_though_parts_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On CPU, with smoke tests that fail and a sanitizer that finds errors."""
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(
        "#!/bin/sh\necho '========= Invalid __global__ read of size 4 bytes'\n"
        "case $1 in *memcheck) echo '========= ERROR SUMMARY: 2 errors';;\n"
        "*) echo '========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)';; esac\nexit 1\n"
    )
    sanitizer.chmod(0o755)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: str(sanitizer))
    monkeypatch.setattr(carry, "TRITON", tmp_path / "nothing")
    monkeypatch.setattr(gpu, "workers", lambda count: [])
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "test_smoke.py").write_text("def test_wrong(): assert 0\ndef test_right(): pass\n")
    monkeypatch.setenv("PYTHONPATH", str(carry.ROOT))
    monkeypatch.chdir(tmp_path)
    out, only = tmp_path / "out", "calibration,smoke,sanitizer"
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--budget", "300", "--only", only, "--out", str(out)])
    assert ended.value.code == 1
    document = json.loads((out / "results.json").read_text())
    parts = document["parts"]
    assert list(parts) == only.split(",")
    assert parts["calibration"]["figures"][0]["copy_gb_per_s"] > 0
    assert (parts["smoke"]["passed"], parts["smoke"]["failed"]) == (1, 1)
    assert parts["sanitizer"]["errors"] == 2 + 3
    assert parts["sanitizer"]["first_error"].startswith("========= Invalid __global__ read")
    assert document["header"]["budget"] == 300
    text = (out / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "## The first failure of smoke\n\n`tests/gpu/test_smoke.py::test_wrong`" in text
    assert "## The first error of sanitizer\n\n```\n========= Invalid" in text
    assert {path.name for path in out.iterdir()} == {"results.json", "report.md", "log.txt"}


@pytest.mark.slow
def test_kernels_are_measured_until_the_time_is_over(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "rows"
    measure.main("kernels", "cpu", 1, 0.5, file)
    report = Report(tmp_path, "cpu", "test", {})
    report.rows["kernels"] = rows = read_rows(file)
    first = next(measure.kernel_cases(1))
    assert rows
    assert {row.case for row in rows if row.case == first} == {first}
    assert len({row.case for row in rows}) < len(list(measure.kernel_cases(1)))
    report.write()
    report.plot()
    assert f"| {first.op} forward | 1x96x55x55 | bf16 | channels_last |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "kernels_roofline.png").exists()
