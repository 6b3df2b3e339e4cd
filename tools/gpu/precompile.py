"""The Triton kernels that ``make gpu`` times, compiled into Triton's cache for a GPU that is not here.

``python -m tools.gpu.precompile kernels|networks|tuning``, for ``sm_$FASTCNN_GPU_ARCH`` (90).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from fastcnn.bench.cases import CONVOLUTIONS, DTYPES
from fastcnn.bench.environment import convolution_precision
from fastcnn.models import create_model
from fastcnn.ops import _conv2d_relu_cuda as on_gpu
from fastcnn.ops._operator import IMPLEMENTATIONS
from tools.machine_code.kernels_table import BATCH, cases, meta

from .compilation import compiling_into_cache
from .measure import arguments, configurations, kernel_cases, network_cases
from .stand_in import standing_in

_DTYPES = ("bf16", "tf32")


def kernels(arch: int) -> None:
    """What the launchers launch at the shapes of the benchmarks, for tensors that are not there."""
    with compiling_into_cache(arch), convolution_precision("tf32"):
        for case in cases():
            if case.dtype in _DTYPES:
                case.launch()
        for x, weight, bias, args in _convolutions():
            on_gpu.cudnn(x, weight, bias, *args)
        for args, runs in _memory_bound():
            runs[0](*args)


def tuning(arch: int) -> None:
    """The configurations that tuning tries."""
    with compiling_into_cache(arch), convolution_precision("tf32"):
        for x, weight, bias, args in _convolutions():
            for config in on_gpu.configurations(x, weight, args[3]):
                on_gpu.triton(x, weight, bias, *args, config=config)
        for args, runs in _memory_bound():
            for run in runs:
                run(*args)


def _memory_bound() -> Iterator[tuple[tuple[Any, ...], list[Callable[..., Any]]]]:
    """Arguments of the operators as they are measured; and their Triton launchers: the default, and every other."""
    for case in kernel_cases(BATCH):
        if case.op == "conv2d_relu":
            continue
        x = meta(case.dtype, case.format, *case.shape)
        dy = meta(case.dtype, case.format, *case.output_shape)
        name = case.op + ("" if case.mode == "forward" else "_backward")
        args = arguments(case, x, dy, torch.empty_like(dy, dtype=torch.uint8))
        yield args, [IMPLEMENTATIONS[name]["triton"], *configurations(case).values()]


def _convolutions() -> Iterator[tuple[Any, ...]]:
    """Input, weight, bias and arguments of every layer, in channels_last."""
    for dtype, conv in product(_DTYPES, CONVOLUTIONS.values()):
        x = meta(dtype, "channels_last", BATCH, conv.channels, conv.size, conv.size)
        weight = meta(dtype, "channels_last", conv.outputs, conv.channels // conv.groups, conv.window, conv.window)
        yield x, weight, x.new_empty(conv.outputs), (*conv.params.op_args(), False)


def networks(arch: int) -> None:
    """AlexNet and VGG-16 with the benchmarks' batches, run on the CPU for what they would launch."""
    with standing_in(arch):
        for case in network_cases(BATCH):
            to: dict[str, Any] = {"dtype": DTYPES[case.dtype], "memory_format": torch.channels_last}
            training = case.mode != "inference"
            network = create_model(case.op, init="kaiming").to(**to).train(training)
            with torch.set_grad_enabled(training):
                y = network(torch.randn(case.shape).to(**to))
            if training:
                y.float().sum().backward()


if __name__ == "__main__":
    stages = {"kernels": kernels, "networks": networks, "tuning": tuning}
    stages[sys.argv[1]](int(os.environ.get("FASTCNN_GPU_ARCH", "90")))
