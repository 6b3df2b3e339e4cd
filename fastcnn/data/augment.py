"""What training does to pictures: random crops, mirroring, colour noise, mean and scale."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, pi

import torch
from torch import Tensor

from .. import reference
from .colours import Statistics, Triple
from .order import Stream, random_words
from .workers import integer


@dataclass(frozen=True)
class Augmentation:
    """From uint8 pictures to the input of a network: ``(crop(pixels) + noise - mean) * (1 / std)``.

    The crop's place, whether it is mirrored, and its noise are functions of (seed, epoch, index of the picture); see
    :func:`choices`. The noise of the AlexNet paper, section 4.1, as the original code computes it: for each picture a
    colour is added to all its pixels, the sum over the principal components of the training set's colours of ``a *
    deviation * vector``, ``a`` drawn anew from a normal distribution of standard deviation ``noise``, deviation the
    square root of the component's variance (the paper has the variance itself in its place).

    Args:
        crop: height and width of the crops, in pixels.
        random: crop at random places and mirror half of the pictures; otherwise crop the centre, and mirror none.
        mean, std: of each channel, from 0 to 255.
        noise: standard deviation of the colour noise; the paper's is 0.1.
        statistics: of the training set's pixels, for the noise.
        dtype: of the result.
        memory_format: of the result.

    Raises:
        TypeError: ``crop`` is no integer, or ``dtype`` has no fractions.
        ValueError: ``crop`` or ``std`` is not positive, ``mean`` or ``std`` is not of three channels, ``noise`` is
            negative or not finite, or there is noise without statistics.
    """

    crop: int
    random: bool = True
    mean: Triple = (0.0, 0.0, 0.0)
    std: Triple = (1.0, 1.0, 1.0)
    noise: float = 0.0
    statistics: Statistics | None = None
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop", integer("crop", self.crop))
        if not self.dtype.is_floating_point:
            raise TypeError(f"Augmentation(): dtype must be a floating-point dtype, not {self.dtype}")
        if self.crop < 1 or not 0 <= self.noise < inf:
            raise ValueError(
                f"Augmentation(): crop must be greater than zero and noise finite and not negative, but got "
                f"crop={self.crop}, noise={self.noise}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or not all(0 < std < inf for std in self.std):
            raise ValueError(
                f"Augmentation(): mean and std must be of three channels, and std positive, but got mean={self.mean}, "
                f"std={self.std}"
            )
        if self.noise and self.statistics is None:
            raise ValueError("Augmentation(): noise needs the statistics of the training set")

    def __call__(self, pictures: Tensor, seed: int, epoch: int, indices: Tensor) -> Tensor:
        """Augment a batch.

        Args:
            pictures: uint8 tensor of shape (n, height, width, 3), on any device.
            seed, epoch, indices: which random choices; ``indices`` is an int64 tensor of shape (n,) on the CPU.

        Returns:
            Tensor of shape (n, 3, crop, crop) on the device of ``pictures``.

        Raises:
            ValueError: the pictures are smaller than the crop.
        """
        height, width = pictures.shape[1:3]
        if self.crop > min(height, width):
            raise ValueError(f"pictures of {height}x{width} pixels are smaller than a crop of {self.crop}")
        offsets, mirror, normal = choices(seed, epoch, indices, (height, width), self.crop)
        if not self.random:
            offsets = offsets.new_tensor(((height - self.crop) // 2, (width - self.crop) // 2)).expand(len(indices), 2)
            mirror = torch.zeros_like(mirror)
        mean = normal.new_tensor(self.mean).expand(len(indices), 3)
        if self.statistics is not None and self.noise:
            deviations = normal.new_tensor(self.statistics.eigenvalues).sqrt()
            vectors = normal.new_tensor(self.statistics.eigenvectors)
            mean = mean - ((normal * self.noise * deviations)[..., None] * vectors).sum(1)
        return reference.augment(
            pictures,
            offsets,
            mirror,
            mean.float(),
            crop=self.crop,
            scale=(1 / self.std[0], 1 / self.std[1], 1 / self.std[2]),
            dtype=self.dtype,
            memory_format=self.memory_format,
        )


def choices(seed: int, epoch: int, indices: Tensor, size: tuple[int, int], crop: int) -> tuple[Tensor, Tensor, Tensor]:
    """The random choices for each picture in an epoch.

    With ``words`` of the stream CROP: the crop's first row is ``words[0] * (height - crop + 1) // 2**32``, its first
    column the same of ``words[1]`` and the width; it is mirrored if ``words[2]`` is 2**31 or more. With those of the
    stream
    NOISE, by Box and Muller, in float64: ``radius(0) * cos(angle(1))``, ``radius(0) * sin(angle(1))`` and ``radius(2) *
    cos(angle(3))``, where ``radius(k) = sqrt(-2 * log((words[k] + 1) / 2**32))`` and ``angle(k) = 2 * pi * words[k] /
    2**32``.

    Returns:
        Offsets, int64 of shape (n, 2), rows and columns; mirrored, bool of shape (n,); three normal deviates, float64
        of shape (n, 3).
    """
    words = random_words(seed, epoch, indices, Stream.CROP)
    places = torch.tensor(size, device=indices.device) - crop + 1
    offsets = words[:, :2] * places >> 32
    noise = random_words(seed, epoch, indices, Stream.NOISE).double()
    radius = (-2 * ((noise[:, 0::2] + 1) / 2**32).log()).sqrt()
    angle = 2 * pi * noise[:, 1::2] / 2**32
    normal = torch.stack((radius * angle.cos(), radius * angle.sin()), 2).flatten(1)[:, :3]
    return offsets, words[:, 2] >= 2**31, normal
