"""Checked parameters of the operators, and the shape rules that follow from them.

A public function makes them, once. The registered ops take their fields one by one, as ``SCHEMA`` has them and
``op_args`` gives them; ``from_op`` makes the same parameters of these again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from .memory_format import format_of

IntOrPair = int | Sequence[int]

FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Height and width up to which 32 bits are enough for the positions in a picture that is resized.
MOST_RESIZED = 2**14


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of ``dtype`` are computed."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_input(op: str, input: Tensor) -> None:
    """Raise what torch would raise if ``input`` is not a strided tensor of a floating dtype we have kernels for."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}(): argument 'input' must be Tensor, not {type(input).__name__}")
    if input.dtype not in FLOATING_DTYPES:
        raise NotImplementedError(
            f"{op}(): not implemented for input of dtype {input.dtype}; "
            "allowed are float16, bfloat16, float32 and float64"
        )
    if input.layout != torch.strided:
        raise NotImplementedError(f"{op}(): input must have layout torch.strided, got {input.layout}")


def check_bias(op: str, bias: Tensor | None, input: Tensor, channels: int | None = None, name: str = "bias") -> None:
    """``bias`` is None, or one value per channel in the dtype of ``input``, or (beside 16-bit input) in float32."""
    if bias is None:
        return
    channels = input.shape[1] if channels is None else channels
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}(): argument '{name}' must be Tensor or None, not {type(bias).__name__}")
    if bias.dim() != 1 or bias.shape[0] != channels:
        raise RuntimeError(
            f"{op}(): expected {name} to be 1-dimensional with {channels} elements (one a channel), "
            f"but got {name} of size {list(bias.shape)}"
        )
    if bias.dtype not in (input.dtype, opmath(input.dtype)):
        raise RuntimeError(
            f"{op}(): input type ({input.dtype}) and {name} type ({bias.dtype}) should be the same, "
            f"or the {name} float32 beside 16-bit input"
        )
    if bias.device != input.device:
        raise RuntimeError(
            f"{op}(): expected input and {name} on the same device, "
            f"but got input on {input.device} and {name} on {bias.device}"
        )


def wide_bias(op: str, bias: Tensor | None, input: Tensor, name: str = "bias") -> Tensor | None:
    """``bias``, checked, dense and in the dtype in which ``input`` is computed."""
    check_bias(op, bias, input, name=name)
    if bias is None:
        return None
    dtype = opmath(input.dtype)
    return (bias if bias.dtype == dtype else bias.to(dtype)).contiguous()


