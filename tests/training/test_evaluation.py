"""Evaluation: what it counts, and what it shows the network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastcnn.data import Batch
from fastcnn.training import RECIPES, evaluate
from fastcnn.training.job import new_job

from .data import splits


def test_evaluation_counts_ranks_as_defined() -> None:
    logits = torch.tensor(
        [[3.0, 2, 1, 0, -1, -2], [3, 2, 1, 0, -1, -2], [1, 1, 1, 1, 1, 1], [0, 0, torch.nan, 0, 0, 0]]
    )
    labels = torch.tensor([0, 4, 0, 2])
    model = torch.nn.Identity()
    found = evaluate(model, [Batch(logits[:3], labels[:3], labels[:3])])
    assert found is not None
    assert (found.pictures, found.top1, found.top5) == (3, 1 / 3, 2 / 3)
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits[:3], labels[:3]).item())
    broken = evaluate(model, [Batch(logits[3:], labels[3:], labels[3:])])
    assert broken is not None
    assert broken.top1 == broken.top5 == 0
    with pytest.raises(ValueError, match="no pictures"):
        evaluate(model, [])


@pytest.mark.parametrize("recipe", ["alexnet-paper", "vgg-paper"])
def test_the_network_is_shown_centre_crops_without_noise(recipe: str) -> None:
    data = splits()["validation"]
    job = new_job("vgg_a", replace(RECIPES[recipe], batch=12), splits(), width=0.02, input_size=56)
    loader = job.loader(data, training=False, workers=0, device=torch.device("cpu"))
    (batch,) = loader.epoch(0)
    (again,) = loader.epoch(1)
    assert torch.equal(batch.images, again.images)
    assert batch.indices.tolist() == list(range(12))
    pictures = data.arrays[0]
    crop = job.augmentation(data, training=False)
    indices = torch.arange(12)
    torch.testing.assert_close(crop(pictures.flip(2), 0, 0, indices), crop(pictures, 0, 0, indices).flip(3))
    torch.testing.assert_close(crop(pictures.flip(1), 0, 0, indices), crop(pictures, 0, 0, indices).flip(2))
