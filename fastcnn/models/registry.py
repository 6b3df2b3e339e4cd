"""The models by name."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Factory = TypeVar("Factory", bound=Callable[..., nn.Module])

_factories: dict[str, Callable[..., nn.Module]] = {}


def register_model(factory: Any = None, **defaults: Any) -> Any:
    """Decorator: make ``factory`` known to :func:`create_model` under its own name.

    Its keyword arguments are the model's options; ``num_classes`` and ``plain`` must be among them. With ``defaults``,
    of ``input_size``, ``dropout`` and ``init`` for example, the factory takes ``**common`` and gets all of them in it.

    Raises:
        ValueError: the name is taken.
    """
    if factory is None:
        return lambda factory: register_model(_with_common_options(factory, defaults))
    name = factory.__name__
    if name in _factories:
        raise ValueError(f"register_model(): a model named {name!r} is already registered")
    _factories[name] = factory
    return factory


def _with_common_options(factory: Factory, defaults: dict[str, Any]) -> Factory:
    common = {"num_classes": 1000, **defaults, "plain": False}
    own = [p for p in inspect.signature(factory).parameters.values() if p.kind != p.VAR_KEYWORD]
    options = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in common.items()]

    @functools.wraps(factory)
    def model(**given: Any) -> nn.Module:
        return factory(**{**common, **given})

    model.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]
    return model  # type: ignore[return-value]


def list_models() -> list[str]:
    """Names that :func:`create_model` knows, sorted."""
    return sorted(_factories)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    input_size: int | None = None,
    dropout: str | None = None,
    init: str | None = None,
    plain: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a model by name.

    Args:
        name: one of :func:`list_models`.
        num_classes: number of logits.
        input_size: height and width of the images. For this and the next two, None is the model's own default.
        dropout: how the dropout of the hidden fully connected layers is scaled.
        init: how weights and biases are drawn, from torch's global generator.
        plain: build it from the layers of torch instead of fused ones: same ``state_dict``, same outputs.
        options: what else the model's function takes, such as ``width`` of AlexNet and VGG.

    Returns:
        The model, in training mode.

    Raises:
        TypeError: the model does not take one of the options, or a value is of the wrong type.
        ValueError: no model has this name, or a value is not allowed.
    """
    if not isinstance(name, str):
        raise TypeError(f"create_model(): argument 'name' must be str, not {type(name).__name__}")
    if name not in _factories:
        raise ValueError(f"create_model(): no model is named {name!r}; the names are: {', '.join(list_models())}")
    given = {"input_size": input_size, "dropout": dropout, "init": init}
    options.update((option, value) for option, value in given.items() if value is not None)
    options.update(num_classes=num_classes, plain=plain)
    allowed = inspect.signature(_factories[name]).parameters
    for option, value in options.items():
        if option not in allowed:
            given_as = option if isinstance(value, nn.Module) else f"{option}={value!r}"
            raise TypeError(f"{name}(): got an unexpected option {given_as}; allowed are: {', '.join(allowed)}")
    return _factories[name](**options)
