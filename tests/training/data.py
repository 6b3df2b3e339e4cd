"""A data set that can be learned: pictures of four brightnesses in a second, noise on them."""

from __future__ import annotations

from typing import Any

import torch

from fastcnn.data.dataset import Arrays

CLASSES = ("dark", "dim", "light", "bright")
SMALL: dict[str, Any] = {"model": "alexnet", "width": 0.02, "input_size": 67, "batch": 8, "epochs": 3}


def splits(train: int = 40, validation: int = 12, classes: tuple[str, ...] = CLASSES, seed: int = 0) -> dict[str, Any]:
    def split(name: str, count: int, seed: int) -> Arrays:
        labels = torch.arange(count) % len(classes)
        noise = torch.randint(0, 40, (count, 8, 8, 3), generator=torch.Generator().manual_seed(seed))
        pixels = (noise + 60 * labels[:, None, None, None]).clamp(max=255).to(torch.uint8)
        return Arrays("small", name, "all", classes, labels, [pixels])

    return {"train": split("train", train, seed), "validation": split("validation", validation, seed + 1)}
