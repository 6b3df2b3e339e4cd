"""How a network is trained: every number of it in one record, and those of the papers by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from math import inf
from sys import float_info
from typing import Any

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("steps", "plateau", "linear")
PIXELS = ("raw", "unit")
PRECISIONS = ("fp32", "bf16", "fp64")
MAX_INT = 10**9  # of whole numbers


def _field(default: Any, help: str, choices: Sequence[str] = (), at_least: float = 0) -> Any:
    """A field with its meaning, the values it may have if they are names, and its least value if it is a number."""
    return field(default=default, metadata={"help": help, "choices": choices, "at_least": at_least})


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; ``str()`` lists the fields with their meanings, which are also their options' help.

    The learning rate of a step is ``lr``, times what the schedule and the warm-up make of it, times ``bias_lr`` for
    biases and for batch norm's parameters. Epochs are counted from 0: a drop at epoch 25 is after 25 epochs.

    Raises:
        TypeError: a field is of another type.
        ValueError: a field has a value that is not allowed.
    """

    name: str = _field("plain", "the recipe that this is, or comes from")
    optimizer: str = _field("sgd", "SGD with momentum, or Adam", OPTIMIZERS)
    lr: float = _field(0.01, "initial learning rate")
    momentum: float = _field(0.9, "momentum of SGD, or beta1 of Adam")
    weight_decay: float = _field(5e-4, "added to the gradient, times the weight")
    decay_biases: bool = _field(False, "weight decay of biases and batch norm too")
    bias_lr: float = _field(1.0, "factor of the learning rate of biases and batch norm")
    drop_biases: bool = _field(True, "the schedule applies to biases and batch norm too")
    schedule: str = _field("steps", "how lr falls: at given epochs, when validation stalls, or to 0", SCHEDULES)
    drops: tuple[int, ...] = _field((), "with steps: epochs at which it falls, such as 25,51, or none", at_least=1)
    drop_factor: float = _field(0.1, "factor by which it falls, but for linear")
    patience: int = _field(5, "with plateau: epochs without a lower validation error before it falls", at_least=1)
    max_drops: int = _field(3, "with plateau: how often it falls at most")
    warmup: int = _field(0, "steps in which the learning rate rises to its value")
    slow_conv1: int = _field(0, "epoch from which conv1 learns a tenth as fast; 0 for never")
    stop_conv1: int = _field(0, "epoch from which conv1 does not learn; 0 for never")
    batch: int = _field(128, "pictures per step", at_least=1)
    accumulate: int = _field(1, "micro-batches per step, to save memory; their gradients are added", at_least=1)
    epochs: int = _field(90, "passes over the training set; the last partial batch is dropped", at_least=1)
    init: str = _field("kaiming", "how weights and biases are drawn; see the model")
    dropout: str = _field("inverted", "how dropout is scaled: as torch does or as in the paper", ("inverted", "paper"))
    dropout_p: float = _field(0.5, "probability of dropping a unit, in every dropout layer")
    pixels: str = _field("unit", "0 to 255 minus the mean, which is raw, or also divided by the deviation", PIXELS)
    mirror: bool = _field(True, "mirror half of the pictures")
    noise: float = _field(0.0, "standard deviation of AlexNet's colour noise")
    noise_until: int = _field(0, "epoch from which there is no colour noise; 0 for always")
    jitter: tuple[int, ...] = _field((), "range of the short side for crops of 224, such as 256,512, or none")
    precision: str = _field("fp32", "number format; bf16 is autocast", PRECISIONS)
    channels_last: bool = _field(True, "memory format of images and weights")

    def __post_init__(self) -> None:
        for entry in fields(self):
            object.__setattr__(self, entry.name, checked(entry.name, getattr(self, entry.name)))
        if self.accumulate > self.batch:
            raise ValueError(f"Recipe(): a batch of {self.batch} cannot be cut into {self.accumulate} parts")
        if list(self.drops) != sorted(set(self.drops)):
            raise ValueError(f"Recipe(): drops must be in ascending order, but got drops={self.drops}")
        if self.jitter and (len(self.jitter) != 2 or not 224 <= self.jitter[0] <= self.jitter[1]):
            raise ValueError(
                f"Recipe(): jitter must be two sizes in ascending order from 224 on, but got jitter={self.jitter}"
            )
        for name in ("momentum", "dropout_p", "drop_factor"):
            if not 0 <= getattr(self, name) <= 1 or (name == "momentum" and self.momentum == 1):
                raise ValueError(f"Recipe(): {name} is out of range: {name}={getattr(self, name)}")

    def __str__(self) -> str:
        shown = [(entry.name, text_of(getattr(self, entry.name)), entry.metadata["help"]) for entry in fields(self)]
        return "\n".join(f"{name:<14} {value:<14} {help}" for name, value, help in shown)

    def to_json(self) -> dict[str, Any]:
        """Of lists, strings, numbers."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Recipe:
        """Back from :meth:`to_json`.

        Raises:
            TypeError, ValueError: it is not complete, or as for the class.
        """
        names = {entry.name for entry in fields(cls)}
        if content.keys() != names:
            raise ValueError(f"not the fields of a recipe: {', '.join(sorted(content.keys() ^ names))}")
        return cls(**content)

    def digest(self) -> str:
        """A hash of all fields."""
        return sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def lr_factor(self, epoch: int, step: int, steps: int, errors: Sequence[float]) -> float:
        """What the schedule makes of the learning rate.

        Args:
            epoch, step: where the run stands: step ``step`` of ``steps`` of the epoch.
            errors: of validation, from 0 to 1, of the epochs so far.
        """
        if self.schedule == "linear":
            return 1 - (epoch * steps + step) / (self.epochs * steps)
        if self.schedule == "steps":
            return self.drop_factor ** sum(drop <= epoch for drop in self.drops)
        fallen, best, since = 0, inf, 0
        for error in errors:
            best, since = (error, 0) if error < best else (best, since + 1)
            if since == self.patience and fallen < self.max_drops:
                fallen, since = fallen + 1, 0
        return self.drop_factor**fallen

    def warmup_factor(self, step: int) -> float:
        """Of the learning rate, at a step counted from the beginning of the run."""
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0

    def conv1_factor(self, epoch: int) -> float:
        """Of conv1's learning rate."""
        if 0 < self.stop_conv1 <= epoch:
            return 0.0
        return 0.1 if 0 < self.slow_conv1 <= epoch else 1.0


