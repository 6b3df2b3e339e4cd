"""Commands within a budget of seconds."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_POLL = 1.0


class Clock:
    """Counts down from ``budget`` seconds."""

    def __init__(self, budget: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + budget

    def left(self) -> float:
        return max(0.0, self._end - self._now())


class Process:
    """A command with its output in a log; with all that it started it can be stopped."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        with log.open("ab") as output:
            output.write(f"\n$ {' '.join(command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                start_new_session=True,
            )

    def wait(self, seconds: float, progress: Callable[[], None] = lambda: None) -> str:
        """How it ended, after so many seconds at the most; ``progress`` is called now and then."""
        end = time.monotonic() + seconds
        try:
            while True:
                try:
                    code = self._process.wait(timeout=max(0.0, min(_POLL, end - time.monotonic())))
                    return "done" if code == 0 else f"exit status {code}"
                except subprocess.TimeoutExpired:
                    progress()
                    if time.monotonic() >= end:
                        return f"stopped after {seconds:.0f} s"
        finally:
            self.stop()

    def stop(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
