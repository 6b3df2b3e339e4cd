"""The public operators as layers: drop-in replacements for those of torch.nn, with their arguments and state_dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional as FF
from .params import AugmentParams, IntOrPair, LRNParams, PoolParams


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """Local response normalization across channels, as :class:`torch.nn.LocalResponseNorm`, plus ``groups``.

    Args:
        size: window length in channels.
        alpha: factor of the window's mean square.
        beta: exponent.
        k: additive constant.
        groups: normalize within each of this many equal parts of the channels.

    Shape: (N, C, *) -> the same. See :func:`fastcnn.functional.local_response_norm` for dtypes and errors.
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, groups: int = 1) -> None:
        LRNParams(size, alpha, beta, k, groups)  # raises for what forward would refuse
        super().__init__(size, alpha, beta, k)
        self.groups = groups

    @classmethod
    def from_caffe(
        cls, local_size: int = 5, alpha: float = 1.0, beta: float = 0.75, k: float = 1.0, *, groups: int = 1
    ) -> LocalResponseNorm:
        """From the fields of Caffe's ``LRNParameter`` (ACROSS_CHANNELS), with Caffe's defaults.

        Caffe too divides ``alpha`` by the window, so the values stay; it refuses an even ``local_size``.

        Raises:
            ValueError: ``local_size`` is even.
        """
        if local_size % 2 == 0:
            raise ValueError(f"from_caffe(): local_size must be odd, as in Caffe, but got local_size={local_size}")
        return cls(local_size, alpha, beta, k, groups=groups)

    @classmethod
    def from_tf(
        cls, depth_radius: int = 5, bias: float = 1.0, alpha: float = 1.0, beta: float = 0.5, *, groups: int = 1
    ) -> LocalResponseNorm:
        """From the arguments of ``tf.nn.local_response_normalization``, with TensorFlow's defaults.

        The window has ``2 * depth_radius + 1`` channels, and TensorFlow multiplies ``alpha`` by the plain sum.

        Raises:
            ValueError: ``depth_radius`` is negative.
        """
        if depth_radius < 0:
            raise ValueError(f"from_tf(): depth_radius must not be negative, but got depth_radius={depth_radius}")
        size = 2 * depth_radius + 1
        return cls(size, alpha * size, beta, bias, groups=groups)

    @classmethod
    def from_onnx(
        cls, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, *, groups: int = 1
    ) -> LocalResponseNorm:
        """From the attributes of the ONNX operator ``LRN``, with its defaults.

        Raises:
            ValueError: ``size`` is even. ONNX then looks one channel further ahead, torch one further back, so no
                torch layer equals it.
        """
        if size % 2 == 0:
            raise ValueError(
                f"from_onnx(): size must be odd, but got size={size}: an even ONNX window, "
                "c - (size-1)//2 ... c + size//2, has no torch equivalent (torch's is c - size//2 ... c + (size-1)//2)"
            )
        return cls(size, alpha, beta, bias, groups=groups)

    def forward(self, input: Tensor) -> Tensor:
        return FF.local_response_norm(input, self.size, self.alpha, self.beta, self.k, groups=self.groups)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", groups={self.groups}" if self.groups != 1 else "")


class MaxPool2d(torch.nn.MaxPool2d):
    """Max pooling, as :class:`torch.nn.MaxPool2d`.

    Shape: (N, C, H, W) or (C, H, W) -> the pooled map, with ``return_indices`` a pair of it and its indices.
    See :func:`fastcnn.functional.max_pool2d` for dtypes and errors.
    """

    def forward(self, input: Tensor) -> Any:
        return FF.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices
        )


def convolution_arguments(layer: torch.nn.Conv2d, input: Tensor) -> tuple[Any, ...]:
    """Those of :func:`torch.nn.functional.conv2d` that compute what the layer does of the input."""
    padding = layer.padding
    if layer.padding_mode != "zeros":
        input = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = (0, 0)
    return input, layer.weight, layer.bias, layer.stride, padding, layer.dilation, layer.groups


