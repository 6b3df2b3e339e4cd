"""The parts of ``make gpu`` that take times, each in a process of its own: kernels, networks, tuning.

``python -m tools.gpu.measure PART DEVICE BATCH SECONDS FILE`` writes a line of JSON for each row. The part
``compilations`` only calls what torch.compile has to compile for the others, once, so that they find it in its cache.
A kernel that loses the CUDA context ends the process: it starts anew, and leaves that one out of the case.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcnn import backends
from fastcnn.bench import augmentations
from fastcnn.bench.cases import ANY_FORMAT, DTYPES, Case
from fastcnn.bench.measure import Budget, measure
from fastcnn.bench.network_workload import NetworkWorkload
from fastcnn.bench.operator_workload import OperatorWorkload
from fastcnn.bench.operators import CONVOLUTIONS, LRN, OPERATORS, POOL, STAGES, convolution
from fastcnn.bench.providers import OperatorProvider, network_providers, operator_providers
from fastcnn.bench.rows import Row
from fastcnn.bench.workload import Entry, reason
from fastcnn.ops import select_conv2d_relu
from fastcnn.ops.register import IMPLEMENTATIONS
from fastcnn.params import AugmentParams, TailParams
from tools.machine_code.workloads import arguments

from .process import Clock

# The operators as the benchmark calls them: without a bias, and with an argmax only for backward.
TAIL = TailParams(True, LRN, POOL)
_BUDGET = Budget(seconds=0.2, at_least=11)


def kernel_cases(batch: int) -> Iterator[Case]:
    """The operators at AlexNet's shapes, bf16 before fp32, in both formats; then the convolutions.

    VGG-16 has a quarter of the batch, or its check in float64 would need all of the memory.
    """
    for dtype in ("bf16", "fp32"):
        for op, stage, mode, format in product(
            ("relu_lrn_max_pool2d", "lrn", "max_pool2d"), STAGES, ("forward", "backward"), ("channels_last", "NCHW")
        ):
            yield Case(op, (batch, *STAGES[stage][1:]), dtype, format, mode)
        for op, format in product(("augment", "augment_resized"), ("channels_last", "NCHW")):
            yield Case(op, (batch, 3, 256, 256), dtype, format)
    for dtype, (layer, conv) in product(("bf16", "fp32"), CONVOLUTIONS.items()):
        images = batch if layer.startswith("AlexNet") else max(1, batch // 4)
        shape = images, conv.channels, conv.size, conv.size
        yield Case("conv2d_relu", shape, dtype, "channels_last", "forward", layer=layer)


def network_cases(batch: int) -> Iterator[Case]:
    for network, images, size in (("alexnet", batch, 227), ("vgg16", max(1, batch // 4), 224)):
        for mode in ("inference", "training step"):
            yield Case(network, (images, 3, size, size), "bf16", ANY_FORMAT, mode)


def _providers(case: Case, device: str) -> list[OperatorProvider]:
    """torch.compile where its compilation is worth the time: the tail, and in bf16 what it consists of."""
    everyone = operator_providers(device).values()
    compiled = case.op == "relu_lrn_max_pool2d" or (case.op in ("lrn", "max_pool2d") and case.dtype == "bf16")
    return [p for p in everyone if p.name != "fastcnn.reference" and (compiled or p.name != "torch.compile")]


def _measure_kernel(case: Case, device: str, without: Sequence[str] = ()) -> list[Row]:
    providers = [provider for provider in _providers(case, device) if provider.name not in without]
    return measure([case], partial(OperatorWorkload, device=device), providers, _BUDGET, device)


def _measure_network(case: Case, device: str) -> list[Row]:
    torchs = [p for p in network_providers(device).values() if p.export is None]
    return measure([case], partial(NetworkWorkload, device=device), torchs, _BUDGET, device)


def _compile(case: Case, device: str) -> list[Row]:
    """By one call each, in the order in which the rows are needed; they are of no interest."""
    once = Budget(repeats=1)
    if case.format == ANY_FORMAT:
        networks = [p for p in network_providers(device).values() if p.compile]
        return measure([case], partial(NetworkWorkload, device=device), networks, once, device)
    operators = [p for p in _providers(case, device) if p.name == "torch.compile"]
    return measure([case], partial(OperatorWorkload, device=device), operators, once, device)


# -- tuning -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way to run a case that could become the default: a backend, or a configuration of Triton's."""

    name: str
    run: Callable[..., Any]
    arguments: tuple[Any, ...]

    def takes_part(self, case: Case) -> bool:
        return True

    def __call__(self) -> tuple[Tensor, ...]:
        result = self.run(*self.arguments)
        return (result if isinstance(result, Tensor) else result[0],)


