"""``make gpu``: what only a GPU can tell, the most important first, within a budget of seconds.

Each part is a process of its own, so that none can spoil the next, and is stopped when its share of the time is over.
``results.json`` and ``report.md`` are written anew while they run. ``--device cpu`` is a rehearsal without a GPU: the
same parts, with what can run on a CPU in them.
"""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import cache, carry, results_plugin
from .process import Clock, Process
from .report import MEASURED, Report, read_lines, read_rows

RESERVE = 8.0  # seconds, for the report
SHORTEST = 3.0  # seconds in which no part gets anywhere
WORKERS = 8
PYTEST = ("pytest", "-q", "--tb=short", "-p", "tools.gpu.results_plugin", "-p", "no:cacheprovider")
_SANITIZED = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Run:
    """What the parts share.

    Args:
        device: "cuda" or "cpu".
        batch: of AlexNet.
        report: what is known.
        folder: for what the parts write for us, Triton's cache in it.
    """

    device: str
    batch: int
    report: Report
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def triton_cache(self) -> Path:
        return self.folder / "triton"

    @property
    def log(self) -> Path:
        return self.report.out / "log.txt"

    def start(self, module: Sequence[str], under: Sequence[str] = (), **environment: str) -> Process:
        """A Python module with its arguments, ``under`` the control of a tool."""
        command = [*under, sys.executable, "-m", *module]
        return Process(command, self.log, {**self.environment, **environment})

    def tests(
        self, name: str, seconds: float, progress: Progress, arguments: Sequence[str], **options: Any
    ) -> dict[str, Any]:
        """What becomes of the tests that pytest is given so; ``options`` as for :meth:`start`."""
        file = self.folder / f"{name}.jsonl"
        process = self.start([*PYTEST, *arguments], FASTCNN_RESULTS=str(file), **options)
        end = process.wait(seconds, lambda: progress(results_plugin.read(file)))
        return {"end": end, **results_plugin.read(file)}


def workers(count: int) -> list[str]:
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(count, os.cpu_count() or 1)), "--dist", "loadfile", "--max-worker-restart", "1000"]


# -- the parts --------------------------------------------------------------------------------------------------------


def calibration(run: Run, seconds: float, progress: Progress) -> dict[str, Any]:
    file = run.folder / "calibration.jsonl"
    process = run.start(["tools.gpu.calibration", run.device, str(carry.CALIBRATION), str(file)])
    end = process.wait(seconds, lambda: progress({"figures": read_lines(file)}))
    return {"end": end, "figures": read_lines(file)}


def smoke(run: Run, seconds: float, progress: Progress) -> dict[str, Any]:
    """A launch that fails is an error of that launch."""
    arguments = ["tests/gpu/test_smoke.py", *workers(4)]
    if "-n" in arguments:  # one file would go to one worker
        arguments[arguments.index("loadfile")] = "load"
    return run.tests("smoke", seconds, progress, arguments, CUDA_LAUNCH_BLOCKING="1")


def sanitizer(run: Run, seconds: float, progress: Progress) -> dict[str, Any]:
    """memcheck, then racecheck, on the smallest of the smoke set in bf16 and fp32: one process."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"end": "compute-sanitizer is not there"}
    clock = Clock(seconds)
    result: dict[str, Any] = {"end": "", "passed": 0, "errors": 0, "failures": []}
    smallest = ["tests/gpu/test_smoke.py", "-k", "smallest and (bfloat16 or float32)"]
    # Errors that API calls return are handled, or reported, by those who called.
    for check, options, share in (("memcheck", ["--report-api-errors=no"], 0.6), ("racecheck", [], 1.0)):
        start = run.log.stat().st_size if run.log.exists() else 0
        under = [tool, f"--tool={check}", "--error-exitcode=1", *options]
        tests = run.tests(check, share * clock.left(), lambda _: None, smallest, under=under)
        told = run.log.read_bytes()[start:].decode(errors="replace")
        result["end"] += f"{check}: {tests['end']}. "
        result["passed"] += tests.get("passed", 0)
        result["failures"] += tests["failures"]
        result["errors"] += sum(map(int, _SANITIZED.findall(told)))
        result.setdefault("first_error", _first_error(told)) if _first_error(told) else None
        progress(result)
    return result


def _first_error(log: str) -> str:
    """The first of the sanitizer's reports."""
    lines = [line for line in log.splitlines() if line.startswith("=========")]
    first = next((i for i, line in enumerate(lines) if re.search(r"Invalid|Error:|hazard at|Race", line)), None)
    return "" if first is None else "\n".join(lines[first : first + 30])


def _measured(part: str) -> Callable[[Run, float, Progress], dict[str, Any]]:
    def measure(run: Run, seconds: float, progress: Progress) -> dict[str, Any]:
        file = run.folder / f"{part}.jsonl"
        # It starts no case when its time is over, and has a moment to end the last.
        process = run.start(["tools.gpu.measure", part, run.device, str(run.batch), str(0.9 * seconds), str(file)])

        def read() -> dict[str, Any]:
            rows = run.report.rows[part] = read_rows(file)
            wrong = [row for row in rows if row.failure and not row.provider.startswith("torch")]
            if part == "tuning":  # a configuration may need more than the device has
                wrong = [row for row in wrong if (row.failure or "").startswith(("error", "shape"))]
            return {"rows": len(rows), "wrong": len(wrong)}

        end = process.wait(seconds, lambda: progress(read()))
        return {"end": end, **read()}

    return measure


