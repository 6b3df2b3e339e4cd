"""Local response normalization where a model is exported to ONNX: as ONNX's operator LRN, not as its parts."""

import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..params import LRNParams


def is_exporting() -> bool:
    """Whether one of torch's exporters to ONNX is at work."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, groups: int = 1
) -> Tensor:
    """:func:`fastcnn.reference.local_response_norm`; ONNX's LRN in an export, where that exists: for an odd window.

    Groups become a part of the batch, as ONNX has none.
    """
    if not is_exporting() or size % 2 == 0:
        return reference.local_response_norm(input, size, alpha, beta, k, groups=groups)
    shape = input.shape
    x = input if groups == 1 else input.reshape(-1, shape[1] // groups, *shape[2:])
    lrn = LRNParams(size, alpha, beta, k)
    if torch.jit.is_tracing():
        _register()
        y = torch.ops.fastcnn.lrn(x, *lrn.op_args())
    else:
        attributes: dict[str, Any] = {"size": size, "alpha": float(alpha), "beta": float(beta), "bias": float(k)}
        y = torch.onnx.ops.symbolic("LRN", (x,), attributes, dtype=x.dtype, shape=x.shape, version=13)
    return y if groups == 1 else y.reshape(-1, *shape[1:])


@cache
def _register() -> None:
    """Tell the exporter that works by tracing which operator ``fastcnn::lrn`` is."""

    @torch.onnx.symbolic_helper.parse_args("v", "i", "f", "f", "f", "i")
    def symbolic(graph: Any, x: Any, size: int, alpha: float, beta: float, k: float, groups: int) -> Any:
        y = graph.op("LRN", x, size_i=size, alpha_f=alpha, beta_f=beta, bias_f=k)
        y.setType(x.type())
        return y

    torch.onnx.register_custom_op_symbolic("fastcnn::lrn", symbolic, 9)