def check_same(op: str, name: str, value: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> None:
    """Raise if a tensor handed to an op directly would be read out of bounds: it must match another one."""
    shape = list(like.shape if shape is None else shape)
    if list(value.shape) != shape or value.dtype != like.dtype or value.device != like.device:
        raise RuntimeError(
            f"{op}(): expected {name} of size {shape}, {like.dtype} on {like.device}, "
            f"but got size {list(value.shape)}, {value.dtype} on {value.device}"
        )


def _int(op: str, name: str, value: Any) -> int:
    """``value`` as an int; numbers of numpy are taken too, as torch takes them."""
    if type(value) is int:  # soonest told, for a small operator is called in microseconds
        return value
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    raise TypeError(f"{op}(): argument '{name}' must be int, not {type(value).__name__}")


@dataclass(frozen=True)
class LRNParams:
    """Parameters of local response normalization, as in :class:`torch.nn.LocalResponseNorm`, plus ``groups``.

    Args:
        size: number of channels in the window, at least 1. Channel ``c`` sees ``c - size//2 ... c + (size-1)//2``.
        alpha: factor of the window's *mean* square (the divisor is ``size``, also at the borders).
        beta: exponent.
        k: additive constant.
        groups: the channels are cut into this many equal parts and no window crosses a cut.

    Raises:
        TypeError: an argument is not a number of the right kind.
        RuntimeError: ``size`` is not positive.
        ValueError: ``groups`` is not positive.
    """

    SCHEMA: ClassVar[str] = "int size, float alpha, float beta, float k, int groups"

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    groups: int = 1

    def __post_init__(self) -> None:
        op = "local_response_norm"
        object.__setattr__(self, "size", _int(op, "size", self.size))
        object.__setattr__(self, "groups", _int(op, "groups", self.groups))
        for name, value in (("alpha", self.alpha), ("beta", self.beta), ("k", self.k)):
            if type(value) is not float:
                if not isinstance(value, float | int | Real):
                    raise TypeError(f"{op}(): argument '{name}' must be a number, not {type(value).__name__}")
                object.__setattr__(self, name, float(value))
        if self.size <= 0:
            raise RuntimeError(f"{op}(): size must be greater than zero, but got size={self.size}")
        if self.groups <= 0:
            raise ValueError(f"{op}(): groups must be greater than zero, but got groups={self.groups}")

    def op_args(self) -> tuple[int, float, float, float, int]:
        """``size, alpha, beta, k, groups`` as the registered ops take them."""
        return self.size, self.alpha, self.beta, self.k, self.groups

    @staticmethod
    @lru_cache
    def from_op(size: int, alpha: float, beta: float, k: float, groups: int) -> LRNParams:
        """The parameters of which these are the :meth:`op_args`."""
        return LRNParams(size, alpha, beta, k, groups)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ValueError if an input of this shape cannot be normalized."""
        if len(shape) < 3:
            raise ValueError(
                f"local_response_norm(): expected 3D or higher dimensionality input (got {len(shape)} dimensions)"
            )
        if shape[1] % self.groups:
            raise ValueError(
                f"local_response_norm(): groups must divide the channels, but got groups={self.groups} "
                f"for an input of {shape[1]} channels"
            )


@dataclass(frozen=True)
class PoolParams:
    """Parameters of max pooling, as in :func:`torch.nn.functional.max_pool2d`.

    Args:
        kernel_size: height and width of the window, one int or two, each at least 1.
        stride: default ``kernel_size``.
        padding: implicit ``-inf`` on both sides, at most half the (dilated) window.
        dilation: distance between the window's elements.
        ceil_mode: let the last window start inside the input and end outside.

    Raises:
        TypeError: an argument is not an int or ints.
        RuntimeError: a value torch refuses.
    """

    SCHEMA: ClassVar[str] = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode"

    kernel_size: IntOrPair
    stride: IntOrPair | None = None
    padding: IntOrPair = 0
    dilation: IntOrPair = 1
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.ceil_mode, bool):
            raise TypeError(f"max_pool2d(): argument 'ceil_mode' must be bool, not {type(self.ceil_mode).__name__}")
        kernel = _pair("kernel_size", self.kernel_size)
        # torch takes an empty stride, like None, for "the kernel size"
        given = self.stride
        same = given is None or (type(given) is not int and isinstance(given, Sequence) and len(given) == 0)
        stride = kernel if same else _pair("stride", given)
        padding, dilation = _pair("padding", self.padding), _pair("dilation", self.dilation)
        object.__setattr__(self, "_op_args", (kernel, stride, padding, dilation, self.ceil_mode))
        for name, pair in (("kernel_size", kernel), ("stride", stride), ("dilation", dilation)):
            if min(pair) <= 0:
                raise RuntimeError(f"max_pool2d(): {name} should be greater than zero, but got {name}={pair}")
            if max(pair) >= 2**31:
                raise RuntimeError(f"max_pool2d(): {name} should be less than 2**31, but got {name}={pair}")
        if min(padding) < 0:
            raise RuntimeError(f"max_pool2d(): padding must be non-negative, but got padding={padding}")
        for p, size, d in zip(padding, kernel, dilation, strict=True):
            if p > size // 2 or p > ((size - 1) * d + 1) // 2:
                raise RuntimeError(
                    "max_pool2d(): padding should be at most half of the kernel size, "
                    f"but got padding={padding}, kernel_size={kernel} and dilation={dilation}"
                )

    def op_args(self) -> tuple[list[int], list[int], list[int], list[int], bool]:
        """``kernel_size, stride, padding, dilation, ceil_mode`` as the registered ops take them."""
        return self._op_args  # type: ignore[attr-defined]

    @staticmethod
    def from_op(
        kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
    ) -> PoolParams:
        """The parameters of which these are the :meth:`op_args`."""
        return _pool_params(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), ceil_mode)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the pooled map; RuntimeError if nothing is left of it."""
        kernel, stride, padding, dilation, ceil_mode = self.op_args()
        oh, ow = pooled_size((height, width), kernel, stride, padding, dilation, ceil_mode)
        if oh < 1 or ow < 1:
            raise RuntimeError(
                f"max_pool2d(): an input of size {height}x{width} gives an output of size {oh}x{ow} with "
                f"kernel_size={kernel}, stride={stride}, padding={padding}, dilation={dilation}: at least 1x1 is needed"
            )
        return oh, ow


@dataclass(frozen=True)
class AugmentParams:
    """Parameters of :func:`fastcnn.functional.augment`.

    Args:
        crop: height and width of the crops, one int or two, each at least 1.
        scale: of each of the three channels.
        dtype: of the result: float16, bfloat16, float32 or float64.
        memory_format: of the result: ``torch.channels_last`` or ``torch.contiguous_format``.

    Raises:
        TypeError: an argument is of the wrong type.
        NotImplementedError: ``dtype`` is not one of these.
        RuntimeError: ``crop`` is not positive, ``scale`` is not of three channels, or ``memory_format`` is another.
    """

    SCHEMA: ClassVar[str] = "int[] crop, float[] scale, ScalarType dtype, bool channels_last"

    crop: IntOrPair
    scale: Sequence[float] = (1.0, 1.0, 1.0)
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.channels_last

    def __post_init__(self) -> None:
        op = "augment"
        crop, scale = _pair("crop", self.crop, op), self.scale
        if not isinstance(scale, Sequence) or not all(isinstance(factor, Real) for factor in scale):
            raise TypeError(f"{op}(): argument 'scale' must be a tuple of three numbers, not {scale!r}")
        for name, kind in (("dtype", torch.dtype), ("memory_format", torch.memory_format)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"{op}(): argument '{name}' must be torch.{kind.__name__}, not {type(value).__name__}")
        if min(crop) <= 0:
            raise RuntimeError(f"{op}(): crop must be greater than zero, but got crop={crop}")
        if len(scale) != 3:
            raise RuntimeError(f"{op}(): scale must have three factors, one per channel, but got scale={scale}")
        if self.dtype not in FLOATING_DTYPES:
            raise NotImplementedError(
                f"{op}(): not implemented for dtype={self.dtype}; allowed are float16, bfloat16, float32 and float64"
            )
        if self.memory_format not in (torch.channels_last, torch.contiguous_format):
            raise RuntimeError(
                f"{op}(): memory_format must be torch.channels_last or torch.contiguous_format, "
                f"but got {self.memory_format}"
            )
        channels_last = self.memory_format == torch.channels_last
        object.__setattr__(self, "_op_args", (crop, [float(factor) for factor in scale], self.dtype, channels_last))

    def op_args(self) -> tuple[list[int], list[float], torch.dtype, bool]:
        """``crop, scale, dtype, channels_last`` as the registered op takes them."""
        return self._op_args  # type: ignore[attr-defined]

    @staticmethod
    def from_op(crop: list[int], scale: list[float], dtype: torch.dtype, channels_last: bool) -> AugmentParams:
        """The parameters of which these are the :meth:`op_args`."""
        return AugmentParams(crop, scale, dtype, format_of(channels_last))  # not cached: -0.0 is equal to 0.0

    def check_tensors(self, input: Tensor, offsets: Tensor, mirror: Tensor, mean: Tensor, sizes: Tensor | None) -> None:
        """Raise what torch would raise where a tensor is not what :func:`fastcnn.functional.augment` says."""
        op = "augment"
        given = {"input": input, "offsets": offsets, "mirror": mirror, "mean": mean}
        if sizes is not None:
            given["sizes"] = sizes
        for name, value in given.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{op}(): argument '{name}' must be Tensor, not {type(value).__name__}")
            if value.layout != torch.strided:
                raise NotImplementedError(f"{op}(): {name} must have layout torch.strided, got {value.layout}")
        if input.dim() != 4 or input.shape[3] != 3:
            raise RuntimeError(
                f"{op}(): expected a 4D (N, H, W, 3) input, but got input of size {list(input.shape)} "
                f"({input.dim()} dimensions)"
            )
        if input.dtype != torch.uint8:
            raise NotImplementedError(f"{op}(): not implemented for input of dtype {input.dtype}; allowed is uint8")
        n = input.shape[0]
        pairs = (n, 2), torch.int64
        wanted = {"offsets": pairs, "sizes": pairs, "mirror": ((n,), torch.bool), "mean": ((n, 3), mean.dtype)}
        for name, value in given.items():
            shape, dtype = wanted.get(name, (value.shape, value.dtype))
            if value.shape != shape or value.dtype != dtype:
                raise RuntimeError(
                    f"{op}(): expected {name} of size {list(shape)} and {dtype}, but got size {list(value.shape)} and "
                    f"{value.dtype}"
                )
            if value.device not in (input.device, torch.device("cpu")):
                raise RuntimeError(
                    f"{op}(): expected {name} on the CPU or with the input on {input.device}, but it is on "
                    f"{value.device}"
                )
        if torch.is_grad_enabled() and mean.requires_grad:
            raise RuntimeError(
                f"{op}(): it is not differentiable with respect to argument 'mean', which cannot have "
                "requires_grad True"
            )
        if not mean.is_floating_point():
            raise RuntimeError(f"{op}(): expected mean of a floating-point dtype, but got {mean.dtype}")

    def check_values(self, shape: Sequence[int], offsets: Tensor, sizes: Tensor | None) -> None:
        """Raise ValueError if a crop is not within its picture, or a picture cannot be resized."""
        (n, h, w), (ch, cw) = shape[:3], self.op_args()[0]
        if n == 0:
            return
        if sizes is not None:
            least, most = int(sizes.min()), int(sizes.max())
            if min(h, w, least) < 1 or max(h, w, most) > MOST_RESIZED:
                raise ValueError(
                    f"augment(): pictures can be resized from and to 1 to {MOST_RESIZED} pixels, but got pictures of "
                    f"{h}x{w} and sizes from {least} to {most}"
                )
            last = sizes.to(offsets.device) - offsets.new_tensor((ch, cw))
        else:
            last = offsets.new_tensor((h - ch, w - cw))
        if ((offsets < 0) | (offsets > last)).any():
            of = f"pictures of {h}x{w}" if sizes is None else "the resized pictures"
            raise ValueError(f"augment(): there are crops of {ch}x{cw} that are not within {of}")

    def dense(
        self, input: Tensor, offsets: Tensor, mirror: Tensor, mean: Tensor, sizes: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """What kernels take: all of it checked, dense, with the input, the mean in the dtype of the computation."""
        self.check_tensors(input, offsets, mirror, mean, sizes)  # again: the op may have been called directly
        self.check_values(input.shape, offsets, sizes)
        device = input.device
        return (
            input.contiguous(),
            offsets.to(device).contiguous(),
            mirror.to(device).contiguous(),
            mean.to(device, opmath(self.dtype)).contiguous(),
            None if sizes is None else sizes.to(device).contiguous(),
        )


@dataclass(frozen=True)
class TailParams:
    """Parameters of :func:`fastcnn.functional.relu_lrn_max_pool2d`; LRN and pool are None where they are absent."""

    SCHEMA: ClassVar[str] = f"bool relu, {LRNParams.SCHEMA}, {PoolParams.SCHEMA}"

    relu: bool = True
    lrn: LRNParams | None = None
    pool: PoolParams | None = None

    def __post_init__(self) -> None:
        lrn = (0, 0.0, 0.0, 0.0, 1) if self.lrn is None else self.lrn.op_args()
        pool = ([], [], [], [], False) if self.pool is None else self.pool.op_args()
        object.__setattr__(self, "_op_args", (self.relu, *lrn, *pool))

    def op_args(self) -> tuple[Any, ...]:
        """As the registered ops take them: LRN of size 0 and a pool with an empty kernel are none."""
        return self._op_args  # type: ignore[attr-defined]

    @staticmethod
    def from_op(relu: bool, size: int, alpha: float, beta: float, k: float, groups: int, *pool: Any) -> TailParams:
        """The parameters of which these are the :meth:`op_args`."""
        kernel, stride, padding, dilation, ceil_mode = pool
        windows = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)
        return _tail_params(relu, size, alpha, beta, k, groups, *windows, ceil_mode)


@dataclass(frozen=True)
class BatchNormParams:
    """Parameters of :func:`fastcnn.functional.batch_norm_relu_max_pool2d` but for the momentum.

    Args:
        training: whether the statistics are those of the batch.
        eps: is added to the variance.
        relu: whether to rectify.
        relu_first: whether before the batch norm.
        pool: None where it is absent.
    """

    SCHEMA: ClassVar[str] = f"bool training, float eps, bool relu, bool relu_first, {PoolParams.SCHEMA}"

    training: bool
    eps: float = 1e-5
    relu: bool = True
    relu_first: bool = False
    pool: PoolParams | None = None

    def __post_init__(self) -> None:
        pool = ([], [], [], [], False) if self.pool is None else self.pool.op_args()
        args = bool(self.training), float(self.eps), bool(self.relu), bool(self.relu_first), *pool
        object.__setattr__(self, "_op_args", args)

    def op_args(self) -> tuple[Any, ...]:
        """As the registered ops take them: a pool with an empty kernel is none."""
        return self._op_args  # type: ignore[attr-defined]

    @staticmethod
    def from_op(training: bool, eps: float, relu: bool, relu_first: bool, *pool: Any) -> BatchNormParams:
        """The parameters of which these are the :meth:`op_args`."""
        *windows, ceil_mode = pool
        return _batch_norm_params(training, eps, relu, relu_first, *map(tuple, windows), ceil_mode)

    def check_tensors(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        """Raise what :func:`torch.nn.functional.batch_norm` raises where they do not go together."""
        op = "batch_norm_relu_max_pool2d"
        check_input(op, input)
        if input.dim() < 2:
            raise IndexError(f"{op}(): expected an input with channels (got {input.dim()} dimensions)")
        count = input.numel() // max(input.shape[1], 1)
        if self.training and count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        if self.eps < 0 or (self.training and self.eps == 0):
            allowed = "positive during training" if self.training else "non-negative"
            raise ValueError(f"batch_norm eps must be {allowed}, but got {self.eps}")
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        if running_mean is None and not self.training:
            raise RuntimeError(f"{op}(): running_mean and running_var must be defined in evaluation mode")
        tensors = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
        for name, value in tensors.items():
            check_bias(op, value, input, name=name)


def pooled_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    """Output height and width of a pool, by torch's rule: with ``ceil_mode`` no window starts in the padding behind."""
    out = []
    for i in range(2):
        span = size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1
        o = (span + (stride[i] - 1 if ceil_mode else 0)) // stride[i] + 1
        if ceil_mode and (o - 1) * stride[i] >= size[i] + padding[i]:
            o -= 1
        out.append(o)
    return out


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast as autocast does for a convolution, if it is on where the first tensor is: all but float64 to its dtype."""
    first = tensors[0]
    if not isinstance(first, Tensor):
        return tensors
    device = first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast, and asking is an error
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.double else t for t in tensors
    )


@dataclass(frozen=True)
class ConvParams:
    """Parameters of a convolution, as in :func:`torch.nn.functional.conv2d`; :meth:`of` checks them and the tensors."""

    SCHEMA: ClassVar[str] = "int[] stride, int[] padding, int[] dilation, int groups"

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def op_args(self) -> tuple[list[int], list[int], list[int], int]:
        """``stride, padding, dilation, groups`` as the registered ops take them."""
        return self.stride, self.padding, self.dilation, self.groups

    @staticmethod
    def from_op(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> ConvParams:
        """The parameters of which these are the :meth:`op_args`."""
        return _conv_params(tuple(stride), tuple(padding), tuple(dilation), groups)

    def output_shape(self, input: Sequence[int], weight: Sequence[int]) -> list[int]:
        """(N, O, OH, OW) of the convolution of an input and a weight of these shapes."""
        padded = [size + 2 * p for size, p in zip(input[2:], self.padding, strict=True)]
        window = [d * (k - 1) + 1 for k, d in zip(weight[2:], self.dilation, strict=True)]
        return [input[0], weight[0], *((p - k) // s + 1 for p, k, s in zip(padded, window, self.stride, strict=True))]

    @staticmethod
    def of(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: IntOrPair,
        padding: IntOrPair | str,
        dilation: IntOrPair,
        groups: int,
    ) -> tuple[ConvParams, list[int]]:
        """The checked parameters, and for an uneven ``padding="same"`` what :func:`torch.nn.functional.pad` must add.

        Raises:
            TypeError, RuntimeError, NotImplementedError: what torch's convolution raises.
        """
        op = "conv2d_relu"
        check_input(op, input)
        if not isinstance(weight, Tensor):
            raise TypeError(f"{op}(): argument 'weight' must be Tensor, not {type(weight).__name__}")
        if input.dim() not in (3, 4):
            raise RuntimeError(
                f"{op}(): expected 3D (unbatched) or 4D (batched) input, but got input of size {list(input.shape)}"
            )
        if weight.dim() != 4 or 0 in weight.shape[2:]:
            raise RuntimeError(
                f"{op}(): expected a 4D weight that is not empty, but got weight of size {list(weight.shape)}"
            )
        if weight.dtype != input.dtype or weight.device != input.device:
            raise RuntimeError(
                f"{op}(): input type ({input.dtype} on {input.device}) and weight type "
                f"({weight.dtype} on {weight.device}) should be the same"
            )
        groups = _int(op, "groups", groups)
        if groups <= 0:
            raise RuntimeError(f"{op}(): groups must be greater than zero, but got groups={groups}")
        if weight.shape[0] == 0 or weight.shape[0] % groups:
            raise RuntimeError(
                f"{op}(): groups must divide the output channels, but got groups={groups} "
                f"for a weight of size {list(weight.shape)}"
            )
        if input.shape[-3] != weight.shape[1] * groups:
            raise RuntimeError(
                f"{op}(): given groups={groups} and weight of size {list(weight.shape)}, expected input to have "
                f"{weight.shape[1] * groups} channels, but got input of size {list(input.shape)}"
            )
        check_bias(op, bias, input, weight.shape[0])
        if bias is not None and bias.dtype != input.dtype:
            raise RuntimeError(f"{op}(): input type ({input.dtype}) and bias type ({bias.dtype}) should be the same")

        strides, dilations = _pair("stride", stride, op), _pair("dilation", dilation, op)
        for name, pair in (("stride", strides), ("dilation", dilations)):
            if min(pair) <= 0:
                raise RuntimeError(f"{op}(): {name} must be greater than zero, but got {name}={pair}")
        asymmetric: list[int] = []
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                raise RuntimeError(f"{op}(): padding must be 'same', 'valid' or ints, but got padding={padding!r}")
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, weight.shape[2:], strict=True)]
            if padding == "same" and max(strides) > 1:
                raise RuntimeError(f"{op}(): padding='same' needs stride 1, but got stride={strides}")
            paddings = [t // 2 for t in total]
            if any(t % 2 for t in total):
                asymmetric = [0, total[1] % 2, 0, total[0] % 2]  # as torch: the odd one behind
        else:
            paddings = _pair("padding", padding, op)
        if min(paddings) < 0:
            raise RuntimeError(f"{op}(): padding must be non-negative, but got padding={paddings}")
        for i in (0, 1):
            padded = input.shape[i - 2] + 2 * paddings[i] + (asymmetric[3 - 2 * i] if asymmetric else 0)
            kernel = dilations[i] * (weight.shape[2 + i] - 1) + 1
            if padded < kernel:
                raise RuntimeError(
                    f"{op}(): the kernel can't be greater than the padded input, but got weight of size "
                    f"{list(weight.shape)}, dilation={dilations} and padding={paddings} for input of size "
                    f"{list(input.shape)}"
                )
        return ConvParams(strides, paddings, dilations, groups), asymmetric


def _pair(name: str, value: object, op: str = "max_pool2d") -> list[int]:
    if type(value) is int:
        return [value, value]
    if isinstance(value, int | torch.SymInt | Integral) and not isinstance(value, bool):
        return [_int(op, name, value)] * 2
    if not isinstance(value, Sequence) or isinstance(value, str):
        kind = type(value).__name__
        raise TypeError(f"{op}(): argument '{name}' must be int or a tuple of two ints, not {kind}")
    if len(value) not in (1, 2):
        raise RuntimeError(f"{op}(): {name} must either be a single int, or a tuple of two ints, but got {value}")
    return [_int(op, name, value[0]), _int(op, name, value[-1])]


@dataclass
class ConvBackwardParams:
    """Size and memory format of a convolution's input, the convolution, and which gradients backward must compute."""

    SCHEMA: ClassVar[str] = f"SymInt[] input_size, bool channels_last, {ConvParams.SCHEMA}, bool[] needs"

    size: list[int]
    channels_last: bool
    conv: ConvParams
    needs: list[bool]  # of input, weight and bias

    def op_args(self) -> tuple[Any, ...]:
        """As the registered op takes them."""
        return self.size, self.channels_last, *self.conv.op_args(), self.needs

    @staticmethod
    def from_op(size: list[int], channels_last: bool, *rest: Any) -> ConvBackwardParams:
        """The parameters of which these are the :meth:`op_args`."""
        *conv, needs = rest
        return ConvBackwardParams(size, channels_last, ConvParams.from_op(*conv), needs)


# What `from_op` makes, once for the same arguments; lists are not hashable.
_pool_params = lru_cache(PoolParams)


@lru_cache
def _conv_params(
    stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> ConvParams:
    return ConvParams(list(stride), list(padding), list(dilation), groups)


@lru_cache
def _tail_params(relu: bool, size: int, alpha: float, beta: float, k: float, groups: int, *pool: Any) -> TailParams:
    lrn = LRNParams(size, alpha, beta, k, groups) if size else None
    return TailParams(relu, lrn, PoolParams(*pool) if pool[0] else None)


@lru_cache
def _batch_norm_params(training: bool, eps: float, relu: bool, relu_first: bool, *pool: Any) -> BatchNormParams:
    return BatchNormParams(training, eps, relu, relu_first, PoolParams(*pool) if pool[0] else None)
