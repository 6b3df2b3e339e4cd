"""Checks of the models' options and inputs, at the door."""

import operator
from collections.abc import Callable, Collection
from itertools import count
from typing import Any

from torch import Tensor

MAX_WIDTH = 1000

Smallest = tuple[tuple[str, int], ...]  # layers in the order they run, and the smallest image of which they leave a map


def check_choice(model: str, option: str, value: Any, allowed: Collection[Any]) -> None:
    """Raise ValueError unless ``value`` is one of the ``allowed``, in value and type."""
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        choices = " or ".join(map(repr, allowed))
        raise ValueError(f"{model}(): {option} must be {choices}, but got {option}={value!r}")


def check_positive(model: str, option: str, value: Any) -> int:
    """``value`` as an int; TypeError if it is none, ValueError if it is not positive."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{model}(): argument '{option}' must be int, not {type(value).__name__}")
    if number < 1:
        raise ValueError(f"{model}(): {option} must be at least 1, but got {option}={number}")
    return number


def check_width(model: str, width: Any) -> float:
    """``width`` as a float; TypeError if it is not a number, ValueError if it is not positive, or above MAX_WIDTH."""
    if isinstance(width, bool) or not isinstance(width, int | float):
        raise TypeError(f"{model}(): argument 'width' must be float, not {type(width).__name__}")
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"{model}(): width must be positive and at most {MAX_WIDTH}, but got width={width}")
    return float(width)


def smallest_images(map_sizes: Callable[[int], dict[str, int]]) -> Smallest:
    """Given the sizes of the maps behind the layers, by the size of the image, up to the one that vanishes."""
    smallest: dict[str, int] = {}
    for size in count(1):
        sizes = map_sizes(size)
        for layer, left in sizes.items():
            if left > 0:
                smallest.setdefault(layer, size)
        if all(left > 0 for left in sizes.values()):
            return tuple(smallest.items())
    raise AssertionError


def check_input_size(model: str, input_size: int, smallest: Smallest) -> int:
    """``input_size`` as an int; ValueError names the layer at which nothing is left of a map."""
    input_size = check_positive(model, "input_size", input_size)
    layer = _vanishes(input_size, smallest)
    if layer is not None:
        raise ValueError(
            f"{model}(): input_size must be at least {smallest[-1][1]}, but got input_size={input_size}: "
            f"nothing is left of the map at {layer}"
        )
    return input_size


def check_images(input: Tensor, model: str, size: int, smallest: Smallest) -> Tensor:
    """``input``, if it is a batch of images of this size.

    It looks at shapes, which tracing by torch.fx has none of: the modules that call it wrap it.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"{model}(): argument 'input' must be Tensor, not {type(input).__name__}")
    if input.dim() == 4 and input.shape[1:] == (3, size, size):
        return input
    message = f"{model}(): expected an input of shape (N, 3, {size}, {size}), but got {tuple(input.shape)}"
    if input.dim() == 4 and input.shape[1] == 3:
        layer = _vanishes(min(input.shape[2:]), smallest)
        message += (
            f": nothing would be left of the map at {layer}"
            if layer is not None
            else "; resize or crop the images, or create the model with their input_size"
        )
    raise RuntimeError(message)


def _vanishes(size: int, smallest: Smallest) -> str | None:
    """The first layer that leaves nothing of an image of this size."""
    return next((layer for layer, least in smallest if size < least), None)
