"""``make gpu``: what only a GPU can tell, the most important first, within a budget of seconds.

The tests marked ``gpu``, compute-sanitizer on the smallest of them, the kernels, the networks: each part is a process
of its own, so that none can spoil the next, and is stopped when its share of the time is over. ``results.json`` and
``report.md`` are written anew while they run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from . import report
from .cases import ANY_FORMAT, CONVOLUTIONS, STAGES, Case
from .measure import Budget, measure
from .network_measure import measure_network
from .network_providers import network_providers
from .providers import Provider, all_providers
from .rows import Row

# Part -> which share of the time that is left it may take.
SHARES = {"tests": 0.45, "sanitizer": 0.15, "kernels": 0.65, "networks": 1.0}
RESERVE = 10.0  # seconds, for the report
_POLL = 2.0
_OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.MULTILINE)
_SANITIZED = re.compile(r"ERROR SUMMARY: (\d+) error")


class Clock:
    """Counts down from ``budget`` seconds."""

    def __init__(self, budget: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + budget

    def left(self) -> float:
        return max(0.0, self._end - self._now())

    def share(self, part: str) -> float:
        """How many seconds a part may take, if it starts now."""
        return max(0.0, self.left() - RESERVE) * SHARES[part]


def kernel_cases(batch: int) -> Iterator[Case]:
    """The operators at AlexNet's shapes, bf16 before fp32; then the convolutions of AlexNet and VGG-16.

    VGG-16 has a quarter of the batch, or it would need all of the memory for its check.
    """
    for dtype in ("bf16", "fp32"):
        for format, op, stage, mode in product(
            ("channels_last", "NCHW"), ("relu_lrn_max_pool2d", "lrn", "max_pool2d"), STAGES, ("forward", "backward")
        ):
            yield Case(op, (batch, *STAGES[stage][1:]), dtype, format, mode)
        for layer, conv in CONVOLUTIONS.items():
            images = batch if layer.startswith("AlexNet") else max(1, batch // 4)
            shape = images, conv.channels, conv.size, conv.size
            yield Case("conv2d_relu", shape, dtype, "channels_last", "forward", layer=layer)


def network_cases(batch: int) -> Iterator[Case]:
    for mode in ("inference", "training step"):
        yield Case("alexnet", (batch, 3, 227, 227), "bf16", ANY_FORMAT, mode)


def _providers(case: Case, device: str) -> list[Provider]:
    """torch.compile only where its compilation is worth the time: the tail and the convolutions."""
    alone = case.op in ("lrn", "max_pool2d")
    everyone = all_providers(device).values()
    return [p for p in everyone if p.name != "fastcnn.reference" and not (alone and p.name == "torch.compile")]


def measure_part(part: str, device: str, batch: int, seconds: float, file: Path) -> None:
    """Measure until the time is over; a line of JSON for each row."""
    torch.backends.cudnn.benchmark = True
    clock = Clock(seconds)
    budget = Budget(seconds=0.3, at_least=11)
    for case in (kernel_cases if part == "kernels" else network_cases)(batch):
        if not clock.left():
            break
        print(case, flush=True)
        if part == "kernels":
            rows = measure(case, _providers(case, device), "random", budget, device)
        else:
            rows = measure_network(case, network_providers(device).values(), budget, device)
        with file.open("a") as lines:
            lines.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def read_rows(file: Path) -> list[Row]:
    """Those that are complete."""
    rows = []
    for line in file.read_text().splitlines(keepends=True) if file.exists() else ():
        if line.endswith("\n"):
            fields = json.loads(line)
            rows.append(Row(**{**fields, "shape": tuple(fields["shape"])}))
    return rows


def outcomes(log: str) -> dict[str, Any]:
    """Of a verbose pytest, finished or not: how many tests had which outcome, and those that failed."""
    found = _OUTCOME.findall(log)
    counts = Counter(outcome.lower() for _, outcome in found)
    return {**counts, "failures": [name for name, outcome in found if outcome in ("FAILED", "ERROR")]}


def run(command: Sequence[str], seconds: float, log: Path, progress: Callable[[], None]) -> str:
    """Run a command with its output in the log, stopped after so many seconds; how it ended."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    end = time.monotonic() + seconds
    with log.open("ab") as output:
        output.write(f"\n$ {' '.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=max(0.0, min(_POLL, end - time.monotonic())))
                    return "done" if code == 0 else f"exit status {code}"
                except subprocess.TimeoutExpired:
                    progress()
                    if time.monotonic() >= end:
                        return f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Report:
    """What is known so far, and the files that tell it."""

    def __init__(self, out: Path, device: str) -> None:
        self.out, self.device = out, device
        self.parts: dict[str, Any] = {}
        self.rows: dict[str, list[Row]] = {"kernels": [], "networks": []}
        out.mkdir(parents=True, exist_ok=True)

    def document(self) -> dict[str, Any]:
        rows = [row for part in self.rows.values() for row in part]
        document = report.report(rows, command="make gpu", source="random", device=self.device)
        return {"header": document["header"], "parts": self.parts, "rows": document["rows"]}

    def write(self) -> None:
        document = self.document()
        for name, text in (("results.json", json.dumps(document, indent=1) + "\n"), ("report.md", markdown(document))):
            unfinished = self.out / f".{name}"
            unfinished.write_text(text)
            unfinished.replace(self.out / name)

    def plot(self) -> None:
        """Of the kernels how close they are to a copy, of the networks how much faster than eager they are."""
        try:
            from .plots import write_plots
        except ImportError as error:
            print(f"no plots: {error}", file=sys.stderr)
            return
        with tempfile.TemporaryDirectory() as folder:
            for part, kept in (("kernels", "kernels_roofline.png"), ("networks", "networks_speedup.png")):
                document = report.report(self.rows[part], command="make gpu", source="random", device=self.device)
                for path in write_plots(Path(folder), document, self.rows[part], part):
                    if path.name == kept:
                        shutil.copy(path, self.out / kept)


def markdown(document: dict[str, Any]) -> str:
    """The results for reading."""
    lines = ["# On a GPU", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in document["header"].items() if value is not None]
    for part, result in document["parts"].items():
        counts = ", ".join(f"{value} {key}" for key, value in result.items() if isinstance(value, int))
        lines += ["", f"## {part}: {result['end']}{', ' if counts else ''}{counts}", ""]
        lines += [f"- failed: `{name}`" for name in result.get("failures", ())]
        rows = [row for row in document["rows"] if (row["format"] == ANY_FORMAT) == (part == "networks")]
        if part in ("kernels", "networks") and rows:
            lines += _markdown_table(rows)
    return "\n".join(lines) + "\n"


def _markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Bandwidth relative to a copy, operations relative to a matrix product, both measured in the same rounds."""
    head = ("what", "shape", "dtype", "format", "provider", "ms", "of copy", "of mm", "vs eager", "vs compile", "")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        rates = [(row["gb_per_s"], row["copy_gb_per_s"]), (row["gflop_per_s"], row["matmul_gflop_per_s"])]
        of = [f"{rate / most:.0%}" if rate and most else "" for rate, most in rates]
        faster = [f"{row[key]:.2f}x" if row[key] else "" for key in ("vs_eager", "vs_compile")]
        ms = f"{row['median_ms']:.3f}" if row["median_ms"] else "failed"
        what = f"{row['layer'] or row['op']} {row['mode']}"
        cells = [what, "x".join(map(str, row["shape"])), row["dtype"], row["format"], row["provider"], ms, *of, *faster]
        lines.append("| " + " | ".join([*cells, (row["failure"] or "").replace("|", "/")]) + " |")
    return lines


def run_all(out: Path, device: str, batch: int, clock: Clock) -> None:
    """All parts, one after the other."""
    results = Report(out, device)
    log = out / "log.txt"
    log.write_text("")
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", "tests"]
    sanitizer = shutil.which("compute-sanitizer")

    def text_since(start: int) -> str:
        return log.read_bytes()[start:].decode(errors="replace")

    def finish(part: str, **result: Any) -> None:
        results.parts[part] = result
        results.write()

    start = 0
    finish("tests", end="running")
    end = run(tests, clock.share("tests"), log, lambda: finish("tests", end="running", **outcomes(text_since(start))))
    finish("tests", end=end, **outcomes(text_since(start)))

    start = log.stat().st_size
    if sanitizer is None:
        finish("sanitizer", end="compute-sanitizer is not there")
    else:
        checked = [sanitizer, "--error-exitcode=1", "--target-processes=all", *tests, "-k", "smallest"]
        end = run(checked, clock.share("sanitizer"), log, lambda: None)
        errors = sum(map(int, _SANITIZED.findall(text_since(start))))
        finish("sanitizer", end=end, errors=errors, **outcomes(text_since(start)))

    with tempfile.TemporaryDirectory() as folder:
        for part in ("kernels", "networks"):
            file, seconds = Path(folder) / part, clock.share(part)
            arguments = ["--part", part, "--device", device, "--batch", str(batch), "--rows", str(file)]
            command = [sys.executable, "-m", "fastcnn.bench.gpu", *arguments, "--budget", str(seconds)]

            def progress(part: str = part, file: Path = file) -> None:
                results.rows[part] = read_rows(file)
                results.write()

            finish(part, end="running")
            end = run(command, seconds, log, progress)
            progress()
            failed = sum(row.failure is not None for row in results.rows[part])
            finish(part, end=end, rows=len(results.rows[part]), failed=failed)
    results.plot()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastcnn.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results/<device>")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds")
    parser.add_argument("--started", type=float, help="when the budget began to count, in seconds since 1970")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--part", choices=("kernels", "networks"), help="only measure this, into --rows")
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no GPU here that torch can use; --device cpu --batch 1 is a rehearsal without one")
    if options.part:
        measure_part(options.part, options.device, options.batch, options.budget, options.rows)
        return
    clock = Clock(options.budget - (time.time() - options.started if options.started else 0.0))
    device = "cpu" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
    out = options.out or Path("benchmarks/results") / re.sub(r"\W+", "-", device.lower())
    run_all(out, options.device, options.batch, clock)
    print((out / "report.md").read_text())


if __name__ == "__main__":
    main()
