"""``torch.compile(model, backend="fastcnn")``."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from .graph import fuse


def fastcnn(
    module: fx.GraphModule, example_inputs: list[Tensor], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """A backend of :func:`torch.compile` that runs the stages of a graph fused, and leaves the rest as it is.

    Args:
        module: the graph.
        example_inputs: its inputs.
        options: ``{"inner": name}`` hands the graph with its fused stages to another backend, such as "inductor". That
            one takes a ``"mode"`` of :func:`torch.compile` too: "reduce-overhead" makes CUDA graphs.

    Raises:
        ValueError: an option has another name, or there is a mode without "inductor".
    """
    from torch._dynamo import lookup_backend

    options = dict(options or {})
    inner, mode = options.pop("inner", None), options.pop("mode", None)
    if options:
        raise ValueError(f"backend 'fastcnn' has no options {sorted(options)}; it has 'inner' and 'mode'")
    if mode is not None and inner != "inductor":
        raise ValueError(f"backend 'fastcnn' takes mode={mode!r} only for 'inner': 'inductor'")
    fuse(module.graph, {})
    module = fx.GraphModule(module, module.graph)
    if inner is None:
        return module.forward
    settings = {} if mode is None else {"config_patches": torch._inductor.list_mode_options(mode)}
    return lookup_backend(inner)(module, example_inputs, **settings)
