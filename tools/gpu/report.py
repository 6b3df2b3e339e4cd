"""``results.json``, ``report.md`` and two plots, written anew as the parts of ``make gpu`` report."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastcnn.bench import report as bench_report
from fastcnn.bench.rows import FP32, Row, add_ratios, fastest

MEASURED = ("kernels", "networks", "tuning")
_MOST_NAMED = 40  # failures
_PREDICTED = Path(__file__).parents[2] / "docs" / "roofline.json"


class Report:
    """What is known so far, and the files that tell it.

    Args:
        out: folder of the files.
        device: as torch names it.
        command: by which this was made.
        facts: further lines of the header.
    """

    def __init__(self, out: Path, device: str, command: str, facts: dict[str, Any]) -> None:
        self.out, self.device, self.command, self.facts = out, device, command, facts
        self.parts: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, list[Row]] = {part: [] for part in MEASURED}
        out.mkdir(parents=True, exist_ok=True)

    def document(self) -> dict[str, Any]:
        for measured in self.rows.values():
            add_ratios(measured)
        rows = [row for part in ("kernels", "networks") for row in self.rows[part]]
        document = bench_report.report(rows, command=self.command, source="random", device=self.device)
        return {
            "header": {**document["header"], **self.facts},
            "parts": self.parts,
            "rows": document["rows"],
            "tuning": [asdict(row) for row in self.rows["tuning"]],
        }

    def write(self) -> None:
        document = self.document()
        for name, text in (
            ("results.json", json.dumps(document, indent=1) + "\n"),
            ("report.md", self.markdown(document["header"])),
        ):
            unfinished = self.out / f".{name}"
            unfinished.write_text(text)
            unfinished.replace(self.out / name)

    def plot(self) -> None:
        """Of the kernels how close they are to a copy, of the networks how much faster than eager they are."""
        try:
            from fastcnn.bench.plots import write_plots
        except ImportError as error:
            print(f"no plots: {error}", file=sys.stderr)
            return
        with tempfile.TemporaryDirectory() as folder:
            for part, wanted in (("kernels", "kernels_roofline.png"), ("networks", "networks_speedup.png")):
                document = bench_report.report(
                    self.rows[part], command=self.command, source="random", device=self.device
                )
                for path in write_plots(Path(folder), document, self.rows[part], part):
                    if path.name == wanted:
                        shutil.copy(path, self.out / wanted)

    def markdown(self, header: dict[str, Any]) -> str:
        """The results for reading, what went wrong first."""
        lines = ["# On a GPU", "", "| | |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in header.items() if value is not None]
        lines += ["", "| part | ended | seconds | | kernels compiled in it |", "|---|---|---|---|---|"]
        lines += [_summary(name, part) for name, part in self.parts.items()]
        for name, part in self.parts.items():
            lines += _failures(name, part)
        lines += _calibration(self.parts.get("calibration", {}).get("figures", []))
        if self.rows["kernels"]:
            lines += ["", "## The kernels beside the best rival", "", *_against_the_best(self.rows["kernels"])]
        for name, rows in self.rows.items():
            if rows:
                lines += ["", f"## All of {name}", "", *_table(rows, predictions(header.get("gpu") or ""))]
        return "\n".join(lines) + "\n"


def _summary(name: str, part: dict[str, Any]) -> str:
    counts = [f"{part[key]} {key}" for key in ("passed", "failed", "skipped", "errors", "rows", "wrong") if key in part]
    counts += [f"under way: {test}" for test in part.get("under_way", ())]
    compiled = part.get("compiled", {})
    told = ", ".join(f"{count} {kernel}" for kernel, count in sorted(compiled.items()))
    seconds = "" if part.get("seconds") is None else f"{part['seconds']:.0f}"
    cells = [name, part["end"], seconds, "; ".join(counts), f"{sum(compiled.values())}{f': {told}' if told else ''}"]
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _failures(name: str, part: dict[str, Any]) -> list[str]:
    """The first in full, the others by name; and why tests were skipped."""
    failures, lines = part.get("failures", ()), []
    if part.get("first_error"):
        lines += ["", f"## The first error of {name}", "", "```", part["first_error"], "```"]
    if failures:
        first = failures[0]
        lines += ["", f"## The first failure of {name}", "", f"`{first['test']}` ({first.get('when', '')})", ""]
        lines += ["```", first.get("message", "").rstrip(), "```"]
        for title, text in first.get("sections", {}).items():
            lines += ["", f"{title}:", "", "```", text.rstrip(), "```"]
    if failures[1:]:
        lines += ["", f"Also failed in {name}: {len(failures) - 1}", ""]
        lines += [f"- `{failure['test']}`: {_last_line(failure)}" for failure in failures[1:_MOST_NAMED]]
    if part.get("reasons_to_skip"):
        lines += ["", f"Skipped in {name}:", "", *(f"- {reason}" for reason in part["reasons_to_skip"])]
    return lines


def _last_line(failure: dict[str, Any]) -> str:
    said = [line[1:].strip() for line in failure.get("message", "").splitlines() if line.startswith("E ")]
    return said[0][:200] if said else failure.get("message", "").strip().partition("\n")[0][:200]


def _calibration(figures: Iterable[dict[str, Any]]) -> list[str]:
    lines = []
    for figure in figures:
        told = ", ".join(f"{value:.4g} {key}" for key, value in figure.items() if key != "what")
        lines.append(f"| {figure['what']} | {told} |")
    return ["", "## Calibration", "", "| | |", "|---|---|", *lines] if lines else []


def _against_the_best(rows: Sequence[Row]) -> list[str]:
    """Of each operator, shape, dtype and direction: fastcnn by its best backend, and torch in its better format.

    Where torch has no 16-bit kernel, it is compared in fp32.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.median_ms:
            groups.setdefault((row.layer or row.op, row.mode, row.shape, row.dtype), []).append(row)
    head = ("what", "shape", "dtype", "fastcnn", "ms", "of copy", "best eager", "times faster", "than torch.compile")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    for (what, mode, shape, dtype), members in groups.items():
        ours, eager, compiled = (fastest(members, name) for name in ("fastcnn", "torch.eager", "torch.compile"))
        if ours is None:
            continue
        assert ours.median_ms
        cells = [f"{what} {mode}", "x".join(map(str, shape)), dtype, f"{ours.provider} {ours.format}"]
        cells += [f"{ours.median_ms:.3f}", _share(ours.gb_per_s, ours.copy_gb_per_s)]
        note = FP32 if eager and eager.provider.endswith(FP32) else ""
        cells.append(f"{eager.median_ms:.3f} {eager.format}{note}" if eager else "")
        cells += [f"{(rival.median_ms or 0) / ours.median_ms:.2f}x" if rival else "" for rival in (eager, compiled)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _share(rate: float | None, most: float | None) -> str:
    return f"{rate / most:.0%}" if rate and most else ""


def predictions(gpu: str) -> dict[tuple[Any, ...], float]:
    """What `make roofline` predicts of this GPU, in ms: operator, mode, shape, dtype, format, language -> ms."""
    document = json.loads(_PREDICTED.read_text()) if _PREDICTED.exists() else {"rows": []}
    found = {}
    for row in document["rows"]:
        for name, prediction in row["predictions"].items():
            if name in gpu:
                key = row["op"], row["mode"], tuple(row["shape"]), row["dtype"], row["format"], row["language"]
                found[key] = prediction["ms"]
    return found


def _table(rows: Sequence[Row], predicted: dict[tuple[Any, ...], float]) -> list[str]:
    """Bandwidth relative to a copy, operations relative to a matrix product, both measured in the same rounds."""
    head = ["what", "shape", "dtype", "format", "provider", "ms", "predicted ms", "of copy", "of mm"]
    head += ["vs eager", "vs compile", ""]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        shares = _share(row.gb_per_s, row.copy_gb_per_s), _share(row.gflop_per_s, row.matmul_gflop_per_s)
        faster = [f"{ratio:.2f}x" if ratio else "" for ratio in (row.vs_eager, row.vs_compile)]
        ms = f"{row.median_ms:.3f}" if row.median_ms else "failed"
        what, shape = f"{row.layer or row.op} {row.mode}", "x".join(map(str, row.shape))
        language = row.provider.removeprefix("fastcnn.")
        prediction = predicted.get((row.op, row.mode, tuple(row.shape), row.dtype, row.format, language))
        told = f"{prediction:.3f}" if prediction else ""
        cells = [what, shape, row.dtype, row.format, row.provider, ms, told, *shares, *faster]
        lines.append("| " + " | ".join([*cells, (row.failure or "").replace("|", "/")]) + " |")
    return lines


def read_rows(file: Path) -> list[Row]:
    """Those that are complete."""
    rows = []
    for fields in read_lines(file):
        rows.append(Row(**{**fields, "shape": tuple(fields["shape"])}))
    return rows


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON that may still be written to."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
