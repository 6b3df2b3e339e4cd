"""Networks as published, built by name from fused layers or, with ``plain=True``, from those of torch."""

from .alexnet import AlexNet
from .registry import create_model, list_models, register_model

__all__ = ["AlexNet", "create_model", "list_models", "register_model"]
