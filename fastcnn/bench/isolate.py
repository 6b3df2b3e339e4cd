"""A provider in a process of its own, which is stopped while it is not its turn.

Runtimes disturb each other: the threads of one that has just answered go on spinning in wait for the next call, on the
cores that another is timed on. A stopped process has no threads that spin.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from .workload import reason

if TYPE_CHECKING:
    from .measure import Participant

_WARM_UP = 0.05  # seconds


def warmed(timer: Callable[[], float]) -> float:
    """Seconds of a call after others: they wake the threads, and bring back what another process drove from caches."""
    start = time.perf_counter()
    timer()
    while time.perf_counter() - start < _WARM_UP:
        timer()
    return timer()


class Isolated:
    """A :class:`fastcnn.bench.measure.Participant` for a ``with`` block, at whose end the process is gone.

    Args:
        prepare: makes the participant, in that process; it is pickled.
    """

    def __init__(self, prepare: Callable[[], Participant]) -> None:
        if not hasattr(signal, "SIGSTOP"):
            raise NotImplementedError("this system cannot stop a process")
        context = multiprocessing.get_context("spawn")
        self.pipe, self.theirs = context.Pipe()
        arguments = self.theirs, prepare, torch.get_num_threads()
        self.process = context.Process(target=_serve, args=arguments, daemon=True)

    def __enter__(self) -> Isolated:
        self.process.start()
        self.theirs.close()  # or the end of the process would not be the end of the pipe
        self.row = self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # a stopped process does not see SIGTERM
        self.process.join()

    def seconds(self) -> float:
        return float(self._ask("seconds"))

    def finish(self) -> None:
        self.row = self._ask("finish")

    def _ask(self, wanted: str) -> Any:
        self._signal(signal.SIGCONT)
        self.pipe.send(wanted)
        return self._answer()

    def _answer(self) -> Any:
        """Of the process, which is stopped after it."""
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(f"its process ended with exit code {self.process.exitcode}") from None
        self._signal(signal.SIGSTOP)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def _serve(pipe: Connection, prepare: Callable[[], Participant], threads: int) -> None:
    torch.set_num_threads(threads)
    with torch.random.fork_rng():
        participant = prepare()
    pipe.send(participant.row)
    while True:
        try:
            wanted = pipe.recv()
        except EOFError:
            return
        try:
            if wanted == "seconds":
                pipe.send(warmed(participant.seconds))
            else:
                participant.finish()
                pipe.send(participant.row)
        except Exception as error:
            pipe.send(RuntimeError(reason(error)))
