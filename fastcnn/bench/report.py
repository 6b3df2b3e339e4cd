"""The rows as JSON, as tables, and in a few lines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .environment import environment
from .rows import Row

SECONDARY = " (fp32)"  # ends the name of a provider that stands beside a 16-bit case


def report(rows: Sequence[Row], *, command: str, source: str) -> dict[str, Any]:
    """Header and rows, ready for JSON. Bandwidths are in 1e9 bytes a second."""
    copies = [row.copy_gb_per_s for row in rows if row.copy_gb_per_s]
    header = {
        **environment(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "input": source,
        "copy_gb_per_s": statistics.median(copies) if copies else None,
    }
    return {"header": header, "rows": [asdict(row) for row in rows]}


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def setting(header: dict[str, Any]) -> str:
    """In a line, what the figures were taken on."""
    copy = header["copy_gb_per_s"]
    return (
        f"{header['cpu']}, {header['threads']} threads, kernels for {header['cpu_capability'] or 'none'}, "
        f"torch {header['torch']}, input: {header['input']}" + (f", copy: {copy:.1f} GB/s" if copy else "")
    )


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table for each operator, mode and shape; in it the providers of each case under a heading of their own."""
    titles = _grouped(rows, lambda row: f"{row.op} {row.mode}, input {row.shape}")
    return [_table(title, members) for title, members in titles.items()]


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _new_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _table(title: str, rows: list[Row]) -> Table:
    table = _new_table(title, "median ms", "spread", "vs eager", "vs compile", "GB/s", "of copy", "saved MB")
    notes = []
    for case, members in groupby(rows, key=lambda row: row.case):
        mapped = ", mapped" if case.memory == "mapped" else ""
        table.add_row(f"{case.dtype} {case.format}{mapped}", style="cyan")
        for row in members:
            table.add_row(f"  {row.provider}", *_figures(row), style="bold" if is_ours(row) else "")
            if row.failure is not None:
                notes.append(f"{row.provider}, {case.dtype} {case.format}: failed: {row.failure}")
    if notes:
        table.caption, table.caption_justify = Text("\n".join(notes), style="red"), "left"
    return table


def is_ours(row: Row) -> bool:
    """Whether fastcnn ran the case in its own dtype."""
    return row.provider.startswith("fastcnn.") and not row.provider.endswith(SECONDARY)


def _figures(row: Row) -> list[str]:
    if row.median_ms is None or row.q1_ms is None or row.q3_ms is None or row.gb_per_s is None:
        return ["[red]failed[/red]"]
    return [
        f"{row.median_ms:.2f}",
        f"{(row.q3_ms - row.q1_ms) / row.median_ms:.0%}",
        _ratio(row.vs_eager),
        _ratio(row.vs_compile),
        f"{row.gb_per_s:.1f}",
        _of_copy(row),
        "" if row.saved_bytes is None else f"{row.saved_bytes / 1e6:.1f}",
    ]


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}x" if value >= 2 else f"{value:.2f}x"


def _of_copy(row: Row) -> str:
    return f"{row.gb_per_s / row.copy_gb_per_s:.0%}" if row.gb_per_s and row.copy_gb_per_s else ""


def summaries(rows: Sequence[Row]) -> list[Table]:
    """For each shape, fastcnn by its fastest backend against PyTorch in the same memory format, a line for each case.

    The last column is of the same case with its output memory already mapped.
    """
    return [_summary(shape, members) for shape, members in _grouped(rows, lambda row: str(row.shape)).items()]


def _summary(shape: str, rows: list[Row]) -> Table:
    columns = ("than eager", "than compile", "than our fp32", "of copy, mapped")
    table = _new_table(f"fastcnn: how many times faster, input {shape}", *columns)
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
    eager, compiled = (" fp32" if name + SECONDARY in others else "" for name in ("torch.eager", "torch.compile"))
    wide = others.get(best.provider + SECONDARY)
    than_wide = wide.median_ms / best.median_ms if wide and wide.median_ms and best.median_ms else None
    return [
        _ratio(best.vs_eager) + eager if best.vs_eager else "",
        _ratio(best.vs_compile) + compiled if best.vs_compile else "",
        _ratio(than_wide),
    ]
