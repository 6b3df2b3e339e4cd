"""What a run writes down: ``metrics.jsonl``, a line for each step and epoch, and the same for TensorBoard.

The lines are the truth. Those after the checkpoint from which a run goes on are dropped, and TensorBoard's files are
written anew from the others, so that nothing is there twice.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ..data.files import write_whole
from .evaluation import Evaluation
from .events import Epoch, Event, Step

METRICS = "metrics.jsonl"
log = logging.getLogger(__name__)


class Logs:
    """A listener that writes both.

    Args:
        run: the folder.
        epoch, step: where the run stands: the epochs before ``epoch`` and ``step`` steps are done.
    """

    def __init__(self, run: Path, epoch: int, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        done = [event for event in read_events(run) if _is_done(event, epoch, step)]
        if (last := max((event.step for event in done), default=0)) < step:
            log.warning("%s: steps %d to %d are missing", run / METRICS, last + 1, step)
        lines = "".join(map(_line, done)).encode()
        write_whole(run / METRICS, lambda stream: stream.write(lines))
        for file in run.glob("events.out.tfevents.*"):
            file.unlink()
        self.lines = open(run / METRICS, "a")  # noqa: SIM115
        self.board = SummaryWriter(str(run))
        for event in done:
            self._show(event)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step | Epoch):
            self.lines.write(_line(event))
            self._show(event)

    def flush(self) -> None:
        """To the disk."""
        self.lines.flush()
        os.fsync(self.lines.fileno())
        self.board.flush()

    def close(self) -> None:
        """End, after what was written is on the disk if it can be."""
        with suppress(OSError):
            self.lines.close()
        with suppress(OSError):
            self.board.close()

    def _show(self, event: Step | Epoch) -> None:
        if isinstance(event, Step):
            shown = {"train/loss": event.loss, "train/lr": event.lr}
            shown["train/pictures_per_s"] = event.pictures / event.seconds
            shown["train/waiting"] = event.waiting / event.seconds
        else:
            found = asdict(event.validation) if event.validation else {}
            shown = {f"validation/{name}": value for name, value in found.items() if name != "pictures"}
        for name, value in shown.items():
            self.board.add_scalar(name, value, event.step, walltime=event.time)


def read_events(run: Path) -> list[Step | Epoch]:
    """The steps and epochs that a run has written down, up to a line that a crash has damaged or cut short."""
    file = run / METRICS
    found: list[Step | Epoch] = []
    for line in file.read_bytes().splitlines(keepends=True) if file.exists() else []:
        try:
            found.append(_event(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            break
    return found


def _event(line: bytes) -> Step | Epoch:
    if not line.endswith(b"\n"):
        raise ValueError("it is cut short")
    content = json.loads(line)
    if content.pop("kind") == "step":
        return Step(**content)
    found = content.pop("validation")
    return Epoch(validation=found and Evaluation(**found), **content)


def _line(event: Step | Epoch) -> str:
    return json.dumps({"kind": type(event).__name__.lower(), **asdict(event)}, allow_nan=False) + "\n"


def _is_done(event: Step | Epoch, epoch: int, step: int) -> bool:
    return event.step <= step if isinstance(event, Step) else event.epoch < epoch
