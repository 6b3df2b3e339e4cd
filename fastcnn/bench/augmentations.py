"""Augmentation by others: what training scripts write with Pillow, numpy, torch and torchvision."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .. import data, reference
from ..data.augment import choices, normal_deviates
from ..functional import augment
from .cases import FORMATS, Case, Shape
from .workload import NotInstalled

MEAN = (123.68, 116.78, 103.94)  # of ImageNet's pixels: red, green, blue
_SIDES = {"augment": (227, 256), "augment_resized": (224, 256)}  # of the crops, for pictures of this side

# Of pictures, offsets, mirror, mean, sizes, the crops' side, the result's dtype and memory format.
Augmenting = Callable[..., Tensor]


def pictures(shape: Shape, source: str, device: str) -> Tensor:
    """Bytes of shape (N, H, W, C): random ones, or the photographs, repeated at need."""
    n, c, h, w = shape
    if source == "random":
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (n, h, w, c), dtype=torch.uint8, generator=generator).to(device)
    photographs = data.photographs(max(h, w))[:, :, :h, :w].permute(0, 2, 3, 1)
    return photographs.repeat(-(-n // len(photographs)), 1, 1, 1)[:n].contiguous().to(device)


def crop_side(case: Case) -> int:
    """227 pixels for AlexNet's pictures of 256, 224 for VGG's, in proportion for others."""
    crop, side = _SIDES[case.op]
    return max(1, crop * min(case.shape[2:]) // side)


def arguments(case: Case, dtype: torch.dtype) -> tuple[Any, ...]:
    """What is drawn for each picture, as training draws it; the colour noise, of 10 levels, is part of the mean."""
    crop, side = crop_side(case), min(case.shape[2:])
    jitter = (side, 2 * side) if case.op == "augment_resized" else None
    indices = torch.arange(case.shape[0])
    made = choices(0, 0, indices, case.shape[2:], crop, jitter)
    mean = torch.tensor(MEAN) - 10 * normal_deviates(0, 0, indices).float()
    return made.offsets, made.mirror, mean, made.sizes, crop, dtype, FORMATS[case.format]


def output_shape(case: Case) -> Shape:
    return case.shape[0], 3, crop_side(case), crop_side(case)


def bytes_moved(case: Case, element_size: int) -> int:
    """One byte read per element that is written; of resized pictures as many as the crop has on average."""
    n, c, h, w = output_shape(case)
    pixels = n * h * w
    if case.op == "augment_resized":
        sizes = arguments(case, torch.float32)[3]
        pixels = int((torch.tensor([h, w]) * torch.tensor(case.shape[2:]) / sizes).prod(1).sum())
    return c * (pixels + n * h * w * element_size)


def _of(function: Callable[..., Tensor], x: Tensor, *given: Any) -> Tensor:
    """Of as many of the pictures that were drawn for as there are."""
    *choices, crop, dtype, format = given
    first = (None if t is None else t[: len(x)] for t in choices)
    return function(x, *first, crop=crop, dtype=dtype, memory_format=format)


ours: Augmenting = partial(_of, augment)
in_plain_torch: Augmenting = partial(_of, reference.augment)


def in_torch(
    x: Tensor,
    offsets: Tensor,
    mirror: Tensor,
    mean: Tensor,
    sizes: Tensor | None,
    crop: int,
    dtype: torch.dtype,
    format: torch.memory_format,
) -> Tensor:
    """Picture by picture into one output; resized in bytes, as images are."""
    y = torch.empty((len(x), 3, crop, crop), dtype=dtype, device=x.device, memory_format=format)
    mean = mean.to(x.device)[:, :, None, None]
    for i, (picture, (top, left), mirrored) in enumerate(zip(x, offsets.tolist(), mirror.tolist(), strict=True)):
        part = picture[None].permute(0, 3, 1, 2)  # in these strides torch resizes bytes the fastest
        if sizes is not None:
            part = interpolate(part, sizes[i].tolist(), mode="bilinear", antialias=True)
        part = part[0, :, top : top + crop, left : left + crop]
        part = part.flip(-1) if mirrored else part
        if dtype == torch.float32:
            torch.sub(part, mean[i], out=y[i])
        else:
            y[i].copy_(part - mean[i])
    return y


def by_pillow(
    x: Tensor, offsets: Tensor, mirror: Tensor, mean: Tensor, sizes: Tensor | None, crop: int, *_: Any
) -> Tensor:
    """numpy's slices; Pillow resizes."""
    import numpy

    y = numpy.empty((len(x), crop, crop, 3), numpy.float32)
    each = zip(x.numpy(), offsets.tolist(), mirror.tolist(), strict=True)
    for i, (picture, (top, left), mirrored) in enumerate(each):
        if sizes is not None:
            picture = _resized(picture, sizes[i].tolist())
        part = picture[top : top + crop, left : left + crop]
        numpy.subtract(part[:, ::-1] if mirrored else part, mean[i].numpy(), out=y[i])
    return torch.from_numpy(y).permute(0, 3, 1, 2)


def _resized(picture: Any, size: list[int]) -> Any:
    import numpy
    from PIL import Image

    return numpy.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR))


def by_torchvision(
    x: Tensor, offsets: Tensor, mirror: Tensor, mean: Tensor, sizes: Tensor | None, crop: int, *_: Any
) -> Tensor:
    """Picture by picture."""
    F = _torchvision()
    results = []
    for i, (picture, (top, left), mirrored) in enumerate(zip(x, offsets.tolist(), mirror.tolist(), strict=True)):
        part = picture[None].permute(0, 3, 1, 2)
        if sizes is not None:
            part = F.resize(part, sizes[i].tolist(), antialias=True)
        part = F.crop(part, top, left, crop, crop)
        part = F.horizontal_flip(part) if mirrored else part
        results.append(F.normalize(F.to_dtype(part, torch.float32), mean[i].tolist(), _ONE, inplace=True))
    return torch.cat(results)


def by_torchvision_at_once(
    x: Tensor, offsets: Tensor, mirror: Tensor, mean: Tensor, sizes: Tensor | None, crop: int, *_: Any
) -> Tensor:
    """The batch as a whole, which gets the choices of its first picture: a lower bound."""
    F, (top, left) = _torchvision(), offsets[0].tolist()
    batch = x.permute(0, 3, 1, 2)
    if sizes is not None:
        batch = F.resize(batch, sizes[0].tolist(), antialias=True)
    batch = F.crop(batch, top, left, crop, crop)
    batch = F.horizontal_flip(batch) if mirror[0] else batch
    return F.normalize(F.to_dtype(batch, torch.float32), mean[0].tolist(), _ONE, inplace=True)


_ONE = [1.0, 1.0, 1.0]


@lru_cache(maxsize=1)
def _torchvision() -> Any:
    try:
        from torchvision.transforms.v2 import functional
    except ImportError as error:
        raise NotInstalled(f"not installed: {error}") from None
    return functional
