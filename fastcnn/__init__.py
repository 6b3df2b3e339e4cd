"""Fused kernels for AlexNet- and VGG-era networks in PyTorch."""

from . import backends, functional, models, nn, reference
from ._version import __version__
from .optimize import optimize, refresh
from .params import LRNParams, PoolParams

__all__ = [
    "LRNParams",
    "PoolParams",
    "__version__",
    "backends",
    "functional",
    "models",
    "nn",
    "optimize",
    "reference",
    "refresh",
]
