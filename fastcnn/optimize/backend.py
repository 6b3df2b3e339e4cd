"""``torch.compile(model, backend="fastcnn")``."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from .graph import fuse


def fastcnn(
    module: fx.GraphModule, example_inputs: list[Tensor], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend of :func:`torch.compile` that runs the stages of a graph fused, and leaves the rest as it is.

    Args:
        module: the graph.
        example_inputs: its inputs.
        options: ``{"inner": name}`` hands the graph with its fused stages to another backend, such as "inductor".

    Raises:
        ValueError: an option has another name.
    """
    from torch._dynamo import lookup_backend

    options = dict(options or {})
    inner = options.pop("inner", None)
    if options:
        raise ValueError(f"backend 'fastcnn' has no options {sorted(options)}; it has 'inner'")
    fuse(module.graph, {})
    module = fx.GraphModule(module, module.graph)
    return module.forward if inner is None else lookup_backend(inner)(module, example_inputs)
