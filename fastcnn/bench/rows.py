"""What one measurement tells, and how rows compare."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .cases import ANY_FORMAT, Case, Shape

EAGER = ("torch.eager", "torch.eager channels_last")
FP32 = " (fp32)"  # ends the name of a provider that runs a 16-bit case in fp32


@dataclass
class Row:
    """One provider in one case. Without a time where ``failure`` says why; ratios are how many times faster this is.

    Operators are measured in bytes moved, networks and convolutions in operations (``flop``). ``saved_vs_eager`` is a
    fraction; ``resident_bytes`` is how much more the process holds after the warm-up than before the preparation.
    """

    op: str
    shape: Shape
    dtype: str
    format: str
    mode: str
    memory: str
    provider: str
    failure: str | None = None
    error: float | None = None
    tolerance: float | None = None
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    n: int = 0
    bytes_moved: int | None = None
    saved_bytes: int | None = None
    gb_per_s: float | None = None
    copy_gb_per_s: float | None = None
    vs_eager: float | None = None
    vs_compile: float | None = None
    flop: int | None = None
    images_per_s: float | None = None
    gflop_per_s: float | None = None
    matmul_gflop_per_s: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    update_ms: float | None = None
    saved_vs_eager: float | None = None
    peak_bytes: int | None = None
    layer: str | None = None
    resident_bytes: int | None = None

    @property
    def case(self) -> Case:
        return Case(self.op, self.shape, self.dtype, self.format, self.mode, self.memory, self.layer)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of a single value, that value twice."""
    first, _, third = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return first, third


def add_ratios(rows: Sequence[Row]) -> None:
    """Fill in how many times faster each row is than torch in the memory format in which torch is the fastest.

    Rows compare within the same operator, shape, dtype, mode and memory. What failed its check is no rival; torch's
    fp32 is one only where its 16 bits failed in every format.
    """
    groups: dict[Case, list[Row]] = {}
    for row in rows:
        groups.setdefault(replace(row.case, format=ANY_FORMAT), []).append(row)
    for members in groups.values():
        eager, compiled = (fastest(members, name) for name in ("torch.eager", "torch.compile"))
        saved = [row.saved_bytes for row in members if row.provider in EAGER and row.saved_bytes]
        for row in members:
            if row.median_ms is not None:
                row.vs_eager, row.vs_compile = (_ratio(rival, row) for rival in (eager, compiled))
                row.saved_vs_eager = row.saved_bytes / min(saved) if saved and row.saved_bytes is not None else None


def fastest(rows: Iterable[Row], name: str) -> Row | None:
    """The fastest with a time of the providers whose names begin with ``name``; one in fp32 if there is no other."""
    timed = [row for row in rows if row.provider.startswith(name) and row.median_ms is not None]
    own = [row for row in timed if not row.provider.endswith(FP32)]
    return min(own or timed, key=lambda row: row.median_ms or 0.0, default=None)


def _ratio(rival: Row | None, row: Row) -> float | None:
    return rival.median_ms / row.median_ms if rival and rival.median_ms and row.median_ms else None