class Tuning(OperatorWorkload):
    """An operator's case, whose providers are ways to run it, below autograd."""

    def prepare(self, provider: Any, dtype: str) -> Entry:
        return Entry(provider, provider)

    def ways(self) -> list[Way]:
        case, x, dy, name = self.case, self.x, self.dy, self.operator.registered
        here = [name for name in ("triton", "cuda", "cpu") if not backends.why_not(name, x.device)]
        forward, backward = (IMPLEMENTATIONS.get(name + suffix, {}) for suffix in ("", "_backward"))
        implementations = forward if case.mode == "forward" else backward
        runs: dict[str, Callable[..., Any]] = {name: implementations[name] for name in here}
        if self.operator.weight_shape is not None:
            parameters, conv = self.operator.parameters(case, x), convolution(case).params
            runs = select_conv2d_relu.candidates(x, parameters[0], conv) if x.is_cuda else runs
            return [Way(name, run, (x, *parameters, conv, False)) for name, run in runs.items()]
        argmax = None
        if case.mode == "backward" and self.operator.argmax:
            argmax = forward[here[0]](*op_arguments(replace(case, mode="forward"), x, dy, with_argmax=True))[1]
        args = op_arguments(case, x, dy, argmax)
        if runs.pop("triton", None):
            runs = {**configurations(case), **runs}
        return [Way(name, run, args) for name, run in runs.items()]


def op_arguments(
    case: Case, x: Tensor, dy: Tensor, argmax: Tensor | None = None, with_argmax: bool = False
) -> tuple[Any, ...]:
    """Of the implementations of a memory-bound operator."""
    if not OPERATORS[case.op].takes_pictures:
        return arguments(case.op, case.mode, TAIL, x, dy, argmax, with_argmax=with_argmax)
    *choices, crop, dtype, format = augmentations.arguments(case, DTYPES[case.dtype])
    return (x, *choices, AugmentParams(crop, dtype=dtype, memory_format=format))


def configurations(case: Case) -> dict[str, Callable[..., Any]]:
    """Of a memory-bound operator, all that the Triton launchers know."""
    module: Any = importlib.import_module(f"fastcnn.ops.triton.{OPERATORS[case.op].registered}")
    launcher, configs = (
        (module.forward, module.FORWARD_CONFIGS)
        if case.mode == "forward"
        else (module.backward, module.BACKWARD_CONFIGS)
    )
    return {f"triton {config}": partial(launcher, config=config) for config in configs}


def tune(case: Case, device: str) -> list[Row]:
    """A row for each way: checked, and if right then timed."""
    workload = Tuning(case, device=device)
    return measure([case], lambda _: workload, workload.ways(), _BUDGET, device)


# ---------------------------------------------------------------------------------------------------------------------

PARTS: dict[str, tuple[Callable[[int], Iterator[Case]], Callable[..., list[Row]]]] = {
    "kernels": (kernel_cases, _measure_kernel),
    "networks": (network_cases, _measure_network),
    "tuning": (kernel_cases, tune),
}


def cases_to_compile(batch: int) -> Iterator[Case]:
    """In bf16, those of the networks among the others, as either part may come first to be short of time."""
    operators = [case for case in kernel_cases(batch) if case.dtype == "bf16" and not case.layer]
    tails = [case for case in operators if case.op == "relu_lrn_max_pool2d"]
    networks = list(network_cases(batch))
    yield from networks[:2]
    yield from tails
    yield from networks[2:]
    yield from (case for case in operators if case not in tails)


def main(
    part: str, device: str, batch: int, seconds: float, file: Path, first: int = 0, without: Sequence[str] = ()
) -> None:
    """From the case of number ``first`` on, that one ``without`` the providers that have lost the context before."""
    if part == "compilations":
        for case in cases_to_compile(batch):
            print(case, flush=True)
            _compile(case, device)
        return
    cases, run = PARTS[part]
    clock = Clock(seconds)
    for i, case in enumerate(cases(batch)):
        if i < first:
            continue
        if not clock.left():
            break
        print(case, *(f"without {name}" for name in without), flush=True)
        try:
            rows = run(case, device, *([without] if part == "kernels" else []))
        except Exception as error:  # of the case itself, say for want of memory
            rows = [Row(**asdict(case), provider="every", failure=reason(error))]
        failed = [row for row in rows if row.failure]
        lost = device != "cpu" and bool(failed) and _context_is_lost()
        culprit = next((row for row in failed if "CUDA error" in (row.failure or "")), (failed or rows)[0])
        again = lost and part == "kernels" and culprit.provider not in ("every", *without)
        with file.open("a") as lines:
            lines.writelines(json.dumps(asdict(row)) + "\n" for row in ([culprit] if again else rows))
        if lost:
            rest = [part, device, str(batch), str(clock.left()), str(file), str(i if again else i + 1)]
            rest += [*without, culprit.provider] if again else []
            os.execv(sys.executable, [sys.executable, "-m", "tools.gpu.measure", *rest])
        without = ()


def _context_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    torch.backends.cudnn.benchmark = True  # of torch; ours would tune on the clock of the first to be timed
    os.environ.setdefault("FASTCNN_TUNE", "0")
    part, device, batch, seconds, file, *rest = sys.argv[1:]
    main(part, device, int(batch), float(seconds), Path(file), int(rest[0]) if rest else 0, rest[1:])
