"""What a run tells whoever listens: a function that is called with each of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .evaluation import Evaluation
from .job import Job


@dataclass(frozen=True)
class Begun:
    """A run begins or resumes: ``step`` of ``steps`` steps are done. ``notes`` are for people."""

    job: Job
    step: int
    steps: int
    notes: Sequence[str]


@dataclass(frozen=True)
class Step:
    """A step that was made, counted from 1 at the beginning of the run.

    ``pictures`` is how many it had, ``seconds`` how long it took, with the ``waiting`` for its pictures; ``time`` is
    when it was done, in seconds since 1970.
    """

    step: int
    epoch: int
    loss: float
    lr: float
    pictures: int
    seconds: float
    waiting: float
    time: float


@dataclass(frozen=True)
class Epoch:
    """An epoch that has ended, with step ``step``; ``skipped`` pictures could not be read so far."""

    epoch: int
    step: int
    validation: Evaluation | None
    skipped: int
    time: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint was written."""

    checkpoint: Path


Event = Begun | Step | Epoch | Saved
Listener = Callable[[Event], object]
