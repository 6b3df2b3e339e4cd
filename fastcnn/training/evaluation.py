"""How good a network is at a data set: the loss, and how often it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Batch


@dataclass(frozen=True)
class Evaluation:
    """Of ``pictures`` pictures: the mean loss, and the shares whose class is the most probable, or among the five most
    probable (all, if there are fewer), from 0 to 1. Classes of the same logit are all as probable as the last of them,
    so that a network that always says the same is not right."""

    pictures: int
    loss: float
    top1: float
    top5: float


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Run a model over batches, in evaluation mode.

    Args:
        model: from images to logits, on the device of the batches; its mode is restored.
        batches: of images that are ready for it.
        autocast: makes the context of the forward.
        stop: is asked after every batch; where it says yes, the result is None.

    Raises:
        ValueError: there are no pictures.
    """
    training = model.training
    model.eval()
    pictures, loss, top1, top5 = 0, 0.0, 0, 0
    try:
        for images, labels, _ in batches:
            if not len(labels):
                continue
            with torch.no_grad(), autocast():
                logits = model(images)
            if not logits.is_floating_point() or logits.dtype in (torch.bfloat16, torch.float16):
                logits = logits.float()
            pictures += len(labels)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            ranks = rank(logits, labels)
            top1, top5 = top1 + int((ranks < 1).sum()), top5 + int((ranks < 5).sum())
            if stop():
                return None
    finally:
        model.train(training)
    if not pictures:
        raise ValueError("evaluate(): there are no pictures")
    return Evaluation(pictures, loss / pictures, top1 / pictures, top5 / pictures)


def rank(logits: Tensor, labels: Tensor) -> Tensor:
    """How many other classes are as probable as that of the label, or more, or have no number; int64 of shape (n,)."""
    own = logits.gather(1, labels[:, None])
    return (~(logits < own)).sum(1) - 1
