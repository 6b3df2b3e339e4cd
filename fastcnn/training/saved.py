"""What a run has saved: its settings and its trained network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoints import STATE, State, list_checkpoints, read_state, read_tensors
from .job import DTYPES, Job


def choose_checkpoint(run: Path, which: str = "best") -> Path:
    """A checkpoint of a run: its "best" (the newest, if there was no validation), its "newest", or one by its name.

    Raises:
        FileNotFoundError: there is none, or it is not there any more.
        RuntimeError: the newest, which says which is the best, is damaged.
    """
    found = list_checkpoints(run)
    if not found:
        raise FileNotFoundError(f"{run}: there is no run: it has no checkpoint")
    newest = found[max(found)]
    if which == "newest":
        return newest
    names = {path.name: path for path in found.values()}
    if which == "best":
        best = read_state(newest)["best"]
        which = newest.name if best is None else f"step-{best}"
    if which not in names:
        raise FileNotFoundError(f"{run}: there is no checkpoint {which!r}, only {', '.join(names)}")
    return names[which]


def read_job(checkpoint: Path) -> tuple[State, Job]:
    """What is in ``state.json``, and the settings of the run.

    Raises:
        FileNotFoundError: it is missing.
        RuntimeError: it is damaged.
    """
    state = read_state(checkpoint)
    try:
        return state, Job.from_json(state["job"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(f"{checkpoint / STATE}: cannot be read: {error!r}") from None


def load_model(run: str | os.PathLike[str], which: str = "best") -> nn.Module:
    """The trained network of a run, in evaluation mode, on the CPU.

    Args:
        run: its folder.
        which: the checkpoint: "best", "newest", or its name.

    Returns:
        The network, whose attribute ``preprocessing`` is what the run does to pictures.

    Raises:
        FileNotFoundError: there is none.
        RuntimeError: it is damaged, or does not fit the settings of its run.
    """
    checkpoint = choose_checkpoint(Path(run), which)
    state, job = read_job(checkpoint)
    tensors = read_tensors(checkpoint, "model", state)
    try:
        with torch.device("meta"):
            model: Any = job.new_model()
        model = model.to_empty(device="cpu").to(DTYPES[job.recipe.precision])
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RuntimeError(f"{checkpoint}: does not fit the settings of its run: {error}") from None
    model.preprocessing = job.preprocessing()
    return model.eval()
