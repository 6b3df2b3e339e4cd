"""Where a run starts: from its settings, or from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ..data import Dataset, open_splits
from ..data.dataset import SPLITS
from . import checkpoints
from .job import SETTINGS, Job, new_job
from .recipes import RECIPES, Recipe, checked, text_of
from .saved import choose_checkpoint, load_model, read_job
from .trainer import Trainer


def start(given: Mapping[str, Any], workers: int | None, device: torch.device) -> Trainer:
    """A run before its first step.

    Args:
        given: settings by name, as for :func:`fastcnn.training.train`, without those that are None.
        workers: processes that read pictures; None for the loader's default.
        device: where it runs.

    Raises:
        TypeError, ValueError: a setting is missing, or is not what it should be.
    """
    missing = [name for name in ("data", "model") if name not in given]
    if missing:
        raise TypeError(f"train(): missing: {', '.join(missing)}")
    recipe = given.get("recipe", "plain")
    if not isinstance(recipe, Recipe):
        if recipe not in RECIPES:
            raise ValueError(f"train(): recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
        recipe = RECIPES[recipe]
    recipe = replace(recipe, **_of_recipe(given))
    splits = _splits(given["data"])
    trained = load_model(given["start_from"]) if given.get("start_from") else None
    settings = {name: given.get(name) for name in SETTINGS if name not in ("data", "model", "recipe")}
    job = new_job(given["model"], recipe, splits, trained=trained, workers=workers, **settings)
    return Trainer(job, splits, trained=trained, workers=workers, device=device)


def restore(
    out: Path, given: Mapping[str, Any], workers: int | None, device: torch.device
) -> tuple[Trainer, list[str]]:
    """The run in a folder, as its newest checkpoint has it; and notes on what is different now.

    Args:
        out: the folder.
        given, workers, device: as for :func:`start`; settings that are given must be the run's.

    Raises:
        FileNotFoundError: a file of the checkpoint or the data set is missing.
        RuntimeError: the checkpoint is damaged, or is of another run.
        ValueError: a setting is not the run's; the message names it.
    """
    checkpoint = choose_checkpoint(out, "newest")
    state, job = read_job(checkpoint)
    _check_is_one_run(out, state)
    _check_same(job, given)
    splits = _splits(given.get("data", job.data))
    if (found := {name: split.fingerprint() for name, split in splits.items()}) != job.fingerprints:
        changed = [name for name in {**job.fingerprints, **found} if found.get(name) != job.fingerprints.get(name)]
        raise ValueError(
            f"train(): data={splits['train'].source!r} is not what the run was begun with ({job.data!r}): "
            f"other pictures, labels or classes for {', '.join(changed)}"
        )
    tensors = {name: checkpoints.read_tensors(checkpoint, name, state) for name in ("model", "optimizer")}
    try:
        trainer = Trainer(job, splits, workers=workers, device=device)
        trainer.load(state, tensors)
        then, now = state["environment"], trainer.environment
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RuntimeError(f"{checkpoint}: does not fit the settings of its run: {error}") from None
    return trainer, [
        f"{name} is {now.get(name)} and was {then.get(name)}: the results may not be the same to the bit"
        for name in {**then, **now}
        if now.get(name) != then.get(name)
    ]


def _check_is_one_run(out: Path, state: checkpoints.State) -> None:
    """Raise RuntimeError if another run's checkpoint is in the folder."""
    for other in checkpoints.list_checkpoints(out).values():
        try:
            job = checkpoints.read_state(other)["job"]
        except (OSError, RuntimeError):  # damaged, and not needed
            continue
        if job != state["job"]:
            raise RuntimeError(f"{out}: step-{state['steps_done']} and {other.name} are of different runs")


def _check_same(job: Job, given: Mapping[str, Any]) -> None:
    """Raise ValueError if settings are given that are not those of the run. Data are compared by what is in them."""
    recipe = given.get("recipe")
    wanted = {name: value for name, value in given.items() if name in SETTINGS and name not in ("data", "recipe")}
    if isinstance(recipe, Recipe):
        wanted |= {field.name: getattr(recipe, field.name) for field in fields(recipe)}
        wanted["recipe"] = wanted.pop("name")
    elif recipe is not None:
        wanted["recipe"] = recipe
    wanted |= {name: checked(name, value) for name, value in _of_recipe(given).items()}
    own = job.settings()
    different = [
        f"{name} is {text_of(own[name])}, not {text_of(value)}" for name, value in wanted.items() if own[name] != value
    ]
    if different:
        raise ValueError(f"train(): the run to resume has other settings: {'; '.join(different)}")


def _of_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(Recipe)}
    return {name: value for name, value in given.items() if name in names}


def _splits(data: str | Mapping[str, Dataset]) -> Mapping[str, Dataset]:
    if not isinstance(data, str | Mapping):
        raise TypeError(f"train(): data must be str or a dictionary of data sets, not {type(data).__name__}")
    splits = open_splits(data) if isinstance(data, str) else data
    if "train" not in splits or splits.keys() - set(SPLITS):
        raise ValueError(f"train(): the splits of data must be train and perhaps validation, not {', '.join(splits)}")
    return splits
