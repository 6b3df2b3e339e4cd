"""What training does to pictures: new sizes, random crops, mirroring, colour noise, mean and scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, pi
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional
from ..params import MOST_RESIZED, AugmentParams
from .colours import Statistics, Triple
from .order import Stream, random_words
from .workers import integer


@dataclass(frozen=True)
class Augmentation:
    """From uint8 pictures to the input of a network: ``(crop(resize(pixels)) + noise - mean) * (1 / std)``.

    The crop's place, whether it is mirrored, its noise and its size are functions of (seed, epoch, index of the
    picture); see :func:`choices`. All else is the operator :func:`fastcnn.functional.augment`.

    The noise is that of the AlexNet paper, section 4.1, as the original code computes it: for each picture a colour is
    added to all its pixels, the sum over the principal components of the training set's colours (of pixels minus their
    mean) of ``a * deviation * vector``, ``a`` drawn anew from a normal distribution of standard deviation ``noise``,
    deviation the square root of the component's variance (the paper has the variance itself in its place).

    The jitter is that of the VGG paper, section 3.1: each picture is resized, bilinearly and antialiased, so that its
    short side has a length drawn from a range; the long side is rounded down.

    Args:
        crop: height and width of the crops, in pixels.
        random: crop at random places; otherwise crop the centre, and mirror none.
        mirror: whether half of the random crops are mirrored.
        mean, std: of each channel, from 0 to 255.
        noise: standard deviation of the colour noise; the paper's is 0.1.
        statistics: of the training set's pixels, for the noise.
        jitter: the least and the most pixels of the short side, the paper's are 256 and 512; None leaves pictures their
            size. Without ``random`` all short sides have the mean of the two, rounded down.
        dtype: of the result.
        memory_format: of the result.

    Raises:
        TypeError: ``crop`` or ``jitter`` is no integer, ``dtype`` has no fractions, or another type is wrong.
        NotImplementedError, RuntimeError: ``dtype`` or ``memory_format`` is none that the operator has.
        ValueError: ``crop`` or ``std`` is not positive, ``mean`` or ``std`` is not of three channels or not finite,
            ``noise`` is negative or not finite, there is noise without statistics, or ``jitter`` is not two sizes in
            ascending order, the first at least ``crop``, the second at most 16384.
    """

    crop: int
    random: bool = True
    mirror: bool = True
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    noise: float = 0.0
    statistics: Statistics | None = None
    jitter: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop", integer("crop", self.crop))
        if isinstance(self.dtype, torch.dtype) and not self.dtype.is_floating_point:
            raise TypeError(f"Augmentation(): dtype must be a floating-point dtype, not {self.dtype}")
        if self.crop < 1 or not 0 <= self.noise < inf:
            raise ValueError(
                f"Augmentation(): crop must be greater than zero and noise finite and not negative, but got "
                f"crop={self.crop}, noise={self.noise}"
            )
        AugmentParams(self.crop, dtype=self.dtype, memory_format=self.memory_format)  # raises for what it refuses
        usable = len(self.mean) == len(self.std) == 3 and all(map(isfinite, self.mean))
        if not usable or not all(0 < std < inf for std in self.std):
            raise ValueError(
                f"Augmentation(): mean and std must be finite, of three channels, and std positive, but got "
                f"mean={self.mean}, std={self.std}"
            )
        if self.noise and self.statistics is None:
            raise ValueError("Augmentation(): noise needs the statistics of the training set")
        if self.jitter is not None:
            least, most = jitter = _two("jitter", self.jitter)
            if not self.crop <= least <= most <= MOST_RESIZED:
                raise ValueError(
                    "Augmentation(): jitter must be two sizes in ascending order, the first at least the crop, the "
                    f"second at most {MOST_RESIZED}, but got jitter={jitter}, crop={self.crop}"
                )
            object.__setattr__(self, "jitter", jitter)

    def check(self, height: int, width: int) -> None:
        """Raise ValueError if pictures of this size cannot be augmented."""
        short, long = sorted((height, width))
        if short < (self.crop if self.jitter is None else 1):
            raise ValueError(f"pictures of {height}x{width} pixels are smaller than a crop of {self.crop}")
        if self.jitter is not None and max(long, long * self.jitter[1] // short) > MOST_RESIZED:
            raise ValueError(
                f"pictures of {height}x{width} pixels cannot be resized to a short side of {self.jitter[1]}: "
                f"no side may have more than {MOST_RESIZED}"
            )

    def __call__(self, pictures: Tensor, seed: int, epoch: int, indices: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            pictures: uint8 tensor of shape (n, height, width, 3), on any device.
            seed, epoch, indices: which random choices; ``indices`` is an int64 tensor of shape (n,) on the CPU.

        Returns:
            Tensor of shape (n, 3, crop, crop) on the device of ``pictures``.

        Raises:
            ValueError: see :meth:`check`.
        """
        height, width = size = pictures.shape[1], pictures.shape[2]
        self.check(height, width)
        if self.random:
            made = choices(seed, epoch, indices, size, self.crop, self.jitter)
        else:
            made = centred(indices, size, self.crop, self.jitter)
        mean = torch.tensor(self.mean, dtype=torch.float64, device=indices.device).expand(len(indices), 3)
        if self.statistics is not None and self.noise:
            deviations = mean.new_tensor(self.statistics.eigenvalues).sqrt()
            vectors = mean.new_tensor(self.statistics.eigenvectors)
            drawn = self.noise * normal_deviates(seed, epoch, indices)
            mean = mean - ((drawn * deviations)[..., None] * vectors).sum(1)
        return functional.augment(
            pictures,
            made.offsets,
            made.mirror & self.mirror,
            mean,
            made.sizes,
            crop=self.crop,
            scale=(1 / self.std[0], 1 / self.std[1], 1 / self.std[2]),
            dtype=self.dtype,
            memory_format=self.memory_format,
        )


