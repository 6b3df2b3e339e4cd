"""oneDNN's convolutions: where they run, their packed weights, and where their ReLU is that of torch."""

import torch
from torch import Tensor

from ...memory_format import flat


def runs(x: Tensor) -> bool:
    """oneDNN fuses the ReLU only for the dtypes its convolutions have on this machine; 16-bit ones need AVX-512."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled or x.numel() == 0:
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype == torch.float32 or (x.dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported())


def pack(weight: Tensor, x: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Tensor:
    """``weight`` in the blocked format that oneDNN prefers for an input like ``x``; good for any."""
    return torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
        weight.detach().to_mkldnn(), padding, stride, dilation, groups, x.shape
    )


def magnitude(t: Tensor | None) -> float:
    """The largest absolute value, NaN if there is one."""
    if t is None or not t.numel():
        return 0.0
    low, high = torch.aminmax(flat(t))  # both NaN if there is one
    return max(-low.item(), high.item())
