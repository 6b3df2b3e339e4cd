"""Data sets, the batches that training takes from them, and pictures from files."""

from pathlib import Path

import torch
from torch import Tensor

from .augment import Augmentation
from .colours import Statistics
from .dataset import Dataset
from .images import ImageError, read_image, to_rgb
from .loading import Batch, Loader, loader, measure
from .order import Order, epoch_order
from .packing import pack
from .sources import open_dataset, open_splits

__all__ = [
    "Augmentation",
    "Batch",
    "Dataset",
    "ImageError",
    "Loader",
    "Order",
    "Statistics",
    "epoch_order",
    "loader",
    "measure",
    "open_dataset",
    "open_splits",
    "pack",
    "photographs",
    "read_image",
    "to_rgb",
]


def photographs(size: int = 227) -> Tensor:
    """Four real photographs: an astronaut, a cat, a cup of coffee, a rocket.

    They ship with the package and are in the public domain; ``photographs/SOURCES.md`` beside this file names title,
    author and licence of each. The short side is scaled to ``size`` and the centre cropped.

    Args:
        size: height and width of the crops, in pixels. The photographs have 300 to 320 on their short side.

    Returns:
        uint8 tensor of shape (4, 3, size, size), channels in the order red, green, blue.

    Raises:
        ImportError: Pillow is not installed (it comes with ``fastcnn[bench]``).
        ValueError: ``size`` is not positive.
    """
    if size <= 0:
        raise ValueError(f"photographs(): size must be greater than zero, but got size={size}")
    import numpy
    from PIL.Image import Resampling
    from PIL.ImageOps import fit

    crops = []
    for path in sorted((Path(__file__).parent / "photographs").glob("*.jpg")):
        crop = fit(read_image(path), (size, size), Resampling.BICUBIC)
        crops.append(torch.from_numpy(numpy.array(crop)).permute(2, 0, 1))
    return torch.stack(crops)
