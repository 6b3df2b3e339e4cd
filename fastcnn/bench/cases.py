"""What is measured: operators as AlexNet uses them, whole networks, shapes, dtypes, memory formats and modes."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import product

import torch

from ..params import ConvParams, LRNParams, PoolParams

Shape = tuple[int, int, int, int]

LRN = LRNParams(size=5, alpha=1e-4, beta=0.75, k=2.0)
POOL = PoolParams(kernel_size=3, stride=2)
STAGES: dict[str, Shape] = {"stage1": (32, 96, 55, 55), "stage2": (32, 256, 27, 27)}
SHAPES: dict[str, Shape] = {**STAGES, "conv2": (32, 96, 27, 27)}  # what the tails, and conv2, get


@dataclass(frozen=True)
class Convolution:
    """A layer's: channels, height and width of its input, output channels, window, and the rest."""

    channels: int
    size: int
    outputs: int
    window: int
    stride: int = 1
    padding: int = 0
    groups: int = 1

    @property
    def params(self) -> ConvParams:
        return ConvParams([self.stride] * 2, [self.padding] * 2, [1, 1], self.groups)


CONVOLUTIONS = {
    "AlexNet conv1": Convolution(3, 227, 96, 11, stride=4),
    "AlexNet conv2": Convolution(96, 27, 256, 5, padding=2, groups=2),
    "AlexNet conv3": Convolution(256, 13, 384, 3, padding=1),
    "AlexNet conv4": Convolution(384, 13, 384, 3, padding=1, groups=2),
    "AlexNet conv5": Convolution(384, 13, 256, 3, padding=1, groups=2),
    "VGG-16 conv1_1": Convolution(3, 224, 64, 3, padding=1),
    "VGG-16 conv1_2": Convolution(64, 224, 64, 3, padding=1),
    "VGG-16 conv2_1": Convolution(64, 112, 128, 3, padding=1),
    "VGG-16 conv2_2": Convolution(128, 112, 128, 3, padding=1),
    "VGG-16 conv3_1": Convolution(128, 56, 256, 3, padding=1),
    "VGG-16 conv3_2": Convolution(256, 56, 256, 3, padding=1),
    "VGG-16 conv4_1": Convolution(256, 28, 512, 3, padding=1),
    "VGG-16 conv4_2": Convolution(512, 28, 512, 3, padding=1),
    "VGG-16 conv5": Convolution(512, 14, 512, 3, padding=1),
}
OPS = ("lrn", "max_pool2d", "conv2d_relu", "relu_lrn_max_pool2d")
POOLING = ("max_pool2d", "relu_lrn_max_pool2d")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("forward", "backward", "forward+backward")
ANY_FORMAT = "any format"  # of a network: each provider has the memory format that its name says


