"""How fast a kernel can be, predicted from its machine code: ``make roofline``.

:mod:`.execute` counts what some blocks of a launch do. From the counts follows the time that each part of a GPU would
need for it alone::

    issue   instructions / 75% of the issue slots
    pipe    instructions of the kind / 85% of what the pipe takes: fma, imad, alu, half, mufu, lsu
    l1      128-byte lines that each load and store touches, and wavefronts of shared memory / 85% of one a clock
    l2      32-byte sectors that a block loads, once each, or stores / 85% of 64 bytes a clock and multiprocessor
    memory  bytes that must be read and written / the rate of a copy
    latency clocks that a warp waits for its loads, as often as warps follow each other on a multiprocessor

They overlap, so that the longest is the prediction; unless it is memory's, it is stretched by the last wave of blocks,
which leaves multiprocessors idle, or, where all blocks run at once, by those that have one more than others. 75%
and 85% leave what dependent instructions, barriers and an uneven mix of warps cost. Sources: NVIDIA's Nsight Compute
documentation (pipes, wavefronts, sectors); Williams, Waterman, Patterson, "Roofline", 2009; Little's law for latency.
"""

import argparse
import json
import math
import multiprocessing
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastcnn.bench.cases import DTYPES, Case
from fastcnn.bench.operators import OPERATORS
from fastcnn.memory_format import is_channels_last

from .execute import Counts, execute
from .launches import ROOT, Cuda, Launched, build, triton
from .workloads import BATCH, Workload, workloads

TABLE, ROWS = ROOT / "docs" / "roofline.md", ROOT / "docs" / "roofline.json"
FASTER = ROOT / "fastcnn" / "faster.json"  # from it the operators choose
FLOORS = ROOT / "tests" / "roofline_floors.json"
LANGUAGES = ("triton", "cuda")
OPS = ("lrn", "max_pool2d", "relu_lrn_max_pool2d")
_BLOCKS = 16  # of a launch, that are executed
_ISSUE_SHARE, _PIPE_SHARE = 0.75, 0.85


@dataclass(frozen=True)
class GPU:
    """What a GPU does.

    Args:
        name: a key of ``gpus.json``.
        multiprocessors: how many it has.
        ghz: its clock.
        copy_gb_per_s: bytes read and written by a copy.
        lanes: pipe -> lanes of an instruction that a multiprocessor finishes in a clock.
        latency: clocks until a load that misses the L1 cache, or does not, can be used.
        source: "assumed", or the device that was calibrated.
    """

    name: str
    multiprocessors: int
    ghz: float
    copy_gb_per_s: float
    lanes: dict[str, float]
    latency: tuple[float, float]
    source: str = "assumed"


@cache
def assumed() -> dict[str, GPU]:
    """Those of ``gpus.json``."""
    found = json.loads(Path(__file__).with_name("gpus.json").read_text())
    return {name: GPU(name, **fields) for name, fields in found.items() if name != "comment"}


@cache
def gpus() -> tuple[GPU, ...]:
    """With what ``make gpu`` measured in the place of what is assumed."""
    return tuple(_calibrated(gpu, _results()) for gpu in assumed().values())


def _results() -> list[dict[str, Any]]:
    """What `make gpu` wrote on GPUs."""
    return [json.loads(file.read_text()) for file in sorted((ROOT / "benchmarks/results").glob("*/results.json"))]


# Kind of instruction that is calibrated -> pipes that take it.
_CALIBRATED = {"FFMA": ("fma",), "IMAD": ("imad",), "PRMT": ("alu",), "MUFU": ("mufu",), "LDS": ("lsu", "l1")}


