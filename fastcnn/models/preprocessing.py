"""What is done to an image before a network sees it: size, colour order, scale, mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.images import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to the input of a network: ``(pixels * scale - mean) / std``, pixels from 0 to 255.

    The short side is scaled to 256 pixels for networks of 224 or 227, in proportion for others, and the centre cropped.

    Args:
        name: its key in PREPROCESSINGS.
        colours: "RGB" or "BGR", the order of the channels.
        scale: 1 for pixels on their raw scale, 1/255 for a range from 0 to 1.
        mean, std: of each channel, in the order of ``colours``, on the scale of ``scale``.

    Raises:
        ValueError: ``colours`` is another order.
    """

    name: str
    colours: str
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.colours not in ("RGB", "BGR"):
            raise ValueError(f"Preprocessing(): colours must be 'RGB' or 'BGR', not {self.colours!r}")

    def __call__(self, image: Image, size: int) -> Tensor:
        """The image as a float32 tensor of shape (3, size, size), on the CPU.

        It may be of any size, and any mode that :func:`fastcnn.data.to_rgb` converts.

        Raises:
            ImageError: its pixels have no definite 8-bit colours.
        """
        import numpy
        from PIL.Image import Resampling

        image = to_rgb(image)
        side = min(image.size) * size / short_side(size)
        left, top = ((length - side) / 2 for length in image.size)
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Resampling.BICUBIC, box)
        return self.normalized(torch.from_numpy(numpy.array(image)).permute(2, 0, 1))

    def normalized(self, pixels: Tensor) -> Tensor:
        """Of RGB pixels from 0 to 255, (..., 3, H, W) in any dtype: float32 on their device, in the network's order and
        scale."""
        pixels = pixels.float() if self.colours == "RGB" else pixels.float().flip(-3)
        mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels * self.scale - mean) / std


def short_side(size: int) -> int:
    """Of pictures, in pixels, from which crops of this size are taken: 256 for 224 and 227, others in proportion."""
    return 256 if size in (224, 227) else round(size * 256 / 224)


RAW = Preprocessing("raw", "RGB", 1.0, (123.68, 116.779, 103.939))
CAFFE = Preprocessing("caffe", "BGR", 1.0, (104.0, 117.0, 123.0))
TORCHVISION = Preprocessing("torchvision", "RGB", 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PREPROCESSINGS = {p.name: p for p in (RAW, CAFFE, TORCHVISION)}
