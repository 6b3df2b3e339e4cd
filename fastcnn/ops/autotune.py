"""Which of several implementations of the same thing is the fastest: measured once a shape, remembered on disk.

The first candidate is the truth. Any other is eligible only after its outputs were compared with the truth's; one that
is wrong, raises, or finds no memory is passed over.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., Tensor]

_log = logging.getLogger(__name__)
_OUTLIER = 8  # an element may be off by this many tolerances of the largest


def cache_folder() -> Path:
    """``$FASTCNN_CACHE_DIR``, else ``fastcnn`` in the user's cache folder.

    Raises:
        RuntimeError: the user has no home.
    """
    if folder := os.environ.get("FASTCNN_CACHE_DIR"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastcnn"


class Memory:
    """Choices by key, in a JSON file that may be missing, damaged or unwritable: then they last as long as the process.

    Several processes may share the file. It is replaced as a whole, so that none ever reads half of it.
    """

    def __init__(self, path: Callable[[], Path]) -> None:
        self._path = path
        self._known: dict[str, str] | None = None

    def get(self, key: str) -> str | None:
        if self._known is None:
            self._known = self._read()
        return self._known.get(key)

    def put(self, key: str, choice: str) -> None:
        self._known = {**self._read(), **(self._known or {}), key: choice}
        try:
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
                try:
                    json.dump(self._known, file, indent=1)
                    file.close()
                    os.replace(file.name, path)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.unlink(file.name)
                    raise
        except (OSError, RuntimeError) as error:
            warnings.warn(f"fastcnn cannot remember what it tuned: {error}", RuntimeWarning, stacklevel=2)

    def _read(self) -> dict[str, str]:
        try:
            known = json.loads(self._path().read_text())
        except (OSError, RuntimeError, ValueError):
            return {}
        if not isinstance(known, dict):
            return {}
        return {key: choice for key, choice in known.items() if isinstance(choice, str)}


class Tuner:
    """Chooses among candidates, each a name and a function of the same arguments.

    Args:
        memory: what was chosen before.
        milliseconds: measures a function without arguments.
    """

    def __init__(self, memory: Memory, milliseconds: Callable[[Callable[[], Any]], float]) -> None:
        self._memory, self._milliseconds = memory, milliseconds
        self._chosen: dict[str, str] = {}  # also what is not worth remembering longer

    def known(self, key: str, candidates: Collection[str]) -> str | None:
        """What was chosen for this key, if it still is a candidate."""
        choice = self._chosen.get(key) or self._memory.get(key)
        return choice if choice in candidates else None

    def choose(
        self,
        key: str,
        candidates: Mapping[str, Run],
        inputs: Callable[[], Sequence[tuple[Any, ...]]],
        tolerance: float,
        *,
        only: Collection[str] = (),
        timed: bool = True,
    ) -> str:
        """The fastest of the candidates that are right.

        Args:
            key: what the choice depends on.
            candidates: the first is the truth.
            inputs: makes arguments on which every candidate must agree with the truth; it is timed on the first.
            tolerance: the error ``||out - truth|| / ||truth||`` that is allowed.
            only: the candidates among which to choose; all. Where none of them is right, the truth is chosen.
            timed: take the fastest, not the first.
        """
        choice = self.known(key, candidates)
        if choice is None:
            times, enough_memory = self._try_all(candidates, inputs, tolerance, only or candidates, timed)
            torch.cuda.empty_cache()
            choice = min(times, key=times.__getitem__) if times else next(iter(candidates))
            self._chosen[key] = choice
            if enough_memory:  # or another might win next time
                self._memory.put(key, choice)
        return choice

    def _try_all(
        self,
        candidates: Mapping[str, Run],
        inputs: Callable[[], Sequence[tuple[Any, ...]]],
        tolerance: float,
        only: Collection[str],
        timed: bool,
    ) -> tuple[dict[str, float], bool]:
        """Milliseconds of those that are right, and whether there was memory enough for all."""
        times: dict[str, float] = {}
        enough_memory = True
        truth = next(iter(candidates.values()))
        try:
            checks = [(args, truth(*args)) for args in inputs()]
        except torch.OutOfMemoryError:
            return times, False
        for name in only:
            run = candidates[name]
            try:
                if run is truth or all(agree(run(*args), expected, tolerance) for args, expected in checks):
                    times[name] = self._milliseconds(functools.partial(run, *checks[0][0])) if timed else 0.0
                    if not timed:
                        break
            except torch.OutOfMemoryError:
                enough_memory = False
                torch.cuda.empty_cache()
            except Exception as error:  # too much shared memory, say, or a compiler that gives up
                _log.debug("%s is passed over: %s", name, error)
        return times, enough_memory


def agree(output: Tensor, truth: Tensor, tolerance: float) -> bool:
    """Whether NaN is in the same places, the error in norm is within the tolerance, and no element stands out."""
    nan = truth.isnan()
    if output.shape != truth.shape or output.dtype != truth.dtype or not torch.equal(output.isnan(), nan):
        return False
    truth = truth.float().masked_fill(nan, 0)
    error = output.float().masked_fill(nan, 0).sub_(truth)
    if not bool(error.norm() <= tolerance * truth.norm()):
        return False
    return truth.numel() == 0 or bool(error.abs().max() <= _OUTLIER * tolerance * truth.abs().max())


def milliseconds(run: Callable[[], Any], rounds: int = 10) -> float:
    """The median time of ``run`` on the current CUDA stream."""
    for _ in range(3):
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in itertools.pairwise(marks))
