"""What the memory-bound operators do in AlexNet and VGG-16, as calls with tensors on the meta device."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastcnn.bench.cases import DTYPES, FORMATS
from fastcnn.bench.operators import LRN, POOL
from fastcnn.memory_format import is_channels_last
from fastcnn.ops.register import IMPLEMENTATIONS
from fastcnn.ops.triton import conv2d_relu
from fastcnn.params import AugmentParams, PoolParams, TailParams

BESIDE_CUDNN = ("bias_relu", "relu_backward", "mask_backward")
BATCH = 256

# Channels and height of the input; of the tails, whether LRN takes part.
NORMALIZED = {"AlexNet conv1": (96, 55), "AlexNet conv2": (256, 27)}
POOLED = {**NORMALIZED, "AlexNet conv5": (256, 13)}
HALVED = {
    "VGG-16 pool1": (64, 224),
    "VGG-16 pool2": (128, 112),
    "VGG-16 pool3": (256, 56),
    "VGG-16 pool4": (512, 28),
    "VGG-16 pool5": (512, 14),
}

# Of the pictures: height and width, and the factors of their channels.
PICTURE = (256, 256)
SCALE = (1 / 58.4, 1 / 57.1, 1 / 57.4)
# Crop, and the size before it, where that is another.
CROPPED: dict[str, tuple[int, tuple[int, int] | None]] = {
    "AlexNet input": (227, None),
    "VGG-16 input": (224, (384, 384)),
}


@dataclass(frozen=True)
class Workload:
    """A call of an operator.

    Args:
        op: its name, without the mode; or what runs beside cuDNN's convolution, one of ``BESIDE_CUDNN``.
        layer: whose output it works on, or what it makes the input of.
        dtype: a key of ``DTYPES``; of the output.
        format: a key of ``FORMATS``; of the output.
        mode: "forward" or "backward".
        shape: (N, C, H, W) of the input; of ``augment``'s output.
    """

    op: str
    layer: str
    dtype: str
    format: str
    mode: str
    shape: tuple[int, int, int, int]

    modes: ClassVar[tuple[str, ...]] = ("forward", "backward")

    def __str__(self) -> str:
        return f"{self.op} {self.mode}, {self.layer}, {self.dtype}, {self.format}"

    @property
    def name(self) -> str:
        """Of the registered operator."""
        return self.op + ("_backward" if self.mode == "backward" else "")

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def languages(self) -> tuple[str, ...]:
        """In which there is a kernel."""
        return ("triton",) if self.op in BESIDE_CUDNN else ("triton", "cuda")

    @property
    def channels_last(self) -> bool:
        return self.format == "channels_last"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By the names that kernels have for them: on the CPU where their values matter, else on the meta device."""
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        """That must be read and written, each tensor once."""
        raise NotImplementedError

    def launch(self, **options: Any) -> None:
        """Call the Triton launcher; ``options`` are its own, such as ``config``."""
        IMPLEMENTATIONS[self.name]["triton"](*self.arguments(), **options)

    def arguments(self) -> tuple[Any, ...]:
        """Of the operator's implementations."""
        raise NotImplementedError


