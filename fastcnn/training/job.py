"""What is trained on what: the settings of a run, which never change, and what is built from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from ..data import Augmentation, Dataset, Loader, Statistics, loader, measure
from ..data.order import Stream, random_words
from ..data.workers import integer
from ..models import Preprocessing, create_model
from ..models.layers import PaperDropout
from ..models.preprocessing import short_side
from .recipes import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}


@dataclass(frozen=True)
class Job:
    """The settings of a run.

    Args:
        data: the source of the data set: its name, or its path, which is absolute.
        model: its name.
        recipe: how it is trained.
        options: further options of the model.
        width: factor of its channels, see :class:`fastcnn.models.ConvNet`.
        input_size: height and width of its images.
        seed: of the weights, the order, augmentation and dropout.
        plain: whether it is built of torch's layers.
        start_from: the run of VGG's configuration A whose layers a deeper one starts from; empty for none.
        classes: their names, by label.
        fingerprints: of the splits.
        statistics: of the pixels of the training split.
    """

    data: str
    model: str
    recipe: Recipe
    options: Mapping[str, Any]
    width: float
    input_size: int
    seed: int
    plain: bool
    start_from: str
    classes: tuple[str, ...]
    fingerprints: Mapping[str, str]
    statistics: Statistics

    def to_json(self) -> dict[str, Any]:
        """Of dictionaries, lists, strings and numbers."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        sums = {field.name: getattr(self.statistics, field.name) for field in fields(self.statistics)}
        return {**own, "recipe": self.recipe.to_json(), "statistics": sums}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Job:
        """Back from :meth:`to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is not that of a run.
        """
        own = {field.name: content[field.name] for field in fields(cls)}
        own["recipe"] = Recipe.from_json(own["recipe"])
        own["statistics"] = Statistics.from_json(own["statistics"])
        own["classes"] = tuple(own["classes"])
        return cls(**own)

    def settings(self) -> dict[str, Any]:
        """What a caller may have chosen, by name, those of the recipe among them."""
        own = {name: getattr(self, name) for name in SETTINGS if name != "recipe"}
        recipe = {field.name: getattr(self.recipe, field.name) for field in fields(self.recipe)}
        return {**own, "recipe": recipe.pop("name"), **recipe}

    def build_model(self, trained: nn.Module | None = None) -> nn.Module:
        """The model as it is before the first step, on the CPU; torch's generator stays as it is.

        Raises:
            TypeError, ValueError: as :func:`fastcnn.models.create_model`.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, Stream.INIT))
            model = self.new_model(trained)
        return model.to(DTYPES[self.recipe.precision])

    def new_model(self, trained: nn.Module | None = None) -> nn.Module:
        """The model with weights from torch's generator, on the default device, in the default dtype."""
        options = dict(self.options)
        if self.width != 1:
            options["width"] = self.width
        if trained is not None:
            options["start_from"] = trained
        model = create_model(
            self.model,
            num_classes=len(self.classes),
            input_size=self.input_size or None,
            dropout=self.recipe.dropout,
            init=self.recipe.init,
            plain=self.plain,
            **options,
        )
        for module in model.modules():
            if isinstance(module, nn.Dropout | PaperDropout):
                module.p = self.recipe.dropout_p
        return model

    def augmentation(self, dataset: Dataset, *, training: bool) -> Augmentation:
        """What is done to the pictures of a data set in training, or for evaluation."""
        crop, recipe, dtype = self.input_size, self.recipe, DTYPES[self.recipe.precision]
        jitter = _jitter(recipe, crop)
        if not jitter and dataset.shape is not None and min(dataset.shape) != short_side(crop):
            jitter = (short_side(crop), short_side(crop))
        unit = recipe.pixels == "unit"
        return Augmentation(
            crop,
            random=training,
            mirror=recipe.mirror,
            mean=self.statistics.mean,
            std=_positive(self.statistics.std) if unit else (1.0, 1.0, 1.0),
            noise=recipe.noise if training else 0.0,
            statistics=self.statistics,
            jitter=(jitter[0], jitter[1]) if jitter else None,
            dtype=dtype,
            memory_format=torch.channels_last if recipe.channels_last else torch.contiguous_format,
        )

    def loader(
        self, dataset: Dataset, *, training: bool, batch: int | None = None, workers: int | None, device: torch.device
    ) -> Loader:
        """Its batches, as images for the model. Pictures of different sizes are made squares as large as is needed."""
        batch, sides = batch or self.recipe.batch, _jitter(self.recipe, self.input_size)
        return loader(
            dataset,
            batch,
            augment=self.augmentation(dataset, training=training),
            size=None if dataset.shape else max(sides, default=short_side(self.input_size)),
            shuffle=training,
            drop_last=training and len(dataset) >= batch,  # of one picture there is no batch norm
            seed=self.seed,
            workers=workers,
            device=device,
        )

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """The context of a forward."""
        return torch.autocast(device.type, torch.bfloat16) if self.recipe.precision == "bf16" else nullcontext()

    def preprocessing(self) -> Preprocessing:
        """What the trained model expects of pictures."""
        std = _positive(self.statistics.std) if self.recipe.pixels == "unit" else (1.0, 1.0, 1.0)
        return Preprocessing("the run's", "RGB", 1.0, self.statistics.mean, std)


