"""How fast a launch can be, from its machine code: the time that each part of a GPU would need for it alone.

The counts are those of :mod:`.execute`, of some blocks, for the whole launch. What takes longest binds; the others
overlap with it. No part can be kept busy all the time, so each has a share that kernels have been seen to reach.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .execute import Counts, execute
from .launches import Launched

_BLOCKS = 16  # of a launch, that are executed


@dataclass(frozen=True)
class GPU:
    """What the parts of a multiprocessor do in a clock.

    Args:
        name: of the GPU.
        multiprocessors: how many it has.
        ghz: its clock under such loads.
        copy_gb_per_s: bytes read and written by a copy.
        lanes: pipe -> lanes of an instruction that it finishes.
        latency: clocks from a load to its use, on a busy device.
        issue_share, pipe_share: how much of the issue slots, and of a pipe, a kernel can use.
    """

    name: str
    multiprocessors: int
    ghz: float
    copy_gb_per_s: float
    lanes: dict[str, float]
    latency: float
    issue_share: float = 0.75
    pipe_share: float = 0.85


LANES = {"issue": 128, "fma": 128, "imad": 64, "alu": 64, "mufu": 16, "lsu": 32, "l1": 32, "l2": 64, "half": 128}
H100 = GPU("H100", 132, 1.755, 3000, LANES, 800)
H200 = GPU("H200", 132, 1.98, 4300, LANES, 800)

_FMA = {"FADD", "FMUL", "FFMA"}
_HALF = {"HFMA2", "HADD2", "HMUL2"}
_MUFU = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"}
_LSU = {"LDG", "STG", "LDS", "STS", "LDL", "STL", "SHFL", "LDSM", "LDGSTS"}
_OTHER = {"BRA", "EXIT", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "WARPSYNC", "BAR", "NOP", "LDC", "S2R", "S2UR", "R2UR", "DEPBAR"}


def pipe(opcode: str) -> str:
    """What executes an instruction of this opcode; nothing of interest where that is empty."""
    name = opcode.partition(".")[0]
    if name in _FMA:
        return "fma"
    if name in _HALF:
        return "half"
    if name == "IMAD":
        return "imad"
    if name in _MUFU:
        return "mufu"
    if name in _LSU:
        return "lsu"
    return "" if name in _OTHER or name.startswith("U") else "alu"


def resident_warps(launched: Launched) -> int:
    """That a multiprocessor of sm_90 has room for."""
    launch = launched.launch
    registers = -(-launched.registers * 32 // 256) * 256  # of a warp
    blocks = min(32, 64 // launch.warps, 65536 // registers // launch.warps)
    blocks = min(blocks, (228 << 10) // (launched.shared + 1024))
    return blocks * launch.warps


@dataclass(frozen=True)
class Prediction:
    """Of one launch: seconds that each part would need, and what makes them up."""

    kernel: str
    seconds: dict[str, float]
    warps: int
    waves: float
    resident: int
    in_flight: float
    counts: dict[str, float]

    @property
    def binds(self) -> str:
        return max(self.seconds, key=lambda part: self.seconds[part])

    @property
    def time(self) -> float:
        waves = math.ceil(self.waves) / self.waves
        return max(self.seconds.values()) * (waves if self.binds != "memory" else 1)


def count(launched: Launched) -> tuple[Counts, float]:
    """Of some blocks, and of how many blocks of the launch each stands for."""
    blocks = launched.launch.blocks
    chosen = sorted({round(i * (blocks - 1) / (_BLOCKS - 1)) for i in range(_BLOCKS)}) if blocks > 1 else [0]
    return execute(launched.launch, launched.memory, chosen), blocks / len(chosen)


def predict(launched: Launched, bytes_moved: int, gpu: GPU, counted: tuple[Counts, float]) -> Prediction:
    counts, scale = counted
    launch = launched.launch
    pipes: Counter[str] = Counter()
    for opcode, n in counts.issued.items():
        pipes["issue"] += n
        pipes[pipe(opcode)] += n
    pipes.pop("", None)
    pipes["l1"] = counts.load_lines + counts.store_lines + counts.shared
    work = {name: scale * n for name, n in pipes.items()}
    clocks = {name: n * 32 / gpu.lanes[name] / gpu.multiprocessors for name, n in work.items()}
    clocks["l2"] = 32 * scale * (counts.load_sectors + counts.store_sectors) / gpu.lanes["l2"] / gpu.multiprocessors
    seconds = {
        name: n / gpu.ghz / 1e9 / (gpu.issue_share if name == "issue" else gpu.pipe_share) for name, n in clocks.items()
    }
    seconds["memory"] = bytes_moved / gpu.copy_gb_per_s / 1e9
    resident = resident_warps(launched)
    warps = launch.blocks * launch.warps
    waves = warps / resident / gpu.multiprocessors
    waits = counts.waits / counts.warps
    seconds["latency"] = max(waves, 1) * waits * gpu.latency / gpu.ghz / 1e9
    in_flight = resident * 32 * counts.load_sectors / max(counts.waits, 1)
    return Prediction(launched.kernel, seconds, warps, waves, resident, in_flight, work)
