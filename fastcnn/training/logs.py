"""What a run writes down: ``metrics.jsonl``, a line for each step and epoch, and the same for TensorBoard.

The lines are the truth. Those after the checkpoint from which a run resumes are dropped, and TensorBoard's files are
written anew from the others, so that nothing is there twice.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from dataclasses import asdict, fields, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..data.files import named_in_errors, remove_unfinished, write_whole
from .evaluation import Evaluation
from .events import Epoch, Event, Step

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event as Record

T = TypeVar("T")

METRICS = "metrics.jsonl"
BOARD = "events.out.tfevents."  # and when it was begun, by which TensorBoard orders such files
log = logging.getLogger(__name__)


class Logs:
    """A listener that writes both, each event as it comes.

    Args:
        run: the folder.
        epoch, step: where the run stands: the epochs before ``epoch`` and ``step`` steps are done.

    Raises:
        OSError: a file cannot be written, as in all methods but :meth:`close`; the message names it.
    """

    def __init__(self, run: Path, epoch: int, step: int) -> None:
        remove_unfinished(run / METRICS)
        done = [event for event in read_events(run) if _is_done(event, epoch, step)]
        steps = sum(isinstance(event, Step) for event in done)
        if (steps, len(done) - steps) != (step, epoch):
            missing = step - steps, epoch - (len(done) - steps)
            log.warning("%s: the lines of %d steps and %d epochs are missing", run / METRICS, *missing)
        lines = "".join(map(_line, done)).encode()
        write_whole(run / METRICS, lambda stream: stream.write(lines))
        for file in run.glob(f"{BOARD}*"):
            file.unlink()
        self.lines = open(run / METRICS, "a")  # noqa: SIM115
        self.board = open(run / f"{BOARD}{time.time_ns()}", "wb")  # noqa: SIM115
        self._show([_version(), *map(_record, done)])

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step | Epoch):
            with named_in_errors(self.lines.name):
                self.lines.write(_line(event))
                self.lines.flush()
            self._show([_record(event)])

    def flush(self) -> None:
        """To the disk."""
        with named_in_errors(self.lines.name):
            os.fsync(self.lines.fileno())

    def close(self) -> None:
        """End."""
        for file in (self.lines, self.board):
            with suppress(OSError):  # of what could not be written before
                file.close()

    def _show(self, records: list[Record]) -> None:
        """In TensorBoard. The writer of torch has a thread, which ends with a traceback when the disk is full."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        with named_in_errors(self.board.name):
            for record in records:
                RecordWriter(self.board).write(record.SerializeToString())
            self.board.flush()


def read_events(run: Path) -> list[Step | Epoch]:
    """The steps and epochs that a run has written down, in ascending order, without lines that are damaged."""
    file = run / METRICS
    found: list[Step | Epoch] = []
    for line in file.read_bytes().splitlines(keepends=True) if file.exists() else []:
        with suppress(ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            event = _event(line)
            if not found or _place(event) > _place(found[-1]):
                found.append(event)
    return found


def _event(line: bytes) -> Step | Epoch:
    if not line.endswith(b"\n"):
        raise ValueError("it is cut short")
    content = json.loads(line)
    if content.pop("kind") == "step":
        step = _of_numbers(Step, content)
        if step.seconds <= 0:
            raise ValueError("it took no time")
        return step
    found = content.pop("validation")
    validation = None if found is None else _of_numbers(Evaluation, found)
    return replace(_of_numbers(Epoch, {**content, "validation": None}), validation=validation)


def _of_numbers(kind: type[T], content: dict[str, Any]) -> T:
    """A dataclass whose fields are numbers, but for those that are None."""
    for field in fields(kind):  # type: ignore[arg-type]
        value = content[field.name]
        allowed = {"int": (int,), "float": (int, float)}.get(str(field.type), (type(None),))
        if type(value) not in allowed or (value is not None and not isfinite(value)):
            raise TypeError(f"{field.name} is {value!r}")
    return kind(**content)


def _place(event: Step | Epoch) -> tuple[int, bool]:
    return event.step, isinstance(event, Epoch)


def _line(event: Step | Epoch) -> str:
    return json.dumps({"kind": type(event).__name__.lower(), **asdict(event)}, allow_nan=False) + "\n"


def _is_done(event: Step | Epoch, epoch: int, step: int) -> bool:
    return event.step <= step if isinstance(event, Step) else event.epoch < epoch


def _version() -> Record:
    """With which TensorBoard's files begin."""
    from tensorboard.compat.proto.event_pb2 import Event as Record

    return Record(wall_time=time.time(), file_version="brain.Event:2")


def _record(event: Step | Epoch) -> Record:
    """For TensorBoard."""
    from tensorboard.compat.proto.event_pb2 import Event as Record

    if isinstance(event, Step):
        shown = {"train/loss": event.loss, "train/lr": event.lr}
        shown["train/pictures_per_s"] = event.pictures / event.seconds
        shown["train/waiting"] = event.waiting / event.seconds
    else:
        found = asdict(event.validation) if event.validation else {}
        shown = {f"validation/{name}": value for name, value in found.items() if name != "pictures"}
    record = Record(wall_time=event.time, step=event.step)
    for name, value in shown.items():
        record.summary.value.add(tag=name, simple_value=value)
    return record
