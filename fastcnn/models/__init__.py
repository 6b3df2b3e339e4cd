"""Networks as published, built by name from fused layers or, with ``plain=True``, from those of torch."""

from . import alexnet, inception_v1, vgg, zfnet  # noqa: F401  (they register their models)
from .convnet import ConvNet
from .inception_v1 import InceptionOutputs, InceptionV1
from .preprocessing import PREPROCESSINGS, Preprocessing
from .registry import create_model, list_models, register_model
from .weights import WeightsError, WeightsReport, load_weights

__all__ = [
    "PREPROCESSINGS",
    "ConvNet",
    "InceptionOutputs",
    "InceptionV1",
    "Preprocessing",
    "WeightsError",
    "WeightsReport",
    "create_model",
    "list_models",
    "load_weights",
    "register_model",
]
