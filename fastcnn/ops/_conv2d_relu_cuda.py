"""conv2d_relu on NVIDIA GPUs: the Triton kernel, cuDNN with bias and ReLU in one more pass, and which of them runs.

cuDNN runs, unless :data:`MEASURED` says otherwise. With ``torch.backends.cudnn.benchmark`` every new shape is tuned
(``FASTCNN_TUNE=0`` in the environment leaves it at that):
candidates are cuDNN, ``torch.cudnn_convolution_relu``, the CUDA kernel and the configurations of the Triton kernel, and
only the latter where the backend "triton" is forced. A configuration runs only after its output was compared with
cuDNN's, because compilers have got such loops wrong.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._version import __version__
from . import _conv2d_relu_compiled as compiled
from . import conv2d_relu as op
from ._layout import dense, empty_output, format_of, is_channels_last, output, output_format
from ._triton import cdiv, check_same, index_dtype, kernels, launch
from ._tuning import Memory, Tuner, cache_folder, milliseconds

Run = Callable[..., tuple[Tensor, Tensor]]  # of the op's arguments

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_BLOCK = 256  # bytes of the bit mask, of 8 elements each, a program works on
_PARTIAL = 1024  # sums of a channel, at most, that the second stage of the bias gradient adds

# (device, dtype, channels_last, groups, weight shape) -> the Triton kernel was measured to be faster than cuDNN there.
# Nothing was measured yet.
MEASURED: frozenset[tuple[str, torch.dtype, bool, int, tuple[int, ...]]] = frozenset()


@dataclass(frozen=True)
class Config:
    """Of the Triton kernel: pixels, outputs and k of a block, warps of a program, stages of its pipeline."""

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


def precision(dtype: torch.dtype) -> str:
    """How products of this dtype are computed, by torch's own switch for convolutions."""
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    return "tf32" if tf32 else "ieee"


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


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """Output, and the bit mask if it is wanted."""
    check_same("conv2d_relu", "weight", weight, x, [*weight.shape[:1], x.shape[1] // args[3], *weight.shape[2:]])
    if bias is not None:
        check_same("conv2d_relu", "bias", bias, x, weight.shape[:1])
    if x.dtype not in _DTYPES or x.numel() == 0:
        return op._reference(x, weight, bias, *args)
    if x.dtype == torch.bfloat16 and backends.INTERPRETING:
        # Triton's interpreter multiplies the bits of bfloat16, and rounds to it towards zero.
        y, mask = forward(x.float(), weight.float(), None if bias is None else bias.float(), *args)
        return y.to(x.dtype), mask
    x = dense(x, output_format(x))
    bias = None if bias is None else bias.contiguous()
    runs = candidates(x, weight, *args)
    return runs[_choose(runs, x, weight, bias, *args)](x, weight, bias, *args)


def candidates(x: Tensor, weight: Tensor, *args: Any) -> dict[str, Run]:
    """By name, what can run: functions of the op's arguments. cuDNN, or what torch has in its place, is the first."""
    runs: dict[str, Run] = {"cudnn": cudnn}
    if x.is_cuda and torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled:
        runs["cudnn_convolution_relu"] = cudnn_convolution_relu
    if compiled.can_run(x):
        runs["cuda"] = compiled.run
    for config in configurations(x, weight, args[3]):
        runs[str(config)] = functools.partial(triton, config=config)
    return runs


def _tunes() -> bool:
    return torch.backends.cudnn.benchmark and os.environ.get("FASTCNN_TUNE") != "0"


def engine(backend: str) -> str:
    """What computes convolutions on a GPU where this backend was chosen."""
    if backends._forced == "triton":
        return "triton"
    if backends._forced == "cuda":  # whose kernel multiplies float32 as TF32
        return "cuda" if precision(torch.float32) == "tf32" else "cuda, in IEEE float32 cuDNN"
    ours = ["triton"] * (backend == "triton") + ["cuda"] * (not backends.why_not("cuda", torch.device("cuda")))
    if _tunes() and ours:
        return f"the fastest of cuDNN, {', '.join(ours)}"
    return "cuDNN, triton where measured" if MEASURED else "cuDNN"


def _choose(runs: dict[str, Run], x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> str:
    ours = [name for name in runs if name.startswith("triton")]
    if not x.is_cuda:  # the interpreter
        return ours[0]
    tuned = _tunes()
    only_ours = backends._forced == "triton" or (not tuned and _measured(x, weight, args[3]))
    if not (tuned or only_ours):
        return "cudnn"
    key = _key(x, weight, bias, *args, *(["triton"] if only_ours else []), *([] if tuned else ["untimed"]))
    if torch.cuda.is_current_stream_capturing():  # nothing may be timed, or waited for
        return _tuner().known(key, runs) or "cudnn"
    outputs = {name: functools.partial(_output, run, args) for name, run in runs.items()}
    inputs = functools.partial(_check_inputs, x, weight, bias)
    return _tuner().choose(key, outputs, inputs, _tolerance(x.dtype), only=ours if only_ours else (), timed=tuned)


def _measured(x: Tensor, weight: Tensor, groups: int) -> bool:
    shape = (torch.cuda.get_device_name(x.device), x.dtype, is_channels_last(x), groups, tuple(weight.shape))
    return shape in MEASURED


def _output(run: Run, args: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
    return run(*tensors, *args)[0]


@functools.cache
def _tuner() -> Tuner:
    return Tuner(Memory(lambda: cache_folder() / "conv2d_relu.json"), milliseconds)


def _key(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> str:
    """All that decides which candidate is the fastest and right."""
    versions = __version__, torch.__version__, _triton_version(), torch.version.cuda, torch.backends.cudnn.version()
    tensors = *x.shape, is_channels_last(x), *weight.shape, is_channels_last(weight), bias is not None
    numbers = str(x.dtype), precision(x.dtype), torch.backends.cudnn.deterministic
    return repr((torch.cuda.get_device_name(x.device), versions, tensors, numbers, args))


@functools.cache
def _triton_version() -> str:
    import triton

    return triton.__version__


def _check_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """Random ones like those given, and the same with a weight of NaN, which ReLU must keep."""
    generator = torch.Generator(x.device).manual_seed(0)

    def normal(like: Tensor, scale: float = 1.0) -> Tensor:
        return torch.empty_like(like).normal_(0, scale, generator=generator)

    x, bias = normal(x), None if bias is None else normal(bias)
    return [(x, normal(weight, weight[0].numel() ** -0.5), bias), (x, torch.full_like(weight, float("nan")), bias)]


def _tolerance(dtype: torch.dtype) -> float:
    """Of the difference of two convolutions that both are right; IEEE fp32 allows for Winograd's."""
    if dtype == torch.float32:
        return 2 * 2**-10 if precision(dtype) == "tf32" else 1e-5
    return 2 * torch.finfo(dtype).eps


def cudnn(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """torch's convolution; then bias, ReLU and mask in one pass over its output."""
    *conv, with_mask = args
    y = output(torch.conv2d(x, weight, None, *conv), output_format(x))
    return y, _bias_relu(y, bias, with_mask, rectify=True)


def cudnn_convolution_relu(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    """cuDNN's own fusion. torch asks it for a ReLU that need not keep NaN, so that it must have shown that it does."""
    *conv, with_mask = args
    y = output(torch.cudnn_convolution_relu(x, weight, bias, *conv), output_format(x))
    return y, _bias_relu(y, None, with_mask, rectify=False)


def triton(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, config: Config) -> tuple[Tensor, Tensor]:
    """The kernel of ``kernels/conv2d_relu.py``; the mask in another pass."""
    stride, padding, dilation, groups, with_mask = args
    y = empty_output(x, op._output_shape(x, weight, *args[:4]))
    pixels, outputs = y.shape[0] * y.shape[2] * y.shape[3], weight.shape[0] // groups
    rows = _rows(weight)
    launch(
        kernels("conv2d_relu").conv2d_relu_kernel,
        cdiv(pixels, config.pixels) * cdiv(outputs, config.outputs) * groups,
        *(x, rows, bias, y, pixels, *x.shape[2:], *y.shape[2:]),
        *(groups, weight.shape[1], outputs, *weight.shape[2:], *stride, *padding, *dilation, rows.shape[1]),
        CHANNELS_LAST=is_channels_last(x),
        INDEX=index_dtype(max(x.numel(), y.numel())),
        PRECISION=precision(x.dtype),
        BLOCK_P=config.pixels,
        BLOCK_O=config.outputs,
        BLOCK_K=config.k,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y, _bias_relu(y, None, with_mask, rectify=False)


def _rows(weight: Tensor) -> Tensor:
    """(O, ROW): of each output k = (kh, kw, c), with zeros to the next 16 bytes. No copy of a channels_last weight."""
    rows = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    missing = -rows.shape[1] % 8
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()


def _bias_relu(y: Tensor, bias: Tensor | None, with_mask: bool, *, rectify: bool) -> Tensor:
    """Adds the bias and rectifies ``y`` in place if asked to; returns its mask, empty if it is not wanted."""
    mask = op._empty_mask(y, with_mask)
    if rectify or with_mask:
        launch(
            kernels("conv2d_relu").bias_relu_kernel,
            cdiv(y.numel(), 8 * _BLOCK),
            *(y, bias, mask if with_mask else None, y.numel()),
            OC=y.shape[1],
            AREA=1 if is_channels_last(y) else y.shape[2] * y.shape[3],
            RECTIFY=rectify,
            INDEX=index_dtype(y.numel()),
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return mask


def backward(
    dy: Tensor, output_or_mask: Tensor, x: Tensor | None, weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, empty where they are not wanted."""
    if dy.dtype not in _DTYPES or dy.numel() == 0:
        return op._backward_reference(dy, output_or_mask, x, weight, *args)
    size, channels_last, *conv, needs = args
    format = format_of(channels_last)
    dy = dense(dy, format)
    if x is None:
        bits = dy.new_empty(0, dtype=torch.uint8)
        check_same("conv2d_relu_backward", "output_or_mask", output_or_mask, bits, [cdiv(dy.numel(), 8)])
        return op._convolution_backward(_mask_backward(dy, output_or_mask), x, weight, *args)
    check_same("conv2d_relu_backward", "output_or_mask", output_or_mask, dy)
    dz, db = _relu_backward(dy, dense(output_or_mask, format), channels_last, needs[2])
    dx, dw, _ = op._convolution_backward(dz, x, weight, size, channels_last, *conv, [*needs[:2], False])
    return dx, dw, db


def _mask_backward(dy: Tensor, mask: Tensor) -> Tensor:
    dz = torch.empty_like(dy)
    launch(
        kernels("conv2d_relu").mask_backward_kernel,
        cdiv(dy.numel(), 8 * _BLOCK),
        *(dy, mask, dz, dy.numel()),
        INDEX=index_dtype(dy.numel()),
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return dz


def _relu_backward(dy: Tensor, y: Tensor, channels_last: bool, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the convolution's output, and of its bias, empty if that is not wanted."""
    if dy.dtype == torch.bfloat16 and backends.INTERPRETING:  # as in forward
        dz, db = _relu_backward(dy.float(), y.float(), channels_last, with_bias)
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
        *(dy, y, dz, partial, count, o, h * w, steps),
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
            *(partial, db, sums, o),
            BLOCK_ROWS=32,
            BLOCK_O=32,
            num_warps=4,
        )
    return dz, db
