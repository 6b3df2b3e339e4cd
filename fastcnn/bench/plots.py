"""Two plots: how many times faster than eager, and how close to the rate of a copy, or of a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import ANY_FORMAT, Case
from .report import setting
from .rows import EAGER, FP32, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    "fastcnn": "#d1495b",
    "fastcnn NCHW": "#e58f9b",
    "fastcnn.cpu": "#d1495b",
    "fastcnn.reference": "#edae49",
    "torch.compile": "#30638e",
    "torch.eager": "#9aa5b1",
    "torch.eager channels_last": "#c3cad1",
    "onnxruntime": "#66a182",
    "openvino": "#8d96a3",
}


def write_plots(folder: Path, document: dict[str, Any], rows: Sequence[Row], name: str = "kernels") -> list[Path]:
    """Write ``<name>_speedup.png`` and ``<name>_roofline.png``, each only if there is something to show in it.

    Args:
        folder: where to.
        document: the report, for its header.
        rows: what to show; providers that ran a 16-bit case in fp32 are left out.
        name: what was measured, "kernels" or "models".
    """
    header = document["header"]
    machine = setting(header)
    rows = [row for row in rows if not row.provider.endswith(FP32)]
    shapes = {row.shape for row in rows}
    if len(shapes) == 1:
        machine += f", shape: {shapes.pop()}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []

    def finish(figure: Figure, axes: Axes, title: str, file: str) -> None:
        axes.set_title(f"{title}\n", loc="left", fontweight="bold")
        axes.text(0, 1, machine, transform=axes.transAxes, fontsize=8, va="bottom", color="#555555")
        figure.legend(loc="outside upper right", ncols=5, frameon=False, fontsize=8)
        figure.savefig(folder / file, dpi=130)
        paths.append(folder / file)

    faster = [row for row in rows if row.vs_eager and row.provider not in EAGER]
    if faster:
        figure, axes = _bars(faster, lambda row: row.vs_eager or 1, "{:.1f}x", start=1)
        axes.axvline(1, color="black", linewidth=1.2, label="torch.eager")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.set_xlabel("than the faster of its two memory formats, in the same run, log scale")
        finish(figure, axes, "Times faster than torch eager", f"{name}_speedup.png")

    timed = [row for row in rows if row.gb_per_s]
    if timed:
        figure, axes = _bars(timed, lambda row: row.gb_per_s or 0, "{:.1f}", start=0)
        axes.axvline(header["copy_gb_per_s"], color="black", linewidth=1.2, label="copy")
        axes.set_xlabel("GB/s: bytes that the operator must read and write / time")
        finish(figure, axes, "Bandwidth reached", f"{name}_roofline.png")

    computed = [row for row in rows if row.gflop_per_s and row.images_per_s]
    if computed:
        figure, axes = _bars(computed, lambda row: row.gflop_per_s or 0, "{:.0f}", start=0)
        if header["matmul_gflop_per_s"]:
            axes.axvline(header["matmul_gflop_per_s"], color="black", linewidth=1.2, label="fp32 matrix product")
        axes.set_xlabel("GFLOP/s: operations that the network needs / time")
        finish(figure, axes, "Arithmetic rate reached", f"{name}_roofline.png")
    return paths


def _bars(rows: Sequence[Row], value: Callable[[Row], float], text: str, *, start: float) -> tuple[Figure, Axes]:
    """A group of horizontal bars for each case, a bar for each provider from ``start`` to its value."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row.case for row in rows))
    with_shape = len({case.shape for case in cases}) > 1
    figure = Figure(figsize=(10, 1.6 + 0.2 * len(rows) + 0.16 * len(cases)), layout="constrained")
    axes = figure.subplots()
    in_legend: set[str] = set()
    y, ticks = 0.0, []
    for case in cases:
        members = [row for row in rows if row.case == case]
        ticks.append(y + (len(members) - 1) / 2)
        for row in members:
            name = row.provider
            label = "_" if name in in_legend else name  # matplotlib leaves out of the legend what starts with "_"
            in_legend.add(name)
            colour = _COLOURS.get(name, "#4f6d7a")
            bar = axes.barh(y, value(row) - start, 0.85, left=start, color=colour, label=label)
            axes.bar_label(bar, [text.format(value(row))], padding=3, fontsize=8)
            y += 1
        y += 0.8
    axes.set_yticks(ticks, [_label(case, with_shape) for case in cases], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _label(case: Case, with_shape: bool) -> str:
    shape = f" {case.shape}" if with_shape else ""
    memory = ", mapped output" if case.memory == "mapped" else ""
    format = "" if case.format == ANY_FORMAT else f" {case.format}"
    return f"{case.op} {case.mode}{shape}\n{case.dtype}{format}{memory}"