class ConvReLU2d(torch.nn.Conv2d):
    """Convolution, bias and ReLU: a :class:`torch.nn.Conv2d`, with its arguments and state_dict, that rectifies.

    A ``padding_mode`` other than "zeros" pads first. See :func:`fastcnn.functional.conv2d_relu` for dtypes and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        return FF.conv2d_relu(*convolution_arguments(self, input))


class ReLULRNMaxPool2d(torch.nn.Module):
    """The tail of an AlexNet stage, ``max_pool2d(lrn(relu(input + bias)))``, in one pass.

    Args:
        relu: whether to rectify.
        lrn: the normalization, None for none.
        pool: the pooling, None for none.

    Shape: (N, C, H, W) and optionally a bias (C,) -> (N, C, OH, OW). The layer has no parameters of its own: the bias
    is the convolution's. See :func:`fastcnn.functional.relu_lrn_max_pool2d` for dtypes and errors.
    """

    def __init__(self, *, relu: bool = True, lrn: LRNParams | None = None, pool: PoolParams | None = None) -> None:
        super().__init__()
        self.relu, self.lrn, self.pool = relu, lrn, pool

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return FF.relu_lrn_max_pool2d(input, bias, relu=self.relu, lrn=self.lrn, pool=self.pool)

    def extra_repr(self) -> str:
        return f"relu={self.relu}, lrn={self.lrn}, pool={self.pool}"


class BatchNormReLUMaxPool2d(torch.nn.BatchNorm2d):
    """``max_pool2d(relu(batch_norm(input)))``: a :class:`torch.nn.BatchNorm2d`, with its arguments and state_dict.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as of it.
        relu: whether to rectify.
        relu_first: whether before the batch norm instead of after it.
        pool: the pooling, None for none.

    Shape: (N, C, H, W) -> (N, C, OH, OW). See :func:`fastcnn.functional.batch_norm_relu_max_pool2d` for dtypes and
    errors.
    """

    def __init__(
        self,
        num_features: int,
        *args: Any,
        relu: bool = True,
        relu_first: bool = False,
        pool: PoolParams | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, *args, **kwargs)
        self.relu, self.relu_first, self.pool = relu, relu_first, pool

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average of all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        is_tracked = not self.training or self.track_running_stats
        return FF.batch_norm_relu_max_pool2d(
            input,
            self.running_mean if is_tracked else None,
            self.running_var if is_tracked else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
            relu=self.relu,
            relu_first=self.relu_first,
            pool=self.pool,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relu={self.relu}, relu_first={self.relu_first}, pool={self.pool}"


class Augment(torch.nn.Module):
    """Crop, mirroring, mean and scale of a batch of pictures in bytes, as one pass.

    Args:
        crop: height and width of the crops.
        scale: of each channel.
        dtype: of the result.
        memory_format: of the result.

    Shape: pictures (N, H, W, 3), offsets (N, 2), mirror (N,), mean (N, 3) and optionally sizes (N, 2) -> (N, 3, crop
    height, crop width). See :func:`fastcnn.functional.augment` for them, dtypes and errors.
    """

    def __init__(
        self,
        crop: IntOrPair,
        scale: Sequence[float] = (1.0, 1.0, 1.0),
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__()
        AugmentParams(crop, scale, dtype, memory_format)  # raises for what forward would refuse
        self.crop, self.scale, self.dtype, self.memory_format = crop, scale, dtype, memory_format

    def forward(
        self, input: Tensor, offsets: Tensor, mirror: Tensor, mean: Tensor, sizes: Tensor | None = None
    ) -> Tensor:
        return FF.augment(
            input,
            offsets,
            mirror,
            mean,
            sizes,
            crop=self.crop,
            scale=self.scale,
            dtype=self.dtype,
            memory_format=self.memory_format,
        )

    def extra_repr(self) -> str:
        return f"crop={self.crop}, scale={self.scale}, dtype={self.dtype}, memory_format={self.memory_format}"
