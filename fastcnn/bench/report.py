"""The rows as JSON, as tables, and in a few lines."""

import json
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .cases import ANY_FORMAT, Case
from .environment import environment
from .rows import FP32, Row

_Column = tuple[str, Callable[[Row], str]]  # its heading, and what it shows of a row


def report(rows: Sequence[Row], *, command: str, source: str, device: str = "cpu") -> dict[str, Any]:
    """Header and rows, ready for JSON. Bandwidths are in 1e9 bytes a second."""

    def median(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value]
        return statistics.median(known) if known else None

    header = {
        **environment(device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "input": source,
        "copy_gb_per_s": median(row.copy_gb_per_s for row in rows),
        "matmul_gflop_per_s": median(row.matmul_gflop_per_s for row in rows if row.dtype == "fp32"),
    }
    return {"header": header, "rows": [asdict(row) for row in rows]}


def read_rows(document: dict[str, Any]) -> list[Row]:
    """The rows of a file's :func:`report`, also of one that has fewer columns."""
    return [Row(**{**fields, "shape": tuple(fields["shape"])}) for fields in document["rows"]]


def write_json(path: Path, document: dict[str, Any]) -> None:
    """The old file is there until the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_name(f"{path.name}.incomplete")
    incomplete.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(incomplete, path)


def setting(header: dict[str, Any]) -> str:
    """In a line, what the figures were taken on."""
    copy, matmul = header["copy_gb_per_s"], header["matmul_gflop_per_s"]
    rates = f", copy: {copy:.1f} GB/s" if copy else f", fp32 matrix product: {matmul:.0f} GFLOP/s" if matmul else ""
    cpu = f"{header['cpu']}, {header['threads']} threads, kernels for {header['cpu_capability'] or 'none'}"
    return f"{header.get('gpu') or cpu}, torch {header['torch']}, input: {header['input']}{rates}"


def tables(rows: Sequence[Row]) -> list[RenderableType]:
    """One table for each operator or network, mode and shape; in it the providers of each case under a heading.

    Below it is what failed, and why.
    """
    titles = _grouped(rows, lambda row: f"{row.layer or row.op} {row.mode}, input {row.shape}")
    return [Group(_Figures(title, members), *_notes(members)) for title, members in titles.items()]


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def new_table(title: str, *columns: str) -> Table:
    """An empty table whose first column has the names of its rows."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 1, 0, 0)
    table.add_column("", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


@dataclass
class _Figures:
    """A table of rows; where it is too wide, groups of its columns stand below each other."""

    title: str
    rows: list[Row]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        columns: list[_Column] = []
        for group in _COLUMNS:
            more = [(name, figure) for name, figure in group.items() if any(map(figure, self.rows))]
            width = Measurement.get(console, options.update(max_width=1000), self._table(columns + more)).maximum
            if columns and width > options.max_width:
                yield self._table(columns)
                yield ""
                columns = []
            columns += more
        yield self._table(columns)

    def _table(self, columns: list[_Column]) -> Table:
        table = new_table("", *(name for name, _ in columns))
        for case, members in groupby(self.rows, key=lambda row: row.case):
            mapped = ", mapped" if case.memory == "mapped" else ""
            table.add_row(f"{_dtype_and_format(case)}{mapped}", style="cyan")
            for row in members:
                shown = [figure(row) for _, figure in columns] if row.median_ms else [_missing(row)]
                table.add_row(f"  {row.provider}", *shown, style="bold" if is_ours(row) else "")
        return table


def _dtype_and_format(case: Case) -> str:
    return case.dtype if case.format == ANY_FORMAT else f"{case.dtype} {case.format}"


def _notes(rows: Sequence[Row]) -> list[RenderableType]:
    """What stands below a table: the parts of training steps, then what failed and why."""
    lines = []
    for row in rows:
        if row.forward_ms is not None:
            parts = f"forward {row.forward_ms:.0f}, backward {row.backward_ms:.0f}, update {row.update_ms:.0f} ms"
            lines.append(Text(f"  {row.provider}: {parts}", style="dim"))
    for row in rows:
        if row.failure is not None:
            failed = "" if row.failure.startswith("not installed") else "failed: "
            lines.append(Text(f"{row.provider}, {_dtype_and_format(row.case)}: {failed}{row.failure}", style="red"))
    return ["", *lines] if lines else []


def is_ours(row: Row) -> bool:
    """Whether fastcnn ran the case in its own dtype."""
    return row.provider.startswith("fastcnn") and not row.provider.endswith(FP32)


def _missing(row: Row) -> str:
    return "not installed" if (row.failure or "").startswith("not installed") else "[red]failed[/red]"


def ratio(value: float | None) -> str:
    """How many times faster, as shown."""
    return "" if value is None else f"{value:.1f}x" if value >= 2 else f"{value:.2f}x"


def number(value: float | None, digits: int = 1) -> str:
    """Shown with this many digits after the point."""
    return "" if value is None else f"{value:.{digits}f}"


def _quotient(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.0%}" if part and whole else ""


def _of_copy(row: Row) -> str:
    return _quotient(row.gb_per_s, row.copy_gb_per_s)


def _spread(row: Row) -> str:
    return "" if row.q1_ms is None or row.q3_ms is None else f"{(row.q3_ms - row.q1_ms) / (row.median_ms or 1):.0%}"


def _megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


# Groups that stay together. Columns of which no row of a table has a figure are left out.
_COLUMNS: tuple[dict[str, Callable[[Row], str]], ...] = (
    {
        "images/s": lambda row: number(row.images_per_s),
        "median\nms": lambda row: number(row.median_ms, 2),
        "spread": _spread,
        "vs\neager": lambda row: ratio(row.vs_eager),
        "vs\ncompile": lambda row: ratio(row.vs_compile),
    },
    {
        "GB/s": lambda row: number(row.gb_per_s),
        "of\ncopy": _of_copy,
        "GFLOP/s": lambda row: number(row.gflop_per_s, 0),
        "of\nmm": lambda row: _quotient(row.gflop_per_s, row.matmul_gflop_per_s),
    },
    {
        "saved\nMB": lambda row: _megabytes(row.saved_bytes),
        "of\neager's": lambda row: _quotient(row.saved_vs_eager, 1),
        "peak\nMB": lambda row: number(row.peak_bytes and row.peak_bytes / 1e6, 0),
        "resident\nMB": lambda row: number(row.resident_bytes and row.resident_bytes / 1e6, 0),
    },
)


def summaries(rows: Sequence[Row]) -> list[Table]:
    """For each shape, fastcnn by its fastest backend against PyTorch in its faster format, a line for each case.

    The last column is of the same case with its output memory already mapped.
    """
    return [_summary(shape, members) for shape, members in _grouped(rows, lambda row: str(row.shape)).items()]


def _summary(shape: str, rows: list[Row]) -> Table:
    columns = ("than\neager", "than\ncompile", "than our\nfp32", "of copy,\nmapped")
    table = new_table(f"fastcnn: how many times faster, input {shape}", *columns)
    for title, members in _grouped(rows, lambda row: f"{row.op} {row.mode}").items():
        lines = []
        for name, case in _grouped(members, lambda row: f"{row.dtype} {row.format}").items():
            fresh = {row.provider: row for row in case if row.memory == "fresh" and row.median_ms is not None}
            ours = sorted(filter(is_ours, fresh.values()), key=lambda row: row.median_ms or 0)
            if ours:
                mapped = [_of_copy(row) for row in case if row.memory == "mapped" and is_ours(row)]
                lines.append([f"  {name}", *_comparisons(ours[0], fresh), *mapped[:1]])
        if lines:
            table.add_row(title, style="cyan")
        for line in lines:
            table.add_row(*line)
    return table


def _comparisons(best: Row, others: dict[str, Row]) -> list[str]:
    """``best`` against eager, torch.compile and its own fp32, saying so where torch ran in fp32 too."""
    eager, compiled = (" fp32" if name + FP32 in others else "" for name in ("torch.eager", "torch.compile"))
    wide = others.get(best.provider + FP32)
    than_wide = wide.median_ms / best.median_ms if wide and wide.median_ms and best.median_ms else None
    return [
        ratio(best.vs_eager) + eager if best.vs_eager else "",
        ratio(best.vs_compile) + compiled if best.vs_compile else "",
        ratio(than_wide),
    ]