class Choices(NamedTuple):
    """What is drawn for each of n pictures, but its noise, on the device of their indices.

    ``offsets``: int64 of shape (n, 2), first rows and columns of the crops; ``mirror``: bool of shape (n,); ``sizes``:
    int64 of shape (n, 2), new heights and widths, or None.
    """

    offsets: Tensor
    mirror: Tensor
    sizes: Tensor | None


def choices(
    seed: int,
    epoch: int,
    indices: Tensor,
    size: tuple[int, int],
    crop: int,
    jitter: tuple[int, int] | None = None,
) -> Choices:
    """The random choices for each picture in an epoch, from ``words`` of the stream CROP.

    Where there is jitter, the short side's new length is ``least + words[3] * (most - least + 1) // 2**32``. The crop's
    first row is ``words[0] * (height - crop + 1) // 2**32``, its first column the same of ``words[1]`` and the width.
    It is mirrored if ``words[2]`` is 2**31 or more.
    """
    words = random_words(seed, epoch, indices, Stream.CROP)
    size_of_each, sizes = torch.tensor(size, device=indices.device).expand(len(indices), 2), None
    if jitter is not None:
        least, most = jitter
        size_of_each = sizes = scaled(size_of_each, least + (words[:, 3:] * (most - least + 1) >> 32))
    offsets = words[:, :2] * (size_of_each - crop + 1) >> 32
    return Choices(offsets, words[:, 2] >= 2**31, sizes)


def centred(indices: Tensor, size: tuple[int, int], crop: int, jitter: tuple[int, int] | None = None) -> Choices:
    """The crops of the centre, not mirrored, where there is jitter of pictures in the middle of its range."""
    size_of_each, sizes = torch.tensor(size, device=indices.device).expand(len(indices), 2), None
    if jitter is not None:
        size_of_each = sizes = scaled(size_of_each, size_of_each.new_tensor(sum(jitter) // 2))
    return Choices((size_of_each - crop) // 2, torch.zeros_like(indices, dtype=torch.bool), sizes)


def normal_deviates(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """Three for each picture in an epoch, float64 of shape (n, 3), from ``words`` of the stream NOISE.

    By Box and Muller: ``radius(0) * cos(angle(1))``, ``radius(0) * sin(angle(1))`` and ``radius(2) * cos(angle(3))``,
    where ``radius(k) = sqrt(-2 * log((words[k] + 1) / 2**32))`` and ``angle(k) = 2 * pi * words[k] / 2**32``.
    """
    words = random_words(seed, epoch, indices, Stream.NOISE).double()
    radius = (-2 * ((words[:, 0::2] + 1) / 2**32).log()).sqrt()
    angle = 2 * pi * words[:, 1::2] / 2**32
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 2).flatten(1)[:, :3]


def scaled(size: Tensor, short: Tensor) -> Tensor:
    """Heights and widths whose short sides are these, of pictures of these heights and widths."""
    return size * short // size.min(-1, keepdim=True).values


def _two(name: str, value: Sequence[int]) -> tuple[int, int]:
    if not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"Augmentation(): {name} must be two integers, not {value!r}")
    return integer(name, value[0]), integer(name, value[1])