def tests(run: Run, seconds: float, progress: Progress) -> dict[str, Any]:
    """All that are marked gpu but those that need its memory alone; without one, those in Triton's interpreter."""
    if run.device == "cpu":
        arguments = ["tests/interpreter", *workers(WORKERS)]
        return run.tests("tests", seconds, progress, arguments, TRITON_INTERPRET="1")
    arguments = ["-m", "gpu and not slow", "tests/gpu", *workers(WORKERS)]
    return run.tests("tests", seconds, progress, arguments, PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True")


def large(run: Run, seconds: float, progress: Progress) -> dict[str, Any]:
    return run.tests("large", seconds, progress, ["-m", "gpu and slow", "tests/gpu"])


@dataclass(frozen=True)
class Part:
    """``share`` of the time that is left is what it may take, but no more than ``most`` seconds."""

    run: Callable[[Run, float, Progress], dict[str, Any]]
    share: float
    most: float = 600.0

    def seconds(self, left: float) -> float:
        return min(self.most, self.share * left)


PARTS = {
    "calibration": Part(calibration, 0.1, 20),
    "smoke": Part(smoke, 0.25, 60),
    "sanitizer": Part(sanitizer, 0.25, 60),
    "kernels": Part(_measured("kernels"), 0.4, 90),
    "networks": Part(_measured("networks"), 0.5, 90),
    "tests": Part(tests, 0.65),
    "large": Part(large, 0.6, 60),
    "tuning": Part(_measured("tuning"), 1.0),
}


def run_parts(run: Run, wanted: Sequence[str], clock: Clock) -> None:
    report, background = run.report, None
    measured = [part for part in wanted if part in MEASURED[:2]]
    for name in wanted:
        if name != "calibration" and measured and background is None and run.device != "cpu":
            # What torch.compile compiles for the rivals takes minutes of CPU time, which nothing else here needs.
            command = ["tools.gpu.measure", "compilations", run.device, str(run.batch), "0", "-"]
            background = run.start(command)
        if background is not None and name in measured:
            report.parts.setdefault("compilations", {"end": background.wait(0)})
        left = clock.left() - RESERVE
        seconds = left if name == wanted[-1] else PARTS[name].seconds(left)
        if seconds < SHORTEST:
            report.parts[name] = {"end": "no time was left"}
            continue
        before, started = cache.kernels(run.triton_cache), time.monotonic()

        def state(result: dict[str, Any], name: str = name, before: Any = before, started: float = started) -> None:
            new = {file: kernel for file, kernel in cache.kernels(run.triton_cache).items() if file not in before}
            counted = cache.counted(list(new.values()))
            report.parts[name] = {
                "end": "running",
                **result,
                "seconds": time.monotonic() - started,
                "compiled": counted,
            }
            report.write()

        state({})
        print(f"{name}: {seconds:.0f} s of the {left:.0f} that are left", flush=True)
        logged = run.log.stat().st_size
        result = PARTS[name].run(run, seconds, state)
        if "exit status" in result["end"] and not result.get("failures"):
            lines = run.log.read_bytes()[logged:].decode(errors="replace").splitlines()
            result.setdefault("first_error", "\n".join(lines[-30:]))
        state(result)
    if background is not None:
        background.stop()
    report.write()
    report.plot()


def failed(report: Report) -> bool:
    """Also of a part that was stopped later."""
    wrong = ("failed", "errors", "wrong")
    return any("exit status" in part["end"] or any(map(part.get, wrong)) for part in report.parts.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results/<device>")
    parser.add_argument("--budget", type=float, default=360.0, help="seconds")
    parser.add_argument("--started", type=float, help="when the budget began to count, in seconds since 1970")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, help="of AlexNet; 256, on a CPU 2")
    parser.add_argument("--only", default="", help=f"parts, separated by commas: {', '.join(PARTS)}")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here that torch can use; --device cpu is a rehearsal without one")
    wanted = [part.strip() for part in options.only.split(",") if part.strip()] or list(PARTS)
    for part in wanted:
        if part not in PARTS:
            parser.error(f"--only: {part!r} is none of {', '.join(PARTS)}")
    clock = Clock(options.budget - (time.time() - options.started if options.started else 0.0))
    device = "cpu" if options.device == "cpu" else torch.cuda.get_device_name()
    out = options.out or Path("benchmarks/results") / re.sub(r"\W+", "-", device.lower())
    command = f"python -m tools.gpu {shlex.join(arguments or sys.argv[1:])}"
    with tempfile.TemporaryDirectory(prefix="fastcnn-gpu-") as name:
        folder = Path(name)
        if carry.TRITON.exists():
            cache.unpack(carry.TRITON, folder / "triton")
        facts = {
            "budget": options.budget,
            "seconds_before_the_parts": options.budget - clock.left(),
            "kernels_brought_along": len(cache.kernels(folder / "triton")),
        }
        report = Report(out, options.device, command, facts)
        (out / "log.txt").write_text("")
        run = Run(options.device, options.batch or (2 if options.device == "cpu" else 256), report, folder)
        run.environment.update(
            TRITON_CACHE_DIR=str(run.triton_cache),
            TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"),
            FASTCNN_CACHE_DIR=str(folder / "fastcnn"),
            CUBLAS_WORKSPACE_CONFIG=":4096:8",
        )
        run_parts(run, wanted, clock)
    print((out / "report.md").read_text())
    sys.exit(failed(report))


if __name__ == "__main__":
    main()
