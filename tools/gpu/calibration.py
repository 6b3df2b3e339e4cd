"""What a GPU does per clock: the constants of a prediction from machine code, measured in a few seconds.

For each kind of instruction, how many lanes a multiprocessor finishes per clock; the latency of a load on an idle and
on a busy device; the rates of a copy and of matrix products. The kernels are in ``calibration.cu``.
"""

import ctypes
import functools
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("calibration.cu")
NVCC_FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr")
THREADS = 1024  # of a block; two blocks fill a multiprocessor
STEPS = 256  # of a thread in an iteration
INSTRUCTIONS = {  # kind -> instructions of a step
    "FFMA": 1.0,
    "IMAD": 1.0,
    "FMNMX": 1.0,
    "FSETP+SEL": 2.0,
    "PRMT": 1.0,
    "HMNMX2.BF16": 2.0,
    "VHMNMX.BF16": 0.5,  # of three operands
    "MUFU": 1.0,
    "LDS": 1.0,
}
_ITERATIONS = 200
_LOADED = 2**27  # vectors of 16 bytes that the loads go through, far beyond any cache
_ROUNDS = 5


def build(arch: str, library: Path) -> None:
    """Compile the kernels for ``sm_<arch>`` into a library of their own, which needs neither torch nor Python."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    options = [f"-arch=sm_{arch}", "-shared", "-cudart=static", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    subprocess.run([nvcc, *NVCC_FLAGS, *options, SOURCE, "-o", library], check=True)


class Calibration:
    """Runs the kernels of a library made by :func:`build`, on the current device."""

    def __init__(self, library: Path) -> None:
        self._run = ctypes.CDLL(str(library)).calibrate
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = [
            ctypes.c_char_p,
            *[ctypes.c_int] * 3,
            ctypes.c_void_p,
            ctypes.c_int64,
            *[ctypes.c_void_p] * 3,
        ]
        self._multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
        self._sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    def _launch(self, kind: str, blocks: int, threads: int, iterations: int, data: Tensor | None = None) -> Tensor:
        cycles = torch.zeros(blocks, dtype=torch.int64, device="cuda")
        vectors = 0 if data is None else data.nbytes // 16
        pointer = None if data is None else data.data_ptr()
        stream = torch.cuda.current_stream().cuda_stream
        rest = iterations, pointer, vectors, cycles.data_ptr(), self._sink.data_ptr(), stream
        error = self._run(kind.encode(), blocks, threads, *rest)
        if error:
            raise RuntimeError(error.decode())
        return cycles

    def lanes_per_clock(self, kind: str) -> dict[str, float]:
        """Of a multiprocessor; and the clock that the device ran at meanwhile, in GHz."""
        blocks = 2 * self._multiprocessors
        cycles = self._launch(kind, blocks, THREADS, _ITERATIONS)  # the first loads the kernel
        ms = statistics.median(
            _gpu_ms(lambda: self._launch(kind, blocks, THREADS, _ITERATIONS)) for _ in range(_ROUNDS)
        )
        lanes = 2 * THREADS * _ITERATIONS * STEPS * INSTRUCTIONS[kind]
        clocks = cycles.max().item()  # of two blocks on a multiprocessor the older goes first, and ends first
        return {
            "lanes_per_clock": lanes / clocks,
            "ghz": clocks / ms / 1e6,
            "tera_per_s": lanes * blocks / 2 / ms / 1e9,
        }

    def latency(self) -> dict[str, float]:
        """Clocks that a load of 16 bytes takes on a device that does nothing else, and on one that loads all it can."""
        data = torch.zeros(_LOADED, 4, dtype=torch.int32, device="cuda")
        blocks, iterations = 2 * self._multiprocessors, 500
        idle = self._launch("loads", 1, 32, iterations, data)
        self._launch("loads", blocks, THREADS, iterations, data)
        busy = self._launch("loads", blocks, THREADS, iterations, data)
        ms = _gpu_ms(lambda: self._launch("loads", blocks, THREADS, iterations, data))
        read = blocks * (THREADS - 32) * iterations * 4 * 16
        return {
            "idle_clocks": idle.double().mean().item() / iterations,
            "busy_clocks": busy.double().mean().item() / iterations,
            "busy_gb_per_s": read / ms / 1e6,
        }


def _gpu_ms(run: Any) -> float:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def rates(device: str) -> dict[str, float]:
    """Of a copy, in bytes read and written, and of matrix products: as torch has them, also on a CPU."""
    from fastcnn.bench.measure import Budget, clock, time_rounds
    from fastcnn.bench.workload import copy_of, matmul

    on_gpu = device != "cpu"
    yardsticks = {"copy": copy_of(torch.ones(2**30 if on_gpu else 2**26, dtype=torch.uint8, device=device))}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        yardsticks[name] = matmul(8192 if on_gpu else 1024, dtype, device)
    seconds_of = clock(device)
    timers = {name: functools.partial(seconds_of, yardstick.call) for name, yardstick in yardsticks.items()}
    for timer in timers.values():
        timer()
    times = time_rounds(timers, Budget(repeats=7))
    rates = {name: yardstick.amount / statistics.median(times[name]) for name, yardstick in yardsticks.items()}
    return {
        "copy_gb_per_s": rates["copy"] / 1e9,
        **{f"matmul_{name}_tflop_per_s": rates[name] / 1e12 for name in ("bfloat16", "float32")},
    }


def main(device: str, library: Path, file: Path) -> None:
    """One line of JSON for each figure, as they come: ``{"what": ..., ...}``."""
    with file.open("a") as lines:

        def tell(what: str, **figures: float) -> None:
            lines.write(json.dumps({"what": what, **figures}) + "\n")
            lines.flush()

        tell("rates", **rates(device))
        if device == "cpu":
            return
        try:
            calibration = Calibration(library)
        except OSError:  # it is not there, or was built for another system
            library = file.with_name("calibration.so")
            build("".join(map(str, torch.cuda.get_device_capability())), library)
            calibration = Calibration(library)
        for kind in INSTRUCTIONS:
            tell(kind, **calibration.lanes_per_clock(kind))
        tell("latency", **calibration.latency())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
