"""Checks of the models' options, at the door."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any


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
