"""What is measured: operators as AlexNet uses them, shapes, dtypes, memory formats and modes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import product

import torch

from ..params import LRNParams, PoolParams

Shape = tuple[int, int, int, int]

LRN = LRNParams(size=5, alpha=1e-4, beta=0.75, k=2.0)
POOL = PoolParams(kernel_size=3, stride=2)
STAGES: dict[str, Shape] = {"stage1": (32, 96, 55, 55), "stage2": (32, 256, 27, 27)}
OPS = ("lrn", "relu_lrn_max_pool2d")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One thing to measure, in one memory format; every provider that takes part is compared within it.

    Args:
        op: name of the operator.
        shape: (N, C, H, W) of its input.
        dtype: a key of ``DTYPES``.
        format: a key of ``FORMATS``.
        mode: one of ``MODES``; "backward" is the gradient of a retained graph, without the forward.
        memory: "fresh" outputs are allocated by every call, which is the ordinary call and pays for page faults;
            "mapped" outputs are written again and again into the same memory, which shows the kernel alone.
    """

    op: str
    shape: Shape
    dtype: str = "fp32"
    format: str = "channels_last"
    mode: str = "forward"
    memory: str = "fresh"

    def __str__(self) -> str:
        memory = ", mapped output" if self.memory == "mapped" else ""
        return f"{self.op} {self.mode}, {self.dtype} {self.format} {self.shape}{memory}"

    @property
    def output_shape(self) -> Shape:
        n, c, h, w = self.shape
        return (n, c, *POOL.output_size(h, w)) if self.op == "relu_lrn_max_pool2d" else self.shape

    def bytes_moved(self, element_size: int) -> int:
        """What the operator must read and write at the least: each input and output once, a 1-byte argmax for a pool.

        The same for every provider: the GB/s of one that writes intermediates counts only the bytes that were needed.
        """
        x, y = torch.Size(self.shape).numel(), torch.Size(self.output_shape).numel()
        argmax = y if self.op == "relu_lrn_max_pool2d" else 0
        forward = (x + y) * element_size
        backward = (2 * x + y) * element_size + argmax
        return {"forward": forward, "backward": backward, "forward+backward": forward + argmax + backward}[self.mode]


def select(
    *,
    ops: Collection[str] = (),
    shapes: Collection[Shape] = (),
    dtypes: Collection[str] = (),
    formats: Collection[str] = (),
    modes: Collection[str] = (),
    full: bool = False,
) -> list[Case]:
    """The cases to run: those asked for where something is, otherwise the usual ones, with ``full`` all there are.

    Usual are the shape of stage 1 and both formats; fp32, and bf16 for the tail's forward; LRN forward and backward
    alone, also with mapped output memory, and the tail forward and with its backward.
    """
    cases = []
    for op, shape, mode, dtype, format in product(
        ops or OPS,
        shapes or (STAGES.values() if full else [STAGES["stage1"]]),
        modes or MODES,
        dtypes or ("fp32", "bf16"),
        formats or FORMATS,
    ):
        usual_mode = mode == "forward" or (mode == "backward") == (op == "lrn")
        usual_dtype = dtype == "fp32" or (op, mode) == ("relu_lrn_max_pool2d", "forward")
        if not (full or ((modes or usual_mode) and (dtypes or usual_dtype))):
            continue
        case = Case(op, shape, dtype, format, mode)
        cases.append(case)
        if mode != "forward+backward" and (op == "lrn" or (mode == "forward" and full)):
            cases.append(Case(op, shape, dtype, format, mode, memory="mapped"))
    return cases
