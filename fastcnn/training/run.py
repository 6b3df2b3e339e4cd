"""A run from its start or its last checkpoint to its end; whatever interrupts it, it can be resumed."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset
from ..data.files import flush_folder, locked
from . import checkpoints
from .evaluation import Evaluation
from .events import Begun, Epoch, Event, Listener, Saved, Step
from .job import SETTINGS
from .logs import BOARD, METRICS, Logs
from .recipes import Recipe
from .start import restore, start
from .trainer import Trainer, choose_device

LOCK = "lock"
LEFTOVERS = (METRICS, LOCK, f"{BOARD}*", f"step-*{checkpoints.UNFINISHED}", f"{METRICS}.*.tmp")
UNREAD = 10  # losses that may be waiting on a GPU, which reading each would stop
_RUNNING = threading.Lock()


class Diverged(RuntimeError):
    """The loss or a weight is NaN or infinite.

    Attributes:
        step: that showed it, counted from 1.
        lr: its learning rate.
        checkpoint: the last one before it.
    """

    def __init__(self, what: str, step: int, lr: float, checkpoint: Path) -> None:
        self.step, self.lr, self.checkpoint = step, lr, checkpoint
        super().__init__(
            f"{what} at step {step}, at a learning rate of {lr:g}. The last good checkpoint is {checkpoint}. Try a "
            "tenth of the learning rate, or a warm-up"
        )


@dataclass(frozen=True)
class Result:
    """What became of a run.

    Attributes:
        out: its folder.
        checkpoint: the newest.
        best: the one whose validation was best, the first of equals; None without validation.
        validations: of each epoch, None without validation.
        complete: False if it was interrupted.
        skipped: how many pictures for training could not be read.
    """

    out: Path
    checkpoint: Path
    best: Path | None
    validations: Sequence[Evaluation | None]
    complete: bool
    skipped: int


def train(
    data: str | Mapping[str, Dataset] | None = None,
    model: str | None = None,
    recipe: str | Recipe | None = None,
    *,
    out: str | os.PathLike[str],
    resume: bool = False,
    workers: int | None = None,
    device: str | torch.device | None = None,
    checkpoint_minutes: float = 10,
    listeners: Sequence[Listener] = (),
    **settings: Any,
) -> Result:
    """Train a network, and keep in a folder all that is needed to resume after an interruption.

    Every random choice is a function of (seed, epoch, step) and (seed, epoch, picture), so that a run that was
    interrupted ends with the same bits as one that was not, on the same machine, with as many threads.

    Args:
        data: the data set, as for :func:`fastcnn.data.open_splits`, or its splits themselves.
        model: a name of :func:`fastcnn.models.list_models`.
        recipe: a name in RECIPES, "plain" if None; or a recipe of your own.
        out: the folder of the run. It has checkpoints ``step-N``, of which the newest three and the best are kept,
            ``metrics.jsonl``, and files for TensorBoard. A folder that is there must be empty.
        resume: resume the run in ``out``. Other arguments are not needed then; those given must be the run's.
        workers: processes that read pictures, see :func:`fastcnn.data.loader`.
        device: "cpu" or "cuda"; the GPU if None and there is one.
        checkpoint_minutes: how often there is a checkpoint, besides at the end of every epoch. 0: after every step.
        listeners: are called with what happens, see :mod:`fastcnn.training.events`.
        settings: of the run: ``options`` of the model, ``width``, ``input_size``, ``seed``, ``plain``, ``start_from``
            (the run of a VGG A, see :func:`fastcnn.models.create_model`); and fields of :class:`Recipe`, in place of
            the recipe's own.

    Returns:
        What became of it. SIGINT (Ctrl-C) and SIGTERM end it with a checkpoint after the current step.

    Raises:
        FileNotFoundError: there are no such data; with ``resume``, no run.
        FileExistsError: without ``resume``, ``out`` has a run or something else in it.
        BlockingIOError: another process is training in ``out``.
        RuntimeError: this process is training already, in another thread or in a listener.
        TypeError, ValueError: an argument is not what it should be, or not the run's; the message names it.
        RuntimeError: a checkpoint is damaged, or is of another run; a worker has died (there is a checkpoint then).
        Diverged: the loss or a weight is NaN or infinite.
        ImageError: none of the pictures of a step can be read (there is a checkpoint of the step before then).
        OSError: nothing can be written. The last checkpoint is as it was.
        ImportError: a package is missing (all of them come with ``fastcnn[train]``).
    """
    for package in ("safetensors", "tensorboard"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is not installed: pip install fastcnn[train]")
    if not checkpoint_minutes >= 0:
        raise ValueError(f"train(): checkpoint_minutes must not be negative, but got {checkpoint_minutes}")
    where, out = choose_device(device), Path(out).absolute()
    given: dict[str, Any] = {"data": data, "model": model, "recipe": recipe, **settings}
    given |= {name: os.fspath(value) for name, value in given.items() if isinstance(value, os.PathLike)}
    unknown = given.keys() - {*SETTINGS, *(field.name for field in fields(Recipe))} | given.keys() & {"name"}
    if unknown:
        raise TypeError(f"train(): unknown settings: {', '.join(sorted(unknown))}")
    given = {name: value for name, value in given.items() if value is not None}
    with ExitStack() as stack:
        if not _RUNNING.acquire(blocking=False):
            raise RuntimeError("train(): this process is training already; both runs would seed torch's generator")
        stack.callback(_RUNNING.release)
        if resume:
            if not checkpoints.list_checkpoints(out):
                raise FileNotFoundError(f"{out}: there is no run to resume: it has no checkpoint")
            stack.enter_context(locked(out / LOCK))
            trainer, notes = restore(out, given, workers, where)
        else:
            stack.callback(_remove_if_empty, [folder for folder in (out, *out.parents) if not folder.exists()])
            _check_is_new(out)
            out.mkdir(parents=True, exist_ok=True)
            flush_folder(out.parent)
            stack.enter_context(locked(out / LOCK))
            _check_is_new(out)
            trainer, notes = start(given, workers, where), []
        checkpoints.clean(out)
        stack.enter_context(_generators_restored(where))
        stop = stack.enter_context(_signals())
        return _Run(out, trainer, checkpoint_minutes, listeners, stop).run(notes)


class _Run:
    """The loop."""

    def __init__(
        self,
        out: Path,
        trainer: Trainer,
        checkpoint_minutes: float,
        listeners: Sequence[Listener],
        stop: Callable[[], bool],
    ) -> None:
        self.out, self.trainer, self.stop = out, trainer, stop
        self.seconds = 60 * checkpoint_minutes
        self.unread: list[tuple[Tensor, dict[str, Any]]] = []
        self.logs = Logs(out, trainer.epoch, trainer.steps_done)
        self.listeners = listeners
        self.saved, self.updating = time.monotonic(), False
        self.saved_place = (trainer.epoch, trainer.step) if checkpoints.list_checkpoints(out) else None
        self.torch_handler: Any = None  # of SIGCHLD

    def run(self, notes: Sequence[str]) -> Result:
        trainer = self.trainer
        try:
            self._notify(Begun(trainer.job, trainer.steps_done, trainer.recipe.epochs * trainer.steps, notes))
            self._save()
            while trainer.epoch < trainer.recipe.epochs and self._epoch():
                pass
            self._save()
        except Exception as error:
            if self.updating or isinstance(error, Diverged) or not self._save_if_possible():
                raise
            if not (self.stop() and "DataLoader worker" in str(error)):  # which were told to end, too
                raise
        finally:
            self.logs.close()
            if self.torch_handler is not None:
                signal.signal(signal.SIGCHLD, self.torch_handler)
        found = checkpoints.list_checkpoints(self.out)
        return Result(
            self.out,
            found[max(found)],
            None if trainer.best is None else found.get(trainer.best),
            [evaluation for _, evaluation in trainer.validations],
            trainer.epoch == trainer.recipe.epochs,
            len(trainer.batches.skipped),
        )

    def _epoch(self) -> bool:
        """What is left of an epoch; False if it was interrupted."""
        trainer = self.trainer
        began = time.perf_counter()
        for batch in trainer.rest_of_epoch():
            self._ignore_worker_signals()
            waiting = time.perf_counter() - began
            about = {"step": trainer.steps_done + 1, "epoch": trainer.epoch, "lr": trainer.lr}
            self.updating = True
            loss = trainer.update(batch)
            self.updating = False
            self.unread.append((loss, about))
            read = trainer.device.type == "cpu" or len(self.unread) >= UNREAD
            if read:
                loss.item()  # waits for the GPU
            seconds = time.perf_counter() - began
            about |= {"pictures": len(batch.labels), "seconds": seconds, "waiting": waiting, "time": time.time()}
            if read:
                self._report_steps()
            if self.stop():
                return False
            if time.monotonic() - self.saved >= self.seconds and trainer.step < trainer.steps:
                self._save()
            began = time.perf_counter()
        self._report_steps()
        if self.stop():
            return False
        evaluation = None
        if trainer.to_validate is not None:
            evaluation = trainer.validate(self.stop)
            if evaluation is None:
                return False
            if not math.isfinite(evaluation.loss):
                what = f"The loss of validation is {evaluation.loss}"
                raise Diverged(what, trainer.steps_done, trainer.lr, self._newest())
        event = Epoch(trainer.epoch, trainer.steps_done, evaluation, len(trainer.batches.skipped), time.time())
        self.logs(event)
        trainer.end_epoch(evaluation)
        self._notify(event)
        self._save()
        return not self.stop()

    def _ignore_worker_signals(self) -> None:
        """When a worker dies, torch raises an error at whatever line is running, such as in the middle of an update.
        Without its handler the loader finds out a few seconds later, when it is asked for a batch."""
        if threading.current_thread() is threading.main_thread():
            handler = signal.getsignal(signal.SIGCHLD)
            if handler not in (None, signal.SIG_DFL, signal.SIG_IGN):
                self.torch_handler = handler
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _notify(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    def _report_steps(self) -> None:
        while self.unread:
            loss, about = self.unread[0]
            value = loss.item()
            if not math.isfinite(value):
                raise Diverged(f"The loss is {value}", about["step"], about["lr"], self._newest())
            event = Step(loss=value, **about)
            self.logs(event)  # without this line there is no checkpoint
            del self.unread[0]
            self._notify(event)

    def _save(self) -> None:
        self._report_steps()
        trainer = self.trainer
        if (place := (trainer.epoch, trainer.step)) != self.saved_place:
            if not trainer.is_finite():
                raise Diverged("A weight is not a number", trainer.steps_done, trainer.lr, self._newest())
            self.logs.flush()
            checkpoint = checkpoints.save(self.out, trainer.steps_done, trainer.tensors(), trainer.state())
            self.saved_place = place
            self._notify(Saved(checkpoint))
        checkpoints.prune(self.out, trainer.best)
        self.saved = time.monotonic()

    def _save_if_possible(self) -> bool:
        with suppress(OSError):
            self._save()
            return True
        return False

    def _newest(self) -> Path:
        found = checkpoints.list_checkpoints(self.out)
        return found[max(found)]


def _check_is_new(out: Path) -> None:
    """Raise FileExistsError if there is more in a folder than a run that was killed before its first checkpoint."""
    if os.path.lexists(out) and not out.is_dir():
        raise NotADirectoryError(f"{out}: is not a folder")
    if found := checkpoints.list_checkpoints(out):
        raise FileExistsError(f"{out}: has a run of {max(found)} steps; resume it with --resume")
    others = [path.name for path in out.iterdir() if not any(map(path.match, LEFTOVERS))] if out.exists() else []
    if others:
        raise FileExistsError(f"{out}: is not empty: there is {others[0]}")


def _remove_if_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def _generators_restored(device: torch.device) -> Iterator[None]:
    """Within, cuDNN is deterministic; afterwards torch's generators are as they were."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come, in the main thread; the second one has its usual effect."""
    asked = threading.Event()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def ask(number: int, frame: object) -> None:
        asked.set()
        restore()

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        restore()