def _calibrated(gpu: GPU, results: Iterable[dict[str, Any]]) -> GPU:
    """Rates as they were measured; the clock is that at which the slowest kind was finished as assumed.

    The issue slots, of which there is no measurement, follow the clock.
    """
    for document in results:
        figures = {f["what"]: f for f in document.get("parts", {}).get("calibration", {}).get("figures", ())}
        if gpu.name not in (document["header"].get("gpu") or "") or not figures.keys() >= _CALIBRATED.keys():
            continue
        rates = {
            pipe: 1e3 * figures[kind]["tera_per_s"] / gpu.multiprocessors
            for kind, pipes in _CALIBRATED.items()
            for pipe in pipes
        }
        ghz = min(rate / gpu.lanes[pipe] for pipe, rate in rates.items())
        return replace(
            gpu,
            ghz=ghz,
            copy_gb_per_s=figures["rates"]["copy_gb_per_s"],
            lanes={**gpu.lanes, **{pipe: rate / ghz for pipe, rate in rates.items()}},
            latency=(figures["latency"]["idle_clocks"], gpu.latency[1]),
            source=document["header"]["gpu"],
        )
    return gpu


# -- what a launch needs ----------------------------------------------------------------------------------------------

_PIPES = {
    **dict.fromkeys(("FADD", "FMUL", "FFMA"), "fma"),
    **dict.fromkeys(("HFMA2", "HADD2", "HMUL2", "HSET2", "HSETP2"), "half"),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"), "mufu"),
    **dict.fromkeys(("LDG", "STG", "LDS", "STS", "LDL", "STL", "SHFL", "LDSM", "LDGSTS"), "lsu"),
    **dict.fromkeys(("BRA", "EXIT", "BSSY", "BSYNC", "BREAK", "CALL", "RET", "WARPSYNC", "BAR", "NOP", "DEPBAR"), ""),
    **dict.fromkeys(("LDC", "S2R", "S2UR", "R2UR", "LDGDEPBAR"), ""),
    "IMAD": "imad",
}


def pipe(opcode: str) -> str:
    """What executes an instruction of this opcode; nothing of interest where that is empty."""
    name = opcode.partition(".")[0]
    return _PIPES.get(name, "" if name.startswith("U") else "alu")


