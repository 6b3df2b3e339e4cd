"""The steps of a run: batches in, weights changed. Where it stands is ``epoch``, ``step`` and what it has learned."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..bench.environment import environment
from ..data import Batch, Dataset, ImageError
from ..data.order import Stream
from .checkpoints import State, Tensors
from .evaluation import Evaluation, evaluate
from .job import Job, seed_of

AUXILIARY = 0.3  # weight of the losses of InceptionV1's heads, as in its paper


class Trainer:
    """A run, as far as it has come.

    Args:
        job: its settings.
        splits: of its data set.
        trained: a network whose layers it begins with, see ``start_from`` of VGG.
        workers: processes that read pictures; None for the loader's default.
        device: where it runs.

    Attributes:
        model: in training mode, on the device.
        environment: what the bits of a run depend on besides its settings.
        epoch, step: how many epochs are done, and how many steps of the next one.
        validations: of the epochs that are done, and at which step each ended.
    """

    def __init__(
        self,
        job: Job,
        splits: Mapping[str, Dataset],
        *,
        trained: nn.Module | None = None,
        workers: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.job, self.recipe, self.device = job, job.recipe, torch.device(device)
        format = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        self.model = job.build_model(trained).to(self.device, memory_format=format)  # type: ignore[call-overload]
        self.optimizer = self._new_optimizer()
        self.batches = job.loader(splits["train"], training=True, workers=workers, device=self.device)
        self.to_validate = None
        if "validation" in splits:
            self.to_validate = job.loader(splits["validation"], training=False, workers=workers, device=self.device)
        self.environment = {**environment(self.device.type), "FASTCNN_BACKEND": os.environ.get("FASTCNN_BACKEND")}
        self.epoch = self.step = 0
        self.validations: list[tuple[int, Evaluation | None]] = []

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return len(self.batches)

    @property
    def steps_done(self) -> int:
        """Since the beginning of the run."""
        return self.epoch * self.steps + self.step

    @property
    def lr(self) -> float:
        """Of the next step, of most weights."""
        return self.recipe.lr * self._schedule() * self.recipe.warmup_factor(self.steps_done)

    @property
    def best(self) -> int | None:
        """How many steps were done when validation was best, the first of equals; None if there was none."""
        found = [(evaluation.top1, -step) for step, evaluation in self.validations if evaluation is not None]
        return -max(found)[1] if found else None

    def rest_of_epoch(self) -> Iterator[Batch]:
        """Its batches, each to be given to :meth:`update` before the next is asked for.

        Raises:
            ImageError: none of the pictures of a batch can be read.
        """
        until, augment = self.recipe.noise_until, self.job.augmentation(self.batches.dataset, training=True)
        self.batches.augment = replace(augment, noise=0.0) if 0 < until <= self.epoch else augment
        for batch in self.batches.epoch(self.epoch, self.step):
            if not len(batch.labels):
                why = list(self.batches.skipped.values())[-1]
                raise ImageError(f"step {self.steps_done + 1}: none of its pictures can be read. {why}")
            yield batch

    def update(self, batch: Batch) -> Tensor:
        """Make a step and return its loss."""
        self._set_learning_rates()
        self.optimizer.zero_grad(set_to_none=True)
        parts = min(self.recipe.accumulate, len(batch.labels))
        loss = torch.zeros((), device=self.device)
        images, labels = (tensor.tensor_split(parts) for tensor in (batch.images, batch.labels))
        for part, (some, their) in enumerate(zip(images, labels, strict=True)):
            index = self.step * self.recipe.accumulate + part
            torch.manual_seed(seed_of(self.job.seed, Stream.DROPOUT, self.epoch, index))
            with self.job.autocast(self.device):
                share = self._loss(self.model(some), their) / len(batch.labels)
            share.backward()
            loss = loss + share.detach()
        self.optimizer.step()
        self.step += 1
        return loss

    def validate(self, stop: Callable[[], bool]) -> Evaluation | None:
        """Of the pictures for validation, of which there must be some; None if it was stopped."""
        assert self.to_validate is not None
        batches, device = self.to_validate.epoch(0), self.device
        return evaluate(self.model, batches, autocast=lambda: self.job.autocast(device), stop=stop)

    def end_epoch(self, evaluation: Evaluation | None) -> None:
        """After its last step, with what validation has found, if there is one."""
        self.validations.append((self.steps_done, evaluation))
        self.epoch, self.step = self.epoch + 1, 0

    def is_finite(self) -> bool:
        """Whether all weights are numbers."""
        return all(bool(tensor.isfinite().all()) for tensor in self.model.state_dict().values())

    def tensors(self) -> Tensors:
        """For a checkpoint: those of the model, and those of the optimizer by parameter."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        optimizer = {
            f"{names[parameter]}.{key}": value
            for parameter, state in self.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        return {"model": self.model.state_dict(), "optimizer": optimizer}

    def state(self) -> State:
        """For a checkpoint: the rest."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "steps_done": self.steps_done,
            "best": self.best,
            "validations": [(step, found and asdict(found)) for step, found in self.validations],
            "skipped": {str(index): why for index, why in self.batches.skipped.items()},
            "job": self.job.to_json(),
            "recipe_hash": self.recipe.digest(),
            "environment": self.environment,
        }

    def load(self, state: State, tensors: Tensors) -> None:
        """Go on from a checkpoint.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: it is not one of such a run.
        """
        self.model.load_state_dict(dict(tensors["model"]))
        parameters = dict(self.model.named_parameters())
        for name, value in tensors["optimizer"].items():
            parameter, key = name.rsplit(".", 1)
            own = parameters[parameter]
            if value.dim() and value.shape != own.shape:
                raise ValueError(f"{name} of the optimizer is {tuple(value.shape)}, not {tuple(own.shape)}")
            like = torch.empty_like(own) if value.dim() else torch.empty_like(value, device=own.device)
            self.optimizer.state[own][key] = like.copy_(value)
        self.epoch, self.step = state["epoch"], state["step"]
        self.validations = [(step, found and Evaluation(**found)) for step, found in state["validations"]]
        self.batches.skipped.update({int(index): why for index, why in state["skipped"].items()})
        if not (0 <= self.epoch <= self.recipe.epochs and 0 <= self.step <= self.steps) or (
            self.steps_done != state["steps_done"] or len(self.validations) != self.epoch
        ):
            raise ValueError(f"step {self.step} of epoch {self.epoch} is not a place in this run")

    def _loss(self, output: Any, labels: Tensor) -> Tensor:
        """The sum over the pictures."""
        logits, *heads = output if isinstance(output, tuple) else (output,)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        for head in heads:
            loss = loss + AUXILIARY * F.cross_entropy(head, labels, reduction="sum")
        return loss

    def _schedule(self) -> float:
        plateau = self.recipe.schedule == "plateau"
        errors = [1 - found.top1 for _, found in self.validations if plateau and found is not None]
        return self.recipe.lr_factor(self.epoch, self.step, self.steps, errors)

    def _set_learning_rates(self) -> None:
        recipe = self.recipe
        warmed, schedule = recipe.lr * recipe.warmup_factor(self.steps_done), self._schedule()
        for group in self.optimizer.param_groups:
            lr = warmed
            if not group["bias"] or recipe.drop_biases:
                lr *= schedule
            if group["bias"]:
                lr *= recipe.bias_lr
            if group["first"]:
                lr *= recipe.conv1_factor(self.epoch)
            group["lr"] = lr

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """With the parameters in groups of equal learning rate and weight decay."""
        recipe = self.recipe
        first = next(module for module in self.model.modules() if isinstance(module, nn.Conv2d))
        own = list(first.parameters())
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in self.model.parameters():
            key = parameter.dim() < 2, any(parameter is p for p in own)
            groups.setdefault(key, []).append(parameter)
        options = [
            {
                "params": parameters,
                "bias": bias,
                "first": is_first,
                "weight_decay": recipe.weight_decay if recipe.decay_biases or not bias else 0.0,
            }
            for (bias, is_first), parameters in groups.items()
        ]
        if recipe.optimizer == "adam":
            return torch.optim.Adam(options, lr=recipe.lr, betas=(recipe.momentum, 0.999), fused=True)
        return torch.optim.SGD(options, lr=recipe.lr, momentum=recipe.momentum, fused=True)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device of this name, or the GPU if there is one.

    Raises:
        ValueError: it is neither a CPU nor a GPU, or there is none here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu or cuda, not {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, not {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r}: there are {torch.cuda.device_count()} GPUs here that torch can use")
    return chosen
