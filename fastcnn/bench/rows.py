"""What one measurement tells, and how rows compare."""

from collections.abc import Sequence
from dataclasses import dataclass

from .cases import ANY_FORMAT, Case, Shape


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

    @property
    def is_network(self) -> bool:
        return self.format == ANY_FORMAT


def add_ratios(rows: Sequence[Row]) -> None:
    """Fill in how many times faster than torch each row is, in its own case; torch's fp32 stands in for its 16 bits."""
    saved = {row.case: row.saved_bytes for row in rows if row.provider == "torch.eager"}
    medians = {(row.case, row.provider): row.median_ms for row in rows if row.failure is None}
    for row in rows:
        if row.median_ms is None:
            continue
        eagers = saved.get(row.case)
        if eagers and row.saved_bytes is not None:
            row.saved_vs_eager = row.saved_bytes / eagers
        for field, torchs in (("vs_eager", "torch.eager"), ("vs_compile", "torch.compile")):
            baseline = medians.get((row.case, torchs)) or medians.get((row.case, f"{torchs} (fp32)"))
            setattr(row, field, baseline / row.median_ms if baseline else None)
