"""Launchers of the convolution's kernel, and of those for bias, ReLU and mask that surround cuDNN's convolution."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import backends
from ...memory_format import dense, is_channels_last, output_format
from ...params import ConvParams
from .. import outputs
from ..aten import conv2d_relu as aten
from ..gpu_convolution import check_tensors, precision, weight_rows
from .launch import cdiv, index_dtype, kernels, launch, sizes
from .parameters import Convolution

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BLOCK = 256  # bytes of the bit mask, of 8 elements each, a program works on
_PARTIAL = 1024  # sums of a channel, at most, that the second kernel of the bias gradient adds


@dataclass(frozen=True)
class Config:
    """Launch configuration: pixels, output channels and k of a block, warps of a program, stages of its pipeline."""

    pixels: int
    outputs: int
    k: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"triton {self.pixels}x{self.outputs}x{self.k} warps={self.warps} stages={self.stages}"


# The first of each list spills no registers on any architecture; the others are tried when tuning.
_WIDE_LOADS = (  # 16-bit channels_last
    Config(128, 64, 64, 4, 3),
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 4, 3),
    Config(64, 64, 64, 4, 4),
    Config(64, 128, 64, 4, 3),
    Config(256, 64, 64, 8, 3),
    Config(128, 256, 64, 8, 3),
    Config(128, 32, 64, 4, 4),
)
_OTHERS = (
    Config(64, 64, 32, 4, 3),
    Config(128, 64, 32, 8, 3),
    Config(64, 128, 32, 8, 3),
    Config(128, 128, 32, 8, 3),
    Config(64, 128, 64, 8, 3),
    Config(128, 32, 32, 4, 3),
)
_FEW_CHANNELS = (  # loaded element by element: all outputs at once, or they are loaded again
    Config(128, 128, 32, 8, 2),
    Config(64, 128, 64, 4, 2),
    Config(64, 128, 32, 4, 2),
    Config(128, 64, 32, 4, 2),
    Config(128, 64, 64, 4, 3),
    Config(256, 64, 32, 8, 2),
)
_IEEE = (  # fp32 without tensor cores, whose sums need registers
    Config(64, 64, 16, 4, 2),
    Config(128, 64, 16, 8, 2),
    Config(64, 32, 16, 4, 2),
)


def configurations(x: Tensor, weight: Tensor, groups: int) -> list[Config]:
    """Those that make sense, the default first; blocks are no longer than what they must cover."""
    configs: tuple[Config, ...] = _OTHERS
    if x.dtype == torch.float32 and precision(x.dtype) == "ieee":
        configs = _IEEE
    elif weight.shape[1] % 8:
        configs = _FEW_CHANNELS
    elif x.dtype != torch.float32 and is_channels_last(x):
        configs = _WIDE_LOADS
    outputs, k = _block(weight.shape[0] // groups), _block(weight.numel() // weight.shape[0])
    fitted = (Config(c.pixels, min(c.outputs, outputs), min(c.k, k), c.warps, c.stages) for c in configs)
    return list(dict.fromkeys(fitted))


def _block(size: int) -> int:
    """The shortest block for tensor cores that covers ``size``."""
    return max(16, 1 << (size - 1).bit_length())


def can_run(x: Tensor) -> bool:
    """Whether the kernels are there for this tensor."""
    return x.dtype in _DTYPES and x.numel() > 0


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvParams, with_mask: bool, *, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """By the kernel of ``kernels/conv2d_relu.py``, the mask in another pass; where it cannot run by torch."""
    check_tensors(x, weight, bias, conv)
    if not can_run(x):
        return aten.forward(x, weight, bias, conv, with_mask)
    if x.dtype == torch.bfloat16 and backends.INTERPRETING:
        # Triton's interpreter multiplies the bits of bfloat16, and rounds to it towards zero.
        y, mask = forward(x.float(), weight.float(), None if bias is None else bias.float(), conv, with_mask)
        return y.to(x.dtype), mask
    x, bias = dense(x, output_format(x)), None if bias is None else bias.contiguous()
    config = config or configurations(x, weight, conv.groups)[0]
    y, _ = outputs.convolved(x, weight, conv, False)
    pixels, channels = y.shape[0] * y.shape[2] * y.shape[3], weight.shape[0] // conv.groups
    rows = weight_rows(weight)
    launch(
        kernels("conv2d_relu").conv2d_relu_kernel,
        cdiv(pixels, config.pixels) * cdiv(channels, config.outputs) * conv.groups,
        *(x, rows, bias, y),
        P=pixels,
        **sizes(x, y),
        conv=Convolution(
            *(conv.groups, weight.shape[1], channels, *weight.shape[2:]),
            *(*conv.stride, *conv.padding, *conv.dilation, rows.shape[1]),
        ),
        CHANNELS_LAST=is_channels_last(x),
        INDEX=index_dtype(max(x.numel(), y.numel())),
        PRECISION=precision(x.dtype),
        BLOCK_P=config.pixels,
        BLOCK_O=config.outputs,
        BLOCK_K=config.k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y, bias_relu(y, None, with_mask, rectify=False)


def bias_relu(y: Tensor, bias: Tensor | None, with_mask: bool, *, rectify: bool) -> Tensor:
    """Adds the bias and rectifies ``y`` in place if asked to; returns its mask, empty if it is not wanted."""
    mask = outputs.empty_mask(y, with_mask)
    if rectify or with_mask:
        launch(
            kernels("conv2d_relu").bias_relu_kernel,
            cdiv(y.numel(), 8 * _BLOCK),
            *(y, bias, mask if with_mask else None),
            SIZE=y.numel(),
            OC=y.shape[1],
            AREA=1 if is_channels_last(y) else y.shape[2] * y.shape[3],
            RECTIFY=rectify,
            INDEX=index_dtype(y.numel()),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return mask


def mask_backward(dy: Tensor, mask: Tensor) -> Tensor:
    """``dy`` where the mask passes it, else 0."""
    dz = torch.empty_like(dy)
    launch(
        kernels("conv2d_relu").mask_backward_kernel,
        cdiv(dy.numel(), 8 * _BLOCK),
        *(dy, mask, dz),
        SIZE=dy.numel(),
        INDEX=index_dtype(dy.numel()),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return dz


def relu_backward(dy: Tensor, y: Tensor, channels_last: bool, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the convolution's output, and of its bias, empty if that is not wanted."""
    if dy.dtype == torch.bfloat16 and backends.INTERPRETING:  # as in forward
        dz, db = relu_backward(dy.float(), y.float(), channels_last, with_bias)
        return dz.to(dy.dtype), db.to(dy.dtype)
    dz = torch.empty_like(dy)
    n, o, h, w = dy.shape
    if channels_last:
        count, rows, columns = n * h * w, 16, min(128, _block(o))
    else:
        columns = min(1024, _block(h * w))
        count, rows = n, 2048 // columns
    steps = cdiv(count, rows * _PARTIAL)
    sums = cdiv(count, rows * steps)
    partial = dy.new_empty((sums, o), dtype=torch.float32) if with_bias else None
    launch(
        kernels("conv2d_relu").relu_backward_kernel,
        sums * (cdiv(o, columns) if channels_last else o),
        *(dy, y, dz, partial),
        N=count,
        OC=o,
        AREA=h * w,
        STEPS=steps,
        CHANNELS_LAST=channels_last,
        INDEX=index_dtype(dy.numel()),
        BLOCK_ROWS=rows,
        BLOCK_COLUMNS=columns,
        num_warps=4 if channels_last else 8,
    )
    db = dy.new_empty(o if with_bias else 0)
    if with_bias:
        launch(
            kernels("conv2d_relu").bias_gradient_kernel,
            cdiv(o, 32),
            *(partial, db),
            ROWS=sums,
            OC=o,
            BLOCK_ROWS=32,
            BLOCK_O=32,
            num_warps=4,
        )
    return dz, db
