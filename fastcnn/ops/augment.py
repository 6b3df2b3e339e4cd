"""Training's crop, mirroring, mean and colour noise, in one pass over a batch of bytes; optionally also a new size."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..params import AugmentParams, IntOrPair
from .aten import augment as aten
from .cpu import augment as cpu
from .cuda import augment as cuda
from .outputs import augmented
from .overridable import overridable
from .register import define
from .triton import augment as triton


def _composite(
    input: Tensor, offsets: Tensor, mirror: Tensor, mean: Tensor, sizes: Tensor | None = None, **options: Any
) -> Tensor:
    """In torch's operators, for tracers too: as these do not see values, none is checked and nothing depends on one."""
    params = AugmentParams(**options)
    params.check_tensors(input, offsets, mirror, mean, sizes)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(mean).tangent is not None:
        raise RuntimeError("augment(): it is not differentiable with respect to argument 'mean', which has a tangent")
    if sizes is not None and (torch._C._is_tracing() or torch.compiler.is_compiling()):
        raise RuntimeError("augment(): it cannot be traced with sizes, whose values decide how many pixels make one")
    return reference.augmented(input, offsets, mirror, mean, sizes, params)


@overridable("input", "offsets", "mirror", "mean", "sizes", composite=_composite)
def augment(
    input: Tensor,
    offsets: Tensor,
    mirror: Tensor,
    mean: Tensor,
    sizes: Tensor | None = None,
    *,
    crop: IntOrPair,
    scale: Sequence[float] = (1.0, 1.0, 1.0),
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """Crops of pictures, some of them mirrored, as a network's input: ``(crop(resize(pixels)) - mean) * scale``.

    The random choices are arguments; :class:`fastcnn.data.Augmentation` makes them of (seed, epoch, index). Colour
    noise is part of each picture's ``mean``: that of the training set minus the colour that is to be added.

    A picture that is resized is filtered by a triangle as wide as two of its pixels, or two of the new ones where these
    are larger (bilinear, antialiased), and not rounded to bytes: as :func:`torch.nn.functional.interpolate` with
    ``mode="bilinear", antialias=True``. Only the pixels of the crop are computed.

    Args:
        input: uint8, of shape (N, H, W, 3). Contiguous pictures, as of a memory-mapped array, are read in place, others
            are copied first.
        offsets: int64, of shape (N, 2): the first row and column of each crop, in the picture of its new size.
        mirror: bool, of shape (N,): which crops are mirrored, left and right, after they are cut out.
        mean: floating-point, of shape (N, 3): what is subtracted from each channel of each picture.
        sizes: int64, of shape (N, 2): height and width that each picture is resized to; None to leave them.
        crop: height and width of the crops.
        scale: of each channel.
        dtype: of the result: float16, bfloat16, float32 or float64.
        memory_format: of the result: ``torch.channels_last`` or ``torch.contiguous_format``.

        Choices are best left on the CPU, wherever the input is: their values are checked, and reading them from a GPU
        waits for it.

    Returns:
        Tensor of shape (N, 3, crop height, crop width). Without ``sizes`` every backend gives the same bits: difference
        and product are rounded to float32, the result to ``dtype``.

    Raises:
        TypeError: an argument is of the wrong type.
        NotImplementedError: ``input`` is not uint8 or not strided, or ``dtype`` is not one of these.
        RuntimeError: a tensor is of the wrong shape, dtype or device, or asks for a gradient; ``crop`` is not positive,
            ``scale`` not of three channels, or ``memory_format`` another.
        ValueError: a crop is not within its picture; a picture is to be resized and it, or its new size, has no or more
            than 16384 rows or columns.

    Source: Krizhevsky et al. (2012), 4.1, as their code does it; for ``sizes`` Simonyan, Zisserman, "Very deep
    convolutional networks for large-scale image recognition", 2015, 3.1.
    """
    params = AugmentParams(crop, scale, dtype, memory_format)
    params.check_tensors(input, offsets, mirror, mean, sizes)
    return augment_op(input, offsets, mirror, mean, sizes, params)


BACKENDS = {"reference": aten, "cpu": cpu, "triton": triton, "cuda": cuda}

augment_op = define(
    "augment(Tensor input, Tensor offsets, Tensor mirror, Tensor mean, Tensor? sizes, {params}) -> Tensor",
    AugmentParams,
    implementations={name: backend.forward for name, backend in BACKENDS.items()},
    fake=lambda x, offsets, mirror, mean, sizes, params: augmented(x, params),
    vmap=5,
)
