"""The Triton kernels that ``make gpu`` times, compiled into Triton's cache for a GPU that is not here.

``python -m tools.gpu.precompile kernels|networks|tuning``, for ``sm_$FASTCNN_GPU_ARCH`` (90).
"""

import os
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastcnn.bench.cases import DTYPES
from fastcnn.bench.environment import convolution_precision
from fastcnn.bench.operators import CONVOLUTIONS, OPERATORS
from fastcnn.models import create_model
from fastcnn.ops.cudnn import conv2d_relu as cudnn
from fastcnn.ops.register import IMPLEMENTATIONS
from fastcnn.ops.triton import conv2d_relu
from fastcnn.params import ConvParams
from tools.machine_code.kernels_table import cases, meta
from tools.machine_code.workloads import BATCH

from .compilation import compiling_into_cache
from .measure import configurations, kernel_cases, network_cases, op_arguments
from .stand_in import standing_in

_DTYPES = ("bf16", "tf32")


def kernels(arch: int) -> None:
    """What the launchers launch at the shapes of the benchmarks, for tensors that are not there."""
    with compiling_into_cache(arch), convolution_precision("tf32"):
        for case in cases():
            if case.dtype in _DTYPES:
                case.launch()
        for tensors, conv in _convolutions():
            cudnn.forward(*tensors, conv, False)
        for args, runs in _memory_bound():
            runs[0](*args)


def tuning(arch: int) -> None:
    """The configurations that tuning tries."""
    with compiling_into_cache(arch), convolution_precision("tf32"):
        for (x, weight, bias), conv in _convolutions():
            for config in conv2d_relu.configurations(x, weight, conv.groups):
                conv2d_relu.forward(x, weight, bias, conv, False, config=config)
        for args, runs in _memory_bound():
            for run in runs:
                run(*args)


def _memory_bound() -> Iterator[tuple[tuple[Any, ...], list[Callable[..., Any]]]]:
    """Arguments of the operators as they are measured; and their Triton launchers: the default, and every other."""
    for case in kernel_cases(BATCH):
        if case.op == "conv2d_relu":
            continue
        x, operator = meta(case.dtype, case.format, *case.shape), OPERATORS[case.op]
        if operator.takes_pictures:
            x = x.new_empty((x.shape[0], *x.shape[2:], 3), dtype=torch.uint8)
        dy = meta(case.dtype, case.format, *operator.output_shape(case))
        name = operator.registered + ("" if case.mode == "forward" else "_backward")
        args = op_arguments(case, x, dy, torch.empty_like(dy, dtype=torch.uint8))
        yield args, [IMPLEMENTATIONS[name]["triton"], *configurations(case).values()]


def _convolutions() -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], ConvParams]]:
    """Input, weight and bias of every layer, in channels_last, and its parameters."""
    for dtype, conv in product(_DTYPES, CONVOLUTIONS.values()):
        x = meta(dtype, "channels_last", BATCH, conv.channels, conv.size, conv.size)
        weight = meta(dtype, "channels_last", *conv.weight_shape)
        yield (x, weight, x.new_empty(conv.outputs)), conv.params


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