SETTINGS = ("data", "model", "recipe", "options", "width", "input_size", "seed", "plain", "start_from")
_DEFAULTS: dict[str, Any] = {"options": {}, "width": 1.0, "seed": 0, "plain": False, "start_from": ""}


def new_job(
    model: str,
    recipe: Recipe,
    splits: Mapping[str, Dataset],
    *,
    trained: nn.Module | None = None,
    workers: int | None = None,
    **given: Any,
) -> Job:
    """A run that begins.

    Args:
        model, recipe: as for :class:`Job`.
        splits: of the data set.
        trained: the network of ``start_from``.
        workers: processes that read the training pictures, if their statistics are not known yet.
        given: other settings; None for those that have their default.

    Raises:
        TypeError, ValueError: an argument is not what it should be.
    """
    chosen = {**_DEFAULTS, **{name: value for name, value in given.items() if value is not None}}
    training = splits["train"]
    for name, split in splits.items():
        if split.classes != training.classes:
            raise ValueError(f"train(): the classes of {name} are not those of training")
    if not isinstance(chosen["options"], Mapping):
        raise TypeError(f"train(): options must be a dictionary, not {type(chosen['options']).__name__}")
    if recipe.schedule == "plateau" and "validation" not in splits:
        raise ValueError(f"train(): {training.source} has no split for validation, which the schedule 'plateau' needs")
    seed = chosen["seed"] = integer("seed", chosen["seed"])
    if not 0 <= seed < 2**64:
        raise ValueError(f"train(): seed must be from 0 to 2**64 - 1, but got seed={seed}")
    size = chosen.get("input_size", 1)
    if integer("input_size", size) < 1:
        raise ValueError(f"train(): input_size must be at least 1, but got input_size={size}")
    chosen.setdefault("input_size", 0)
    if own := chosen["options"].keys() & {*SETTINGS, *(field.name for field in fields(Recipe)), "num_classes"}:
        raise TypeError(f"train(): options of the model that have a setting of their own: {', '.join(sorted(own))}")
    json.dumps(chosen)  # raises TypeError for what cannot be written down
    unmeasured = Job(
        data=training.source,
        model=model,
        recipe=recipe,
        classes=training.classes,
        fingerprints={name: split.fingerprint() for name, split in splits.items()},
        statistics=training.statistics or Statistics(),
        **chosen,
    )
    with torch.device("meta") if trained is None else torch.random.fork_rng(devices=[]):
        network: Any = unmeasured.new_model(trained)  # raises for what models refuse, before anything takes long
    job = replace(unmeasured, input_size=network.input_size)
    if training.statistics is None:
        job = replace(job, statistics=measure(training, workers=workers))
    return job


def seed_of(seed: int, stream: Stream, epoch: int = 0, index: int = 0) -> int:
    """For a generator of torch: 63 random bits."""
    first, second = random_words(seed, epoch, torch.tensor([index], device="cpu"), stream)[0, :2].tolist()
    return (first << 31) | (second >> 1)


def _jitter(recipe: Recipe, crop: int) -> tuple[int, ...]:
    return tuple(max(crop, round(side * crop / 224)) for side in recipe.jitter)


def _positive(std: tuple[float, float, float]) -> tuple[float, float, float]:
    """With 1 in place of the deviation of a channel that never changes."""
    r, g, b = (value or 1.0 for value in std)
    return r, g, b
