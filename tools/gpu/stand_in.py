"""Pytest plugin ``-p tools.gpu.stand_in``: the tests of ``tests/gpu`` where there is no GPU.

Their tensors stay on the CPU, the C++ kernels answer in the place of the GPU's, and each launch of a Triton kernel is
compiled for ``sm_$FASTCNN_GPU_ARCH`` (90) instead. So the tests themselves are tried before they meet a GPU, and
Triton's cache gets all that they will want there. What is about streams, graphs and torch.compile is left out.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastcnn import backends
from fastcnn.ops import stage
from fastcnn.ops.cuda import conv2d_relu as cuda
from fastcnn.ops.cudnn import conv2d_relu as cudnn
from fastcnn.ops.register import IMPLEMENTATIONS
from fastcnn.ops.triton import augment, conv2d_relu, lrn, max_pool2d, relu_lrn_max_pool2d

from .compilation import compiling_into_cache

# Tests with one of these in their names need what only a GPU has.
LEFT_OUT = (
    *("graph", "stream", "capture", "compile", "opcheck", "attributes", "benchmark_mode"),
    *("31_elements", "where_its", "another_gpu", "every_device", "refused", "launch"),
    "test_data.py",
)
_everything = ExitStack()


class OnCPU(TorchFunctionMode):
    """What is asked for on a GPU comes on the CPU, marked; where marked tensors meet others there is torch's error."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        devices = [_device(value) for value in (*args, *(kwargs or {}).values())]
        asked = next((device for device in devices if device is not None), None)
        if function in (Tensor.cuda, Tensor.cpu):
            asked = function.__name__
        elif function is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            asked = "cuda" if hasattr(args[1], "on_gpu") else "cpu"
        marks = {hasattr(t, "on_gpu") for t in _tensors((args, kwargs)) if t.dim()}
        if len(marks) == 2 and function not in _BETWEEN_DEVICES and _called_by_a_test():
            raise RuntimeError(f"{function}: expected all tensors to be on the same device")
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        result = args[0] if function is Tensor.cuda else function(*map(_on_cpu, args), **kwargs)
        if asked is not None and args and result is args[0]:
            result = torch.ops.aten.alias(result)  # another tensor, as it would be on another device
        gpu = asked == "cuda"
        if asked is None:
            gpu = hasattr(args[0], "on_gpu") if function in _BETWEEN_DEVICES else True in marks
        for tensor in _tensors(result):
            if gpu:
                tensor.on_gpu = True  # type: ignore[attr-defined]
            elif asked == "cpu" and hasattr(tensor, "on_gpu"):
                del tensor.on_gpu
        return result


# They move data between devices.
_BETWEEN_DEVICES = (Tensor.copy_, Tensor.__setitem__, Tensor.to)
# Files of torch that only hand on what they are called with.
_ON_THE_WAY = ("torch/overrides.py", "torch/_tensor.py", "torch/autograd/__init__.py")


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _called_by_a_test() -> bool:
    """And not by the library, which asks for the devices of its tensors, and is told that they are on the CPU."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename.endswith(_ON_THE_WAY) and frame.f_back is not None:
        frame = frame.f_back
    return "/tests/" in frame.f_code.co_filename


def _device(value: Any) -> str | None:
    named = isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda"))
    return str(value).partition(":")[0] if named else None


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if _device(value) == "cuda" else value


def _compiled(run: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` only for its launches; what ``answer`` says to the same arguments."""

    @functools.wraps(run)
    def both(*args: Any, config: Any = None) -> Any:
        run(*args) if config is None else run(*args, config=config)
        return answer(*args)

    return both


def _convolution(run: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
    """As :func:`_compiled`, of the operator: the default, which is cuDNN and a pass of ours, and the Triton kernel."""

    def both(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Any:
        if x.dtype != torch.float64 and x.numel():
            for candidate in (cudnn.forward, run):
                candidate(x, weight, bias, *args)
        return answer(x, weight, bias, *args)

    return both


@contextmanager
def standing_in(arch: int) -> Iterator[None]:
    """Code that asks for a GPU of compute capability ``arch`` runs without one."""
    with ExitStack() as stack:
        stack.enter_context(compiling_into_cache(arch))
        for patch in _patches(arch):
            stack.enter_context(patch)
        stack.enter_context(OnCPU())
        yield


def _patches(arch: int) -> list[Any]:
    gpu = {
        "is_available": lambda: True,
        "get_device_capability": lambda *_: divmod(arch, 10),
        "get_device_name": lambda *_: "stand-in",
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
    }
    patches: list[Any] = [mock.patch.object(torch.cuda, name, value) for name, value in gpu.items()]
    patches += [
        mock.patch.object(torch.nn.Module, "cuda", lambda module, *_: module),
        mock.patch.object(backends, "why_not", return_value=""),
        mock.patch.object(backends, "_preferred", return_value=("triton",)),
        mock.patch.object(stage, "_runs_on_cpu", return_value=False),
        mock.patch.object(stage, "_is_small", return_value=False),
        mock.patch.object(cuda, "can_run", return_value=True),
        mock.patch.object(cuda, "run", IMPLEMENTATIONS["conv2d_relu"]["cpu"]),
        mock.patch.object(cudnn, "forward", _compiled(cudnn.forward, IMPLEMENTATIONS["conv2d_relu"]["cpu"])),
        mock.patch.object(
            conv2d_relu, "forward", _compiled(conv2d_relu.forward, IMPLEMENTATIONS["conv2d_relu"]["cpu"])
        ),
    ]
    run = _compiled(augment.forward, IMPLEMENTATIONS["augment"]["cpu"])
    patches.append(mock.patch.object(augment, "forward", run))
    for module, op in ((lrn, "lrn"), (max_pool2d, "max_pool2d"), (relu_lrn_max_pool2d, "relu_lrn_max_pool2d")):
        for launcher, name in (("forward", op), ("backward", f"{op}_backward")):
            run = _compiled(getattr(module, launcher), IMPLEMENTATIONS[name]["cpu"])
            patches.append(mock.patch.object(module, launcher, run))
    for name, implementations in IMPLEMENTATIONS.items():
        answer = implementations["cpu"]
        triton = (_convolution if name == "conv2d_relu" else _compiled)(implementations["triton"], answer)
        patches.append(mock.patch.dict(implementations, {"triton": triton, "cuda": answer}))
    return patches


def pytest_configure() -> None:
    _everything.enter_context(standing_in(int(os.environ.get("FASTCNN_GPU_ARCH", "90"))))


def pytest_unconfigure() -> None:
    _everything.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = [item for item in items if any(word in item.nodeid for word in LEFT_OUT)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
