"""What an operator's own C++ costs the host for each call, measured without a GPU::

    python -m tools.machine_code.launch_cost

The launchers run as they are, up to the driver, in the place of which ``recorder.cpp`` has calls that return at once.
What comes before them cannot be measured without a torch for CUDA: the op's arguments, and ``csrc/cuda/run.h`` with its
device guard, current stream and memory from torch. Nor can CUDA's runtime and driver, which come after them.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from .launches import Cuda
from .workloads import Workload, workloads


@dataclass(frozen=True)
class Cost:
    """Microseconds of a call, and how many kernels it launches."""

    work: Workload
    microseconds: float
    kernels: int


def costs(cuda: Cuda, calls: int = 10000, repeats: int = 7) -> Iterator[Cost]:
    """Of each operator in both formats, at AlexNet's conv1 or its input, in bf16.

    The median of the means of ``repeats`` times.
    """
    for work in workloads():
        if "cuda" in work.languages and work.layer in ("AlexNet input", "AlexNet conv1") and work.dtype == "bf16":
            took = statistics.median(cuda.nanoseconds(work, calls) for _ in range(repeats))
            yield Cost(work, took / 1e3, len(cuda.launches(work)))


def main() -> None:
    print("| operator | dtype | format | us per call | kernels |\n| --- | --- | --- | --- | --- |")
    for cost in costs(Cuda()):
        work = cost.work
        print(f"| {work.name} | {work.dtype} | {work.format} | {cost.microseconds:.3f} | {cost.kernels} |")


if __name__ == "__main__":
    main()
