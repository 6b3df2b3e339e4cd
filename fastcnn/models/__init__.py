"""Networks as published, built by name from fused layers or, with ``plain=True``, from those of torch."""

from typing import TYPE_CHECKING, Any

from . import alexnet, inception_v1, squeezenet, vgg, zfnet  # noqa: F401  (they register their models)
from .convnet import ConvNet
from .errors import WeightsError
from .inception_v1 import InceptionOutputs, InceptionV1
from .preprocessing import PREPROCESSINGS, Preprocessing
from .registry import create_model, list_models, register_model
from .squeezenet import SqueezeNet
from .weights import WeightsReport, load_weights

__all__ = [
    "PREPROCESSINGS",
    "ConvNet",
    "InceptionOutputs",
    "InceptionV1",
    "Preprocessing",
    "SqueezeNet",
    "WeightsError",
    "WeightsReport",
    "create_model",
    "from_onnx",
    "list_models",
    "load_weights",
    "register_model",
    "to_onnx",
]

if TYPE_CHECKING:
    from .onnx_files import from_onnx, to_onnx


def __getattr__(name: str) -> Any:
    """What takes longer to import than the rest, when it is used."""
    if name in ("from_onnx", "to_onnx"):
        from . import onnx_files

        return getattr(onnx_files, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
