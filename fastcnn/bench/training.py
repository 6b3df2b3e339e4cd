"""How fast a network is trained, pictures and all, beside the same loop on torch's layers; and that both learn alike.

Before any time is taken, 50 steps in float64 must give the same losses, and gradients of the same weights in float32
must be as near to those in float64 as torch's; and the networks that are timed must say the same of a batch.
Providers take turns, some steps each.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Group
from torch import Tensor, nn

from ..data import Batch, Dataset
from ..training.job import Job
from ..training.trainer import Trainer
from .report import new_table, number
from .rows import quartiles

PROVIDERS = {  # whether of torch's layers, whether compiled, whether channels_last
    "fastcnn": (False, False, True),
    "torch.eager NCHW": (True, False, False),
    "torch.eager channels_last": (True, False, True),
    "torch.compile NCHW": (True, True, False),
    "torch.compile channels_last": (True, True, True),
}
POINTS = 10
TOLERANCE = 1e-4  # of logits, relative to the largest


@dataclass
class Parity:
    """What was compared.

    Attributes:
        steps: in float64.
        loss: the largest difference of a loss in them, relative to the loss of torch's layers.
        first, last: losses.
        points: of the run in float32, at which gradients of the same weights were compared.
        gradient: ||g - g64|| / ||g64|| of all gradients together, the median over the points.
        torch_gradient: that of torch's layers.
        ratio: the largest quotient of the two at a point.
    """

    steps: int
    loss: float
    first: float
    last: float
    points: int
    gradient: float
    torch_gradient: float
    ratio: float

    @property
    def passed(self) -> bool:
        """Whether both learn alike."""
        return self.loss <= 1e-9 and self.ratio <= 2 and self.last < self.first


@dataclass
class TrainingRow:
    """A provider: pictures per second, median and quartiles of the rounds, and the median share of waiting for data.
    ``speedup`` is the median over the rounds of fastcnn's rate by the provider's."""

    provider: str
    pictures_per_s: float
    q1: float
    q3: float
    waiting: float
    n: int
    speedup: float


def compare(job: Job, splits: Mapping[str, Dataset], steps: int) -> Parity:
    """Train with both kinds of layers, without dropout."""
    exact = [_with(job, plain=plain, dropout_p=0.0, precision="fp64") for plain in (False, True)]
    losses = [[float(loss) for loss in _losses(Trainer(one, splits), steps)] for one in exact]
    worst = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(*losses, strict=True))
    ours, theirs, truth = (
        Trainer(_with(job, plain=plain, dropout_p=0.0, precision=precision), splits)
        for plain, precision in ((False, "fp32"), (True, "fp32"), (True, "fp64"))
    )
    errors: list[tuple[float, float]] = []
    every = max(1, steps // POINTS)
    for number_, batch in zip(range(steps), _batches(ours), strict=False):
        if number_ % every == 0 and len(errors) < POINTS:
            for other in (theirs, truth):
                other.model.load_state_dict(ours.model.state_dict())
            wanted = _gradient(truth.model, batch)
            mine, torchs = (_error(_gradient(t.model, batch), wanted) for t in (ours, theirs))
            errors.append((mine, torchs))
        ours.update(batch)
    return Parity(
        steps,
        worst,
        statistics.mean(losses[0][:5]),
        statistics.mean(losses[0][-5:]),
        len(errors),
        statistics.median(mine for mine, _ in errors),
        statistics.median(torchs for _, torchs in errors),
        max(mine / torchs for mine, torchs in errors),
    )


def measure_training(
    job: Job, splits: Mapping[str, Dataset], *, steps: int, rounds: int, workers: int
) -> list[TrainingRow]:
    """A row for each provider.

    Raises:
        ValueError: one computes something else.
    """
    trainers = {
        name: Trainer(_with(job, plain=plain, channels_last=channels_last), splits, workers=workers)
        for name, (plain, _, channels_last) in PROVIDERS.items()
    }
    for name, (_, compiled, _) in PROVIDERS.items():
        if compiled:
            trainers[name].model.compile()
    _check_same_logits(trainers)
    batches = {name: _batches(trainer) for name, trainer in trainers.items()}
    rates: dict[str, list[float]] = {name: [] for name in trainers}
    waits: dict[str, list[float]] = {name: [] for name in trainers}
    order = list(trainers)
    for round in range(rounds + 1):
        random.Random(round).shuffle(order)
        for name in order:
            began, pictures, waiting = time.perf_counter(), 0, 0.0
            for _ in range(steps if round else 1):
                asked = time.perf_counter()
                batch = next(batches[name])
                waiting += time.perf_counter() - asked
                trainers[name].update(batch).item()
                pictures += len(batch.labels)
            seconds = time.perf_counter() - began
            if round:  # after the warm-up
                rates[name].append(pictures / seconds)
                waits[name].append(waiting / seconds)
    return [_row(name, rates, waits) for name in trainers]


def training_table(title: str, rows: Sequence[TrainingRow]) -> Group:
    """The rows of a network."""
    table = new_table(title, "pictures/s", "quartiles", "waiting", "fastcnn's rate by it")
    for row in rows:
        quartiles = f"{row.q1:,.1f} to {row.q3:,.1f}"
        figures = f"{row.pictures_per_s:,.1f}", quartiles, f"{row.waiting:.0%}", number(row.speedup, 2)
        table.add_row(row.provider, *figures, style="bold" if row.provider == "fastcnn" else "")
    return Group(table)


def parity_table(parity: Parity) -> Group:
    """What was compared before."""
    table = new_table("fastcnn and torch's layers learn alike", "found", "allowed")
    table.add_row(f"losses of {parity.steps} steps in fp64, largest difference", f"{parity.loss:.1e}", "1.0e-09")
    table.add_row("loss, first and last five steps", f"{parity.first:.3f} {parity.last:.3f}", "falling")
    table.add_row("error of gradients in fp32, fastcnn", f"{parity.gradient:.1e}", "")
    table.add_row("error of gradients in fp32, torch", f"{parity.torch_gradient:.1e}", "")
    table.add_row(f"largest ratio of the two at {parity.points} points", number(parity.ratio, 2), "2.00")
    return Group(table)


def _check_same_logits(trainers: Mapping[str, Trainer]) -> None:
    """Raise ValueError if networks differ in what they say, in evaluation mode, of a batch."""
    found = {}
    for name, trainer in trainers.items():
        images = next(trainer.rest_of_epoch()).images
        with torch.no_grad():
            found[name] = trainer.model.eval()(images)
        trainer.model.train()
    wanted = found["torch.eager NCHW"]
    for name, logits in found.items():
        if not (logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
            raise ValueError(f"the logits of {name} are not those of torch.eager")


def _row(name: str, rates: Mapping[str, Sequence[float]], waits: Mapping[str, Sequence[float]]) -> TrainingRow:
    own = rates[name]
    q1, q3 = quartiles(own)
    speedup = statistics.median(ours / other for ours, other in zip(rates["fastcnn"], own, strict=True))
    return TrainingRow(name, statistics.median(own), q1, q3, statistics.median(waits[name]), len(own), speedup)


def _with(job: Job, *, plain: bool, **of_recipe: object) -> Job:
    return replace(job, plain=plain, recipe=replace(job.recipe, **of_recipe))  # type: ignore[arg-type]


def _batches(trainer: Trainer) -> Iterator[Batch]:
    """Of one epoch after the other."""
    while True:
        yield from trainer.rest_of_epoch()
        trainer.epoch, trainer.step = trainer.epoch + 1, 0


def _losses(trainer: Trainer, steps: int) -> Iterator[Tensor]:
    for _, batch in zip(range(steps), _batches(trainer), strict=False):
        yield trainer.update(batch)


def _gradient(model: nn.Module, batch: Batch) -> Tensor:
    parameters = list(model.parameters())
    images = batch.images.to(parameters[0].dtype)
    loss = nn.functional.cross_entropy(model(images), batch.labels)
    return torch.cat([gradient.double().flatten() for gradient in torch.autograd.grad(loss, parameters)])


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
