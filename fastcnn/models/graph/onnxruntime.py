"""What onnxruntime computes of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Runtime:
    """A file, or the bytes of one, loaded into onnxruntime on CPU.

    Raises:
        ImportError: onnxruntime is not installed.
        Exception: whatever it raises for a file that it refuses.
    """

    def __init__(self, file: Path | bytes) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ImportError("this needs the package onnxruntime: pip install fastcnn[models]") from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        given: Any = str(file) if isinstance(file, Path) else file
        self._session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        (self._input,) = self._session.get_inputs()

    @property
    def shape(self) -> list[Any]:
        """Of the input: numbers, and names or None for what may have any length."""
        return self._input.shape

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, {self._input.name: x.numpy()})[0])


def difference(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||; infinite for other shapes, and where only one of them is not finite."""
    if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = (t.double().nan_to_num(0, 0, 0) for t in (a, b))
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()
