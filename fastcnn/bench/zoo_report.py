"""The zoo's results: their file, which grows case by case, a table, and a line for each mode."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from .report import new_table, number, ratio, report, write_json
from .rows import Row
from .zoo import ZooCase, ZooResult

SLOWER = 0.97  # a ratio below it is no noise
_COLUMNS = {
    "fastcnn": "fastcnn",
    "fastcnn plain": "plain",
    "torch.eager": "eager",
    "torch.eager channels_last": "channels\nlast",
    "torch.compile": "compile",
}


def read_results(file: Path) -> dict[ZooCase, ZooResult]:
    """What the file has, nothing if it is not there."""
    if not file.exists():
        return {}
    results = {}
    for found in json.loads(file.read_text())["cases"]:
        rows = [Row(**{**fields, "shape": tuple(fields["shape"])}) for fields in found["rows"]]
        case = ZooCase(rows[0].case, found["threads"])
        result = ZooResult(case, rows, found.get("command", ""), found["torch"], found["fastcnn"], found.get("sources"))
        results[case] = result
    return results


def write_results(file: Path, results: dict[ZooCase, ZooResult], command: str) -> dict[str, Any]:
    """Write them, each with the command that measured it, under a header of this one."""
    header = report([], command=command, source="photographs")["header"]
    cases = [
        {
            "case": str(result.case),
            "threads": result.case.threads,
            "torch": result.torch,
            "fastcnn": result.fastcnn,
            "sources": result.sources,
            "command": result.command,
            "ratio": result.ratio(),
            "rows": [{k: v for k, v in asdict(row).items() if v is not None} for row in result.rows],
        }
        for result in results.values()
    ]
    write_json(file, {"header": header, "cases": cases})
    return header


def is_done(result: ZooResult | None, providers: Sequence[str]) -> bool:
    """Whether a result is of the versions and sources that are here and has all these providers."""
    if result is None:
        return False
    here = ZooResult(result.case, [])
    same = (result.torch, result.fastcnn, result.sources) == (here.torch, here.fastcnn, here.sources)
    return same and {row.provider for row in result.rows} >= set(providers)


def zoo_table(results: Sequence[ZooResult]) -> Group:
    """Medians in ms, a line for each case, the worst ratio first; below it what failed."""

    def order(result: ZooResult) -> tuple[bool, float]:
        return not result.lost, result.ratio() or float("inf")

    shown = [name for name in _COLUMNS if any(row.provider == name for result in results for row in result.rows)]
    with_plain = "fastcnn plain" in shown
    ratios = ["ratio", *(["of\nplain"] if with_plain else [])]
    table = new_table("zoo, median ms; ratio: the faster eager / fastcnn", *(_COLUMNS[name] for name in shown), *ratios)
    for result in sorted(results, key=order):
        rows = {row.provider: row for row in result.rows}
        cells = [_cell(rows.get(name)) for name in shown]
        cells.append(ratio(result.ratio()))
        if with_plain:
            cells.append(ratio(result.ratio("fastcnn plain")))
        table.add_row(str(result.case), *cells)
    notes = dict.fromkeys(note for result in results for note in _notes(result))
    return Group(table, *(Text(note, style="red") for note in notes))


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.failure is None:
        return number(row.median_ms, 2)
    kind = row.failure.partition(":")[0].replace(" ", "\n")  # so that columns stay narrow
    return f"[red]{kind}[/red]"


def _notes(result: ZooResult) -> Iterator[str]:
    """Why there are no times, of every provider at once where they all say the same."""
    case = result.case.case
    failures = {row.provider: row.failure for row in result.rows if row.failure is not None}
    if len(failures) == len(result.rows) and len(set(failures.values())) == 1:
        failures = {"all": failures.popitem()[1]}
    for provider, failure in failures.items():
        yield f"{case.op} {case.mode}, {case.shape[-1]} px, {provider}: {failure}"


def zoo_summary(results: Sequence[ZooResult]) -> list[str]:
    """For each mode, and each way to call optimize(), the worst ratio, how many are too low, and what failed."""
    lines = []
    for mode in dict.fromkeys(result.case.case.mode for result in results):
        members = [result for result in results if result.case.case.mode == mode]
        for provider in ("fastcnn", "fastcnn plain"):
            ratios = [(value, result) for result in members if (value := result.ratio(provider)) is not None]
            if ratios:
                worst, where = min(ratios, key=lambda pair: pair[0])
                slower = sum(value < SLOWER for value, _ in ratios)
                plain = " without inference=True" if provider == "fastcnn plain" else ""
                lines.append(
                    f"{mode}{plain}: {len(ratios)} cases, worst ratio {worst:.2f} ({where.case}), "
                    f"{slower} under {SLOWER}"
                )
        lost = [str(result.case) for result in members if result.lost]
        if lost:
            lines.append(f"{mode}: fastcnn failed where eager runs: {'; '.join(lost)}")
    return lines