@dataclass(frozen=True)
class Tail(Workload):
    """The tail of a stage or a part of it: "lrn", "max_pool2d", "relu_lrn_max_pool2d", forward with an argmax where
    there is a pool. Or what runs beside cuDNN's convolution, in Triton alone: "bias_relu", "relu_backward" and, where
    the weights are frozen, "mask_backward".

    Args:
        normalized: whether LRN takes part.
        pool: the pooling; None where it takes no part.
    """

    normalized: bool
    pool: PoolParams | None

    @property
    def is_tail(self) -> bool:
        return self.op == "relu_lrn_max_pool2d"

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        options: dict[str, Any] = {"device": "meta", "memory_format": FORMATS[self.format]}
        x = torch.empty(self.shape, dtype=DTYPES[self.dtype], **options)
        found = {"x": x, "y": x}
        if self.pool is not None:
            shape = [*self.shape[:2], *self.pool.output_size(*self.shape[2:])]
            found["y"] = torch.empty(shape, dtype=x.dtype, **options)
            found["argmax"] = torch.empty(shape, dtype=torch.uint8, **options)
        if self.is_tail or self.op in BESIDE_CUDNN:
            found["bias"] = torch.empty(self.shape[1], dtype=x.dtype, device="meta")
        if self.op in BESIDE_CUDNN:
            found["mask"] = torch.empty(x.numel() // 8, dtype=torch.uint8, device="meta")
        return found

    @property
    def bytes(self) -> int:
        t = self.tensors
        if self.op in BESIDE_CUDNN:
            return {"bias_relu": 2, "relu_backward": 3, "mask_backward": 2}[self.op] * t["x"].nbytes + (
                0 if self.op == "relu_backward" else t["mask"].nbytes
            )
        argmax = t["argmax"].nbytes if "argmax" in t else 0
        if self.mode == "forward":
            return t["x"].nbytes + t["y"].nbytes + argmax
        read = 0 if self.op == "max_pool2d" else t["x"].nbytes
        return read + t["y"].nbytes + argmax + t["x"].nbytes

    def launch(self, **options: Any) -> None:
        t = self.tensors
        if self.op == "bias_relu":
            conv2d_relu.bias_relu(t["x"], t["bias"], True, rectify=True)
        elif self.op == "relu_backward":
            conv2d_relu.relu_backward(t["x"], t["x"], self.channels_last, True)
        elif self.op == "mask_backward":
            conv2d_relu.mask_backward(t["x"], t["mask"])
        else:
            super().launch(**options)

    def arguments(self) -> tuple[Any, ...]:
        t = self.tensors
        return arguments(self.op, self.mode, self.parameters, t["x"], t["y"], t.get("argmax"), t.get("bias"))

    @property
    def parameters(self) -> TailParams:
        """LRN and pooling alone are tails too."""
        return TailParams(self.is_tail, LRN if self.normalized else None, self.pool)


@dataclass(frozen=True)
class Augmented(Workload):
    """``augment`` of pictures of 256x256, some of them mirrored.

    Args:
        size: height and width that they are resized to; None where they keep theirs.
    """

    size: tuple[int, int] | None

    modes = ("forward",)

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        n, _, *crop = self.shape
        random = torch.Generator().manual_seed(0)
        places = [size - cut + 1 for size, cut in zip(self.size or PICTURE, crop, strict=True)]
        options: dict[str, Any] = {"device": "meta", "memory_format": FORMATS[self.format]}
        found = {
            "x": torch.empty(n, *PICTURE, 3, dtype=torch.uint8, device="meta"),
            "offsets": torch.stack([torch.randint(count, (n,), generator=random) for count in places], 1),
            "mirror": torch.rand(n, generator=random) < 0.5,
            "mean": torch.full((n, 3), 120.0),
            "y": torch.empty(self.shape, dtype=DTYPES[self.dtype], **options),
        }
        return found if self.size is None else {**found, "sizes": torch.tensor(self.size).repeat(n, 1)}

    @property
    def bytes(self) -> int:
        """Of a picture that is resized, the part under the crop is read."""
        read = self.elements
        if self.size is not None:
            read = read * math.prod(PICTURE) // math.prod(self.size)
        return read + self.tensors["y"].nbytes

    def arguments(self) -> tuple[Any, ...]:
        t = self.tensors
        return t["x"], t["offsets"], t["mirror"], t["mean"], t.get("sizes"), self.parameters

    @property
    def parameters(self) -> AugmentParams:
        return AugmentParams(self.shape[2:], SCALE, DTYPES[self.dtype], FORMATS[self.format])


def arguments(
    op: str,
    mode: str,
    tail: TailParams,
    x: Tensor,
    y: Tensor,
    argmax: Tensor | None = None,
    bias: Tensor | None = None,
    with_argmax: bool = True,
) -> tuple[Any, ...]:
    """What an implementation of a memory-bound operator takes; backward gets ``y`` for the gradient of the output."""
    forward, form = mode == "forward", (list(x.shape[2:]), is_channels_last(x))
    if op == "lrn":
        return (x, tail.lrn) if forward else (y, x, tail.lrn)
    if op == "max_pool2d":
        return (x, tail.pool, with_argmax) if forward else (y, argmax, *form, tail.pool)
    return (x, bias, tail, with_argmax) if forward else (y, x, bias, argmax, tail)


def workloads(batch: int = BATCH) -> Iterator[Workload]:
    """Every memory-bound operator at the shapes of AlexNet and VGG-16."""
    for dtype, format, mode in product(("bf16", "fp16", "fp32"), FORMATS, ("forward", "backward")):
        common = dtype, format, mode
        for layer, (c, size) in POOLED.items():
            shape = batch, c, size, size
            normalized = layer in NORMALIZED
            yield Tail("relu_lrn_max_pool2d", layer, *common, shape, normalized, POOL)
            if normalized:
                yield Tail("lrn", layer, *common, shape, True, None)
            yield Tail("max_pool2d", layer, *common, shape, False, POOL)
        if mode == "forward":
            yield Tail("bias_relu", "AlexNet conv1", *common, (batch, 96, 55, 55), False, None)
        else:
            for op in ("relu_backward", "mask_backward"):
                yield Tail(op, "AlexNet conv1", *common, (batch, 96, 55, 55), False, None)
        for layer, (c, size) in HALVED.items():
            yield Tail("max_pool2d", layer, *common, (batch, c, size, size), False, PoolParams(2))
        if mode == "forward":
            for layer, (crop, resized) in CROPPED.items():
                yield Augmented("augment", layer, *common, (batch, 3, crop, crop), resized)
