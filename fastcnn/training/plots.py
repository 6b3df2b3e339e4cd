"""Pictures of a run: its losses, its accuracy, and the filters of the first convolution."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .events import Epoch, Step
from .logs import read_events

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 16  # of filters, as in the paper's figure 3


def plot_run(run: str | os.PathLike[str], model: nn.Module) -> list[Path]:
    """Save ``loss.png``, ``accuracy.png`` (where there was validation) and ``filters.png`` in the folder of a run.

    Raises:
        ImportError: matplotlib is not installed (it comes with ``fastcnn[train]``).
        OSError: they cannot be written.
    """
    run = Path(run)
    events = read_events(run)
    steps = [event for event in events if isinstance(event, Step)]
    epochs = [event for event in events if isinstance(event, Epoch) and event.validation is not None]
    figures = {"loss": _loss(steps, epochs)} if steps else {}
    if epochs:
        figures["accuracy"] = _accuracy(epochs)
    figures["filters"] = _filters(model)
    for name, figure in figures.items():
        figure.savefig(run / f"{name}.png", dpi=120)
    return [run / f"{name}.png" for name in figures]


def _loss(steps: Sequence[Step], epochs: Sequence[Epoch]) -> Figure:
    figure, axes = _figure("loss")
    axes.plot([step.step for step in steps], [step.loss for step in steps], color="0.8", linewidth=0.5)
    means: dict[int, list[Step]] = {}
    for step in steps:
        means.setdefault(step.epoch, []).append(step)
    ends = [part[-1].step for part in means.values()]
    axes.plot(ends, [sum(step.loss for step in part) / len(part) for part in means.values()], label="training, epoch")
    if epochs:
        axes.plot([epoch.step for epoch in epochs], [_found(epoch).loss for epoch in epochs], label="validation")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def _accuracy(epochs: Sequence[Epoch]) -> Figure:
    figure, axes = _figure("accuracy, %")
    for name, label in (("top1", "top-1"), ("top5", "top-5")):
        values = [100 * getattr(_found(epoch), name) for epoch in epochs]
        axes.plot([epoch.step for epoch in epochs], values, label=f"validation, {label}")
    axes.set_ylim(top=100)
    axes.legend(frameon=False)
    return figure


def _filters(model: nn.Module) -> Figure:
    """The filters of each tower in a block of their own, the first tower above, on one scale. How many towers there
    are is told by the groups of the second convolution."""
    from matplotlib.figure import Figure

    first, *others = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    weight = first.weight.detach().float().cpu()
    towers = others[0].groups if others and first.out_channels % others[0].groups == 0 else 1
    shown = 0.5 + 0.5 * weight / weight.abs().max().clamp_min(1e-30)
    blocks = [_grid(tower) for tower in shown.chunk(towers)]
    height, width = (sum(block.shape[0] for block in blocks), blocks[0].shape[1])
    figure = Figure(figsize=(8, 8 * height / width + 0.3 * towers), layout="constrained")
    for number, (axes, block) in enumerate(zip(figure.subplots(towers, 1, squeeze=False).flat, blocks, strict=True), 1):
        axes.imshow(block.numpy(), interpolation="nearest")
        axes.set_axis_off()
        if towers > 1:
            axes.set_title(f"tower {number}", fontsize=9)
    return figure


def _grid(filters: Tensor) -> Tensor:
    """Filters (n, 3, h, w) side by side, white lines between them: (rows, columns, 3)."""
    columns = min(COLUMNS, len(filters))
    missing = -len(filters) % columns
    framed = nn.functional.pad(filters, (1, 1, 1, 1), value=1.0)
    framed = torch.cat((framed, torch.ones(missing, *framed.shape[1:])))
    return framed.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)


def _figure(label: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _found(epoch: Epoch) -> Any:
    return epoch.validation
