"""What a case is: an operator or a network, its input, a dtype, a memory format and a mode."""

from dataclasses import dataclass

import torch

Shape = tuple[int, int, int, int]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
ANY_FORMAT = "any format"  # of a network: each provider has the memory format that its name says


@dataclass(frozen=True)
class Case:
    """One thing to measure, in one memory format.

    Args:
        op: name of the operator, or of the network.
        shape: (N, C, H, W) of its input.
        dtype: a key of ``DTYPES``.
        format: a key of ``FORMATS``; for a network ANY_FORMAT.
        mode: see :mod:`fastcnn.bench.operators` and :mod:`fastcnn.bench.networks`.
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