def resident_warps(launched: Launched) -> int:
    """That a multiprocessor of sm_90 has room for."""
    launch = launched.launch
    registers = -(-launched.registers // 8) * 8 * 32  # of a warp
    blocks = min(32, 64 // launch.warps, 65536 // registers // launch.warps)
    return min(blocks, (228 << 10) // (launched.shared + 1024)) * launch.warps


@dataclass(frozen=True)
class Needs:
    """What one launch asks of any GPU.

    Args:
        kernel: name of its function.
        work: pipe, or "issue", "l1" -> instructions or wavefronts of all warps; "l2" -> bytes.
        blocks: of the launch.
        warps: of the launch.
        resident: warps that a multiprocessor has room for.
        registers: of a thread.
        waits: of a warp for loads.
        missed: share of the sectors that loads touch which are not in the L1 cache.
        in_flight: bytes of loads under way in a multiprocessor.
        loaded: those of the "l2" bytes that are loaded, not stored.
        conflicts: those of the "l1" wavefronts that are bank conflicts of shared memory.
    """

    kernel: str
    work: dict[str, float]
    blocks: int
    warps: int
    resident: int
    registers: int
    waits: float
    missed: float
    in_flight: float
    loaded: float
    conflicts: float

    def seconds(self, gpu: GPU) -> dict[str, float]:
        """That each part needs."""
        clocks = {name: 32 * n / gpu.lanes[name] / gpu.multiprocessors for name, n in self.work.items()}
        clocks["l2"] /= 32
        for name in clocks:
            clocks[name] /= _ISSUE_SHARE if name == "issue" else _PIPE_SHARE
        latency = self.missed * gpu.latency[0] + (1 - self.missed) * gpu.latency[1]
        clocks["latency"] = max(self.waves(gpu), 1) * self.waits * latency
        return {name: n / gpu.ghz / 1e9 for name, n in clocks.items()}

    def needed_in_flight(self, gpu: GPU) -> float:
        """Bytes of loads that must be under way in a multiprocessor for the rate of a copy: Little's law."""
        share = self.loaded / max(self.work["l2"], 1)
        return gpu.latency[0] / gpu.ghz * share * gpu.copy_gb_per_s / gpu.multiprocessors

    def waves(self, gpu: GPU) -> float:
        return self.warps / (self.resident * gpu.multiprocessors)

    def stretch(self, gpu: GPU) -> float:
        """By what factor the launch takes longer because multiprocessors idle at its end."""
        share = self.waves(gpu) if self.waves(gpu) > 1 else self.blocks / gpu.multiprocessors
        return math.ceil(share) / share


def needs(launched: Launched) -> Needs:
    launch = launched.launch
    blocks = sorted({round(i * (launch.blocks - 1) / (_BLOCKS - 1)) for i in range(_BLOCKS)})
    counts = execute(launch, launched.memory, blocks)
    scale, resident = launch.blocks / len(blocks), resident_warps(launched)
    return Needs(
        launched.kernel,
        {name: scale * n for name, n in _work(counts).items()},
        launch.blocks,
        launch.blocks * launch.warps,
        resident,
        launched.registers,
        counts.waits / counts.warps,
        counts.load_sectors / max(counts.load_touched, 1),
        32 * counts.load_sectors / max(counts.waits, 1) * resident,
        scale * 32 * counts.load_sectors,
        scale * counts.conflicts,
    )


def _work(counts: Counts) -> dict[str, float]:
    work: Counter[str] = Counter()
    for opcode, n in counts.issued.items():
        work["issue"] += n
        work[pipe(opcode)] += n
    del work[""]
    work["l1"] = counts.load_lines + counts.store_lines + counts.shared
    work["l2"] = 32 * (counts.load_sectors + counts.store_sectors)
    return dict(work)


# -- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Of one GPU: milliseconds, the share of a copy of as many bytes, and what binds the longest launch."""

    ms: float
    share: float
    binds: str


@dataclass(frozen=True)
class Row:
    """One operator in one language; ``first`` is its first argument's dtype, whether in channels_last, and elements."""

    op: str
    layer: str
    dtype: str
    format: str
    mode: str
    shape: tuple[int, ...]
    first: tuple[str, bool, int]
    language: str
    bytes: int
    launches: list[Needs]
    predictions: dict[str, Prediction]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def registered(self) -> str:
        return self.op + ("_backward" if self.mode == "backward" else "")

    @property
    def key(self) -> str:
        return f"{self.op} {self.mode}, {self.layer}, {self.dtype}, {self.format}"


def predict(bytes_moved: int, launches: Sequence[Needs], gpu: GPU) -> Prediction:
    copy = bytes_moved / gpu.copy_gb_per_s / 1e9
    total, binds = 0.0, ""
    for i, launch in enumerate(launches):
        seconds = launch.seconds(gpu)
        longest = max(seconds, key=lambda part: seconds[part])
        time = seconds[longest] * (1 if longest == "latency" else launch.stretch(gpu))
        if i == 0:
            binds = longest if time > copy else "memory"
            time = max(time, copy)
        total += time
    return Prediction(1e3 * total, copy / total, binds)


def row(work: Workload, language: str) -> Row:
    launched = triton(work) if language == "triton" else _cuda().launches(work)
    launches = [needs(launch) for launch in launched]
    predictions = {gpu.name: predict(work.bytes, launches, gpu) for gpu in gpus()}
    fields = {name: getattr(work, name) for name in ("op", "layer", "dtype", "format", "mode", "shape")}
    x = work.arguments()[0]
    first = _name(x.dtype), is_channels_last(x), x.numel()
    return Row(**fields, first=first, language=language, bytes=work.bytes, launches=launches, predictions=predictions)


_cuda = cache(Cuda)


def compiler(language: str) -> str:
    """Name and version of what makes the machine code."""
    if language == "triton":
        return f"triton {metadata.version('triton')}"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\S+),", told)
    return f"nvcc {found[1] if found else told}"


def _row(pair: tuple[Workload, str]) -> Row:
    return row(*pair)


def rows(languages: Sequence[str], of: Iterable[Workload] = ()) -> list[Row]:
    """Of all workloads, or those given, on all processors."""
    pairs = [(work, language) for work in of or workloads() for language in languages if language in work.languages]
    if "cuda" in languages:
        build(90)  # once, before the others ask for it
    # Processes that are forked must not use the threads that torch may have started here.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(_row, pairs))


# -- files ------------------------------------------------------------------------------------------------------------


def document(found: Sequence[Row], languages: Sequence[str]) -> dict[str, Any]:
    return {
        "compilers": [compiler(language) for language in languages],
        "gpus": [asdict(gpu) for gpu in gpus()],
        "rows": [asdict(row) for row in found],
    }


def floors(found: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Compiler -> row -> its :func:`floor`."""
    by_compiler: dict[str, dict[str, float]] = {}
    for row in found:
        by_compiler.setdefault(compiler(row.language), {})[row.key] = math.floor(1000 * floor(row)) / 1000
    return by_compiler


def floor(row: Row) -> float:
    """The share of a copy that is predicted for an H100 as it is assumed, whatever is measured later."""
    return predict(row.bytes, row.launches, assumed()["H100"]).share


def faster(found: Sequence[Row]) -> dict[str, Any]:
    """Which language is faster for each operator, dtype, format and number of elements of its first argument.

    As predicted for an H100; where both were measured, as measured. Calls that differ in nothing of this are added up.
    """
    times: dict[tuple[str, str, bool, int], dict[str, float]] = {}
    for row in found:
        ms = times.setdefault((row.registered, *row.first), {})
        ms[row.language] = ms.get(row.language, 0.0) + row.predictions["H100"].ms
    measured = {key: ms for document in _results() for key, ms in _measured(document).items() if len(ms) == 2}
    chosen = [
        [*key, min(ms, key=lambda language: ms[language]), "measured" if key in measured else "predicted"]
        for key, ms in sorted({**times, **measured}.items())
        if len(ms) == 2
    ]
    return {"columns": ["op", "dtype", "channels_last", "elements", "faster", "source"], "rows": chosen}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measured(document: dict[str, Any]) -> dict[tuple[str, str, bool, int], dict[str, float]]:
    """Milliseconds of the rows of a ``results.json``."""
    times: dict[tuple[str, str, bool, int], dict[str, float]] = {}
    for fields in document["rows"]:
        language = fields["provider"].removeprefix("fastcnn.")
        operator = OPERATORS.get(fields["op"])
        if operator is None or operator.weight_shape or language not in LANGUAGES or not fields["median_ms"]:
            continue
        case = Case(fields["op"], tuple(fields["shape"]), fields["dtype"], fields["format"], fields["mode"])
        forward = case.mode == "forward"
        elements = math.prod(case.shape if forward else operator.output_shape(case))
        name = operator.registered + ("" if forward else "_backward")
        of_input = _name(DTYPES[case.dtype]), case.format == "channels_last"
        key = name, *(("uint8", False) if operator.takes_pictures else of_input), elements
        ms = times.setdefault(key, {})
        ms[language] = ms.get(language, 0.0) + fields["median_ms"]
    return times


_HEAD = f"""# Predicted speed of the memory-bound kernels

Written by `make roofline`, on a machine that needs no GPU, from the machine code for sm_90: predictions, not
measurements. Each kernel is executed, instruction by instruction, for {_BLOCKS} blocks of its launch at batch {BATCH};
`tools/machine_code/roofline.py` has the formula. A cell is the predicted share of a copy that moves as many bytes, and
what binds; then instructions issued per element of the input, of `augment`'s output.

"""


def markdown(found: Sequence[Row], languages: Sequence[str]) -> str:
    by_key: dict[str, dict[str, Row]] = {}
    for row in found:
        by_key.setdefault(row.key, {})[row.language] = row
    text = _HEAD + "".join(f"- {gpu.name}: {_constants(gpu)}\n" for gpu in gpus())
    text += f"- compilers: {', '.join(compiler(language) for language in languages)}\n\n"
    head = ["operator", "layer", "dtype", "format", "MB"]
    for language in languages:
        name = {"triton": "Triton", "cuda": "CUDA C++"}[language]
        head += [f"{name}, {gpu.name}" for gpu in gpus()] + [f"{name}, issued"]
    lines = [head, ["---"] * len(head)]
    for members in by_key.values():
        first = next(iter(members.values()))
        cells = [f"{first.op} {first.mode}", first.layer, first.dtype, first.format, f"{first.bytes / 1e6:.0f}"]
        for language in languages:
            cells += _cells(members.get(language))
        lines.append(cells)
    return text + _table(lines) + _details(found)


def _table(lines: Iterable[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


_COUNTED = "issue", "fma", "imad", "alu", "half", "mufu", "lsu", "l1"


def _details(found: Sequence[Row]) -> str:
    """What a row's kernels take of a multiprocessor, and do for an element."""
    head = [
        "operator",
        "layer",
        "dtype",
        "format",
        "language",
        "kernel",
        "registers",
        "resident warps",
        "KiB in flight",
    ]
    head += [f"KiB needed, {gpu.name}" for gpu in gpus()] + [f"waves, {gpu.name}" for gpu in gpus()]
    head += [*_COUNTED, "bank conflicts", "L2 bytes"]
    lines = [head, ["---"] * len(head)]
    for row in found:
        for launch in row.launches:
            lines.append(
                [
                    *(f"{row.op} {row.mode}", row.layer, row.dtype, row.format),
                    *(row.language, re.sub(r".*::(\w+)<.*", r"\1", launch.kernel), str(launch.registers)),
                    *(str(launch.resident), f"{launch.in_flight / 1024:.1f}"),
                    *(f"{launch.needed_in_flight(gpu) / 1024:.1f}" for gpu in gpus()),
                    *(f"{launch.waves(gpu):.1f}" for gpu in gpus()),
                    *(f"{32 * launch.work.get(part, 0) / row.elements:.1f}" for part in _COUNTED),
                    f"{32 * launch.conflicts / row.elements:.1f}",
                    f"{launch.work['l2'] / row.elements:.1f}",
                ]
            )
    return "\n## Counts\n\n" + _DETAILS + _table(lines)


_DETAILS = """Per element of the input, of `augment`'s output: instructions, including those of lanes without an
element; under l1 wavefronts of 32 words, of the L1 cache and of shared memory; those lost to bank conflicts; and bytes
between L2 cache and multiprocessors. In flight are the bytes that a multiprocessor's warps have loads under way for
when they wait. Needed, by Little's law, is what arrives during one load's latency at the rate of a copy, counting only
the share of the kernel's L2 bytes that it loads.

"""


def _constants(gpu: GPU) -> str:
    return (
        f"{gpu.source}; {gpu.multiprocessors} multiprocessors at {gpu.ghz:.2f} GHz, copy {gpu.copy_gb_per_s:.0f} GB/s, "
        f"latency {gpu.latency[0]:.0f} clocks"
    )


def _cells(row: Row | None) -> list[str]:
    if row is None:
        return [""] * (len(gpus()) + 1)
    issued = 32 * sum(launch.work["issue"] for launch in row.launches) / row.elements
    shares = [f"{p.share:.0%} {p.binds}" for p in (row.predictions[gpu.name] for gpu in gpus())]
    return [*shares, f"{issued:.1f}"]


def _compact(document: dict[str, Any]) -> str:
    """A line for each row."""
    *others, rows = document.items()
    lines = ",\n".join(json.dumps(row) for row in rows[1])
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in others)
    return f'{{\n{head} "{rows[0]}": [\n{lines}\n]}}\n'


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.machine_code.roofline", description="``make roofline``")
    parser.add_argument("--floors", action="store_true", help="only note the floors of this compiler of Triton")
    options = parser.parse_args(arguments)
    languages = LANGUAGES[:1] if options.floors else LANGUAGES
    found = rows(languages)
    known = json.loads(FLOORS.read_text()) if FLOORS.exists() else {}
    FLOORS.write_text(json.dumps({**known, **floors(found)}, indent=1) + "\n")
    if options.floors:
        return
    TABLE.write_text(markdown(found, languages))
    FASTER.write_text(_compact(faster(found)))
    ROWS.write_text(_compact(document(found, languages)))
    print(markdown(found, languages))


if __name__ == "__main__":
    main()