def text_of(value: object) -> str:
    """A field's value, as it is shown."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) or "none"


def checked(name: str, value: Any) -> Any:
    """A value of a field, of the field's type.

    Raises:
        TypeError, ValueError: as for :class:`Recipe`.
    """
    entry: Any = Recipe.__dataclass_fields__[name]
    choices, least = entry.metadata["choices"], entry.metadata["at_least"]
    if entry.type == "float" and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INT:
        value = float(value)
    if entry.type == "tuple[int, ...]" and isinstance(value, list):
        value = tuple(value)
    kind: Any = {"float": float, "int": int, "bool": bool, "str": str, "tuple[int, ...]": tuple}[entry.type]
    if type(value) is not kind or (kind is tuple and any(type(item) is not int for item in value)):
        raise TypeError(f"Recipe(): {name} must be {entry.type}, not {value!r}")
    if choices and value not in choices:
        raise ValueError(f"Recipe(): {name} must be one of {', '.join(choices)}, but got {name}={value!r}")
    numbers: Sequence[float] = value if kind is tuple else [value] if kind in (int, float) else []
    most = float_info.max if kind is float else MAX_INT
    if not all(least <= number <= most for number in numbers):
        upwards = "and finite" if kind is float else f"and at most {MAX_INT:,}"
        raise ValueError(f"Recipe(): {name} must be at least {least:g} {upwards}, but got {name}={text_of(value)}")
    return value


_PAPER = Recipe(
    "alexnet-paper",
    schedule="plateau",
    init="paper",
    dropout="paper",
    pixels="raw",
    noise=0.1,
)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        _PAPER,
        replace(  # of the log in layer-params-145.cfg of the authors' code, the published net
            _PAPER,
            name="alexnet-as-run",
            bias_lr=2.0,
            drop_biases=False,
            schedule="steps",
            drops=(25, 51, 79),
            slow_conv1=67,
            stop_conv1=72,
            epochs=91,
            init="as_run",
            noise_until=67,
        ),
        Recipe("alexnet-caffe", bias_lr=2.0, drops=(20, 40, 60, 80), batch=256, init="caffe", pixels="raw"),
        Recipe(
            "vgg-paper",
            decay_biases=True,
            schedule="plateau",
            batch=256,
            epochs=74,
            init="glorot",  # which the paper found to need no pre-training
            pixels="raw",
            noise=0.1,
            jitter=(256, 512),
        ),
        Recipe("plain", lr=0.02, schedule="linear", warmup=100, batch=64, epochs=30, dropout_p=0.2, mirror=False),
    )
}