@dataclass(frozen=True)
class Case:
    """One thing to measure, in one memory format; every provider that takes part is compared within it.

    Args:
        op: name of the operator, or of the network.
        shape: (N, C, H, W) of its input.
        dtype: a key of ``DTYPES``.
        format: a key of ``FORMATS``; for a network ANY_FORMAT.
        mode: one of ``MODES``, where "backward" is the gradient of a retained graph, without the forward. For a network
            see :mod:`fastcnn.bench.networks`.
        memory: "fresh" outputs are allocated by every call, which is the ordinary call and pays for page faults;
            "mapped" outputs are written again and again into the same memory, which shows the kernel alone.
        layer: of a convolution, a key of ``CONVOLUTIONS``, AlexNet's conv2 if None; the shape may be another than its.
    """

    op: str
    shape: Shape
    dtype: str = "fp32"
    format: str = "channels_last"
    mode: str = "forward"
    memory: str = "fresh"
    layer: str | None = None

    def __str__(self) -> str:
        memory = ", mapped output" if self.memory == "mapped" else ""
        layer = f" {self.layer}," if self.layer else ""
        return f"{self.op} {self.mode},{layer} {self.dtype} {self.format} {self.shape}{memory}"

    @property
    def convolution(self) -> Convolution:
        """The layer's; an odd number of channels has but one group."""
        layer = CONVOLUTIONS[self.layer or "AlexNet conv2"]
        return replace(layer, groups=1) if self.shape[1] % 2 else layer

    @property
    def weight_shape(self) -> Shape | None:
        """Of the convolution; None for an operator without weights."""
        conv = self.convolution
        shape = (conv.outputs, self.shape[1] // conv.groups, conv.window, conv.window)
        return shape if self.op == "conv2d_relu" else None

    @property
    def output_shape(self) -> Shape:
        n, c, h, w = self.shape
        if self.op == "conv2d_relu":
            conv = self.convolution
            oh, ow = ((size + 2 * conv.padding - conv.window) // conv.stride + 1 for size in (h, w))
            return (n, conv.outputs, oh, ow)
        return (n, c, *POOL.output_size(h, w)) if self.op in POOLING else self.shape

    @property
    def flop(self) -> int | None:
        """Multiplications and additions of a convolution."""
        if self.weight_shape is None:
            return None
        forward = 2 * torch.Size(self.output_shape).numel() * torch.Size(self.weight_shape[1:]).numel()
        return {"forward": 1, "backward": 2, "forward+backward": 3}[self.mode] * forward

    def bytes_moved(self, element_size: int) -> int:
        """What the operator must read and write at the least.

        That is each input and output once, weights included, a 1-byte argmax for a pool, and for a convolution's
        backward also its output, in whose place the ReLU mask stands.
        The same for every provider: the GB/s of one that writes intermediates counts only the bytes that were needed.
        """
        x, y = torch.Size(self.shape).numel(), torch.Size(self.output_shape).numel()
        argmax = y if self.op in POOLING else 0
        if self.weight_shape is not None:
            w = torch.Size(self.weight_shape).numel()
            forward, backward = (x + y + w) * element_size, (2 * x + 2 * y + 2 * w) * element_size
        elif self.op == "max_pool2d":
            forward, backward = (x + y) * element_size, (x + y) * element_size + argmax
        else:
            forward, backward = (x + y) * element_size, (2 * x + y) * element_size + argmax
        return {"forward": forward, "backward": backward, "forward+backward": forward + argmax + backward}[self.mode]


def select(
    *,
    ops: Collection[str] = (),
    shapes: Collection[Shape] = (),
    dtypes: Collection[str] = (),
    formats: Collection[str] = (),
    modes: Collection[str] = (),
    batch: int | None = None,
    full: bool = False,
) -> list[Case]:
    """The cases to run: those asked for where something is, otherwise the usual ones, with ``full`` all there are.

    Usual are the shape of stage 1 (conv2's for the convolution) and both formats; fp32, and bf16 for the tail's
    forward; LRN forward and backward alone, also with mapped output memory, the others forward and with their backward.
    ``batch`` takes the place of every N.
    """
    cases = []
    for op, mode, dtype, format in product(ops or OPS, modes or MODES, dtypes or ("fp32", "bf16"), formats or FORMATS):
        usual_mode = mode == "forward" or (mode == "backward") == (op == "lrn")
        usual_dtype = dtype == "fp32" or (op, mode) == ("relu_lrn_max_pool2d", "forward")
        if not (full or ((modes or usual_mode) and (dtypes or usual_dtype))):
            continue
        for n, c, h, w in shapes or _usual_shapes(op, full):
            case = Case(op, (batch or n, c, h, w), dtype, format, mode)
            cases.append(case)
            if _in_mapped_memory(case, full):
                cases.append(replace(case, memory="mapped"))
    return cases


def _usual_shapes(op: str, full: bool) -> list[Shape]:
    if op == "conv2d_relu":
        return [SHAPES["conv2"]]
    return list(STAGES.values()) if full else [STAGES["stage1"]]


def _in_mapped_memory(case: Case, full: bool) -> bool:
    if case.op == "lrn":
        return case.mode != "forward+backward"
    return full and (case.op, case.mode) == ("relu_lrn_max_pool2d", "forward")
