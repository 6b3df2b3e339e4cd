"""Drop-in replacement over a whole model: its layers stay where they are, runs of their calls become one call each."""

import contextlib
import copy
import os
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ops.packed import forget
from ..params import FLOATING_DTYPES
from .offload import Offloaded
from .report import Entry, Report

__all__ = ["Entry", "Report", "optimize", "refresh"]


def optimize(
    model: nn.Module,
    *,
    inference: bool = False,
    dtype: torch.dtype | None = None,
    inplace: bool = False,
    example_inputs: Sequence[Any] | None = None,
    offload: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """The same model with fused calls: same outputs, gradients, side effects, ``state_dict`` and train/eval behaviour.

    Convolution -> ReLU [-> LRN] [-> max-pool], [ReLU ->] LRN [-> max-pool], ReLU -> max-pool, single LRN and max-pool,
    and on CPU batch norm, in training too, with a ReLU after or before it and what follows, be they layers or calls of
    functions, run as the operators of :mod:`fastcnn.functional`. The modules stay as they are. TorchDynamo makes a
    graph of what a call runs when the first of its kind comes, which takes 0.1 to 3 seconds, and another where what it
    took for granted has changed: shapes, modes, hooks, layers, attributes. Where it can make none, the plain forward
    runs, and the report says why; the modules in it then have graphs of their own. So it does under ``torch.compile``,
    ``torch.export``, ``torch.jit.trace``, ``torch.fx`` and the transforms of ``torch.func``, all of which see the plain
    forward. While a graph is made ``torch.compiler.is_compiling()`` is True.

    Inside a graph maps have the memory format in which they are fastest: channels_last on CPU, and on GPUs in 16 bits.
    Parameters keep theirs; gradients and whatever the caller sees have the strides that torch would give them. What
    runs each stage is decided once for each kind of input: torch's own functions where a map is small or nothing here
    is faster. Training on few small images is faster with the parameters in channels_last too
    (``model.to(memory_format=torch.channels_last)``): otherwise each step reorders weights and their gradients.

    On CUDA, cuDNN computes the convolutions, and the operators of :mod:`fastcnn.functional` what follows them. A call
    can be captured in a CUDA graph as it is; ``torch.compile(model, backend="fastcnn", options={"inner": "inductor",
    "mode": "reduce-overhead"})`` captures every graph, with Inductor's kernels for the rest.

    Args:
        model: any module.
        inference: also make it one for inference: in evaluation mode and its weights frozen. Convolutions then have the
            batch norm after them in their weights, and on CPU they add another map before the ReLU, as residual
            networks do, write into a concatenation, and compute from packed copies of their weights, as linear layers
            do. The copies are made anew where torch sees that a weight changed; it does not see writes through
            ``.data`` nor those of another process, after which :func:`refresh` is due.
        dtype: of the weights and to which the inputs of layers with weights are cast, with ``inference``; None: as
            they are.
        inplace: change ``model`` itself, otherwise a deep copy.
        example_inputs: positional arguments of a call that a copy of the model makes at once, for a full report.
        offload: a folder, with ``inference``: the weights move to an unlinked temporary file there, and memory holds
            only what was read of them since the last plan was made. Most of them are read once, to be packed. None:
            they stay in memory beside their packed copies, which makes planning a new kind of input faster.

    Returns:
        The model. Its attribute ``fastcnn_report`` is a :class:`Report`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: ``dtype`` or ``offload`` without ``inference``, or a dtype that is not floating point.
        OSError: the file of ``offload`` cannot be written.
        RuntimeError: the model cannot be copied, because it holds a tensor with a history.
    """
    from .engine import Engine  # with TorchDynamo, which takes a second to import

    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize(): argument 'model' must be Module, not {type(model).__name__}")
    for name, value in (("inference", inference), ("inplace", inplace)):
        if not isinstance(value, bool):
            raise TypeError(f"optimize(): argument '{name}' must be bool, not {type(value).__name__}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"optimize(): argument 'dtype' must be torch.dtype or None, not {type(dtype).__name__}")
    if dtype is not None and not (inference and dtype in FLOATING_DTYPES):
        raise ValueError(
            f"optimize(): dtype={dtype} needs inference=True and must be one of {', '.join(map(str, FLOATING_DTYPES))}"
        )
    if offload is not None and not isinstance(offload, str | os.PathLike):
        raise TypeError(f"optimize(): argument 'offload' must be str, PathLike or None, not {type(offload).__name__}")
    if offload is not None and not inference:
        raise ValueError(f"optimize(): offload={str(offload)!r} needs inference=True")
    if example_inputs is not None and not isinstance(example_inputs, tuple | list):
        raise TypeError(
            f"optimize(): argument 'example_inputs' must be tuple, list or None, not {type(example_inputs).__name__}"
        )
    if not inplace:
        model = _copied(model)
    if inference:
        model.eval().requires_grad_(False).to(dtype=dtype)
    offloaded = None if offload is None else Offloaded(model, offload)
    report = Report()
    for name, module in model.named_modules():
        report.layers += _scanned(module, name, inference)
        if _has_engine(module) or (dtype is not None and module._parameters):
            Engine(module, name, report, inference=inference, dtype=dtype, offloaded=offloaded)
    model.fastcnn_report = report  # type: ignore[assignment]
    if example_inputs is not None:
        tried: Any = _copied(model)
        with _generators_restored(), torch.no_grad():
            tried(*example_inputs)
        report.graphs, report.plain = tried.fastcnn_report.graphs, tried.fastcnn_report.plain
    return model


def refresh(model: nn.Module) -> None:
    """Forget the packed copies of the weights of a model, after writes that torch cannot see.

    Those are writes through ``.data``, and writes of another process to shared memory.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        forget(tensor)


@contextlib.contextmanager
def _generators_restored() -> Iterator[None]:
    """Random numbers that are drawn meanwhile will be drawn again."""
    numpy = sys.modules.get("numpy")
    drawn = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(drawn[0])
        if numpy:
            numpy.random.set_state(drawn[1])


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        found = [
            f"{name}.{attribute}".lstrip(".")
            for name, module in model.named_modules()
            for attribute, value in vars(module).items()
            if any(t.grad_fn is not None for t in _tensors(value))
        ]
        if not found:
            raise
        raise RuntimeError(
            f"optimize(): cannot copy the model, because it holds tensors with a history: {', '.join(found)}. "
            "Detach them, or let the model itself change: optimize(model, inplace=True)"
        ) from error


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _has_engine(module: nn.Module) -> bool:
    """Whether a module has calls of its own to fuse, when it is called by itself or by a forward without a graph."""
    if isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Module.forward or _is_compiled(module):
        return False
    if isinstance(module, nn.Sequential | nn.LocalResponseNorm | nn.MaxPool2d | fx.GraphModule):
        return True
    return type(module).__module__.partition(".")[0] != "torch"


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile made the module, or was told to run it."""
    by_torch = module._compiled_call_impl is not None and "_fastcnn_engine" not in vars(module)
    return by_torch or isinstance(module, torch._dynamo.OptimizedModule)


_LAYERS = (nn.Conv2d, nn.LocalResponseNorm, nn.MaxPool2d)


def _scanned(module: nn.Module, name: str, inference: bool) -> list[Entry]:
    """What can be said of a layer before it is called."""
    what = type(module).__name__
    if _is_compiled(module):
        return [Entry(name or what, what, why_not="torch.compile runs it, and sees the plain forward")]
    if isinstance(module, nn.CrossMapLRN2d):
        return [Entry(name, what, why_not="it computes something else than LocalResponseNorm")]
    if not isinstance(module, (*_LAYERS, nn.Linear) if inference else _LAYERS):
        return []
    reason = "it returns indices" if getattr(module, "return_indices", False) else "it was not called yet"
    return [Entry(name or what, what, why_not=reason)]
