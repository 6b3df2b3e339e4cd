"""``make roofline``: the formula on figures that are known, kernels that keep to their floors, and what follows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch

from fastcnn import backends

pytest.importorskip("triton")
if backends.INTERPRETING:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from tools.machine_code import launches, roofline, workloads
from tools.machine_code.roofline import GPU, Needs

TINY = GPU("G", 10, 1.0, 100.0, {"issue": 128, "alu": 64, "l1": 32, "l2": 64}, (500, 50))
NEEDS = Needs("kernel", {"issue": 300.0, "alu": 17.0, "l1": 17.0, "l2": 0.0}, 10, 40, 4, 32, 2.0, 0.1, 0.0, 0.0, 0.0)


def seconds(**changes):
    return {name: round(1e9 * s, 3) for name, s in replace(NEEDS, **changes).seconds(TINY).items()}


def test_each_part_needs_its_own_time():
    # 10 multiprocessors issue 4 instructions to warps in a nanosecond, of which 75% can be used
    assert seconds()["issue"] == 10.0
    assert seconds()["alu"] == 1.0  # 17 / 2 / 85%
    assert seconds()["l1"] == 2.0
    assert seconds(work={**NEEDS.work, "l2": 64 * 8.5})["l2"] == 1.0
    assert seconds()["latency"] == 2 * (0.1 * 500 + 0.9 * 50)
    assert seconds(warps=80)["latency"] == 2 * seconds()["latency"]  # two waves


def test_loads_that_cover_the_latency_at_the_rate_of_a_copy():
    launch = replace(NEEDS, work={**NEEDS.work, "l2": 300.0}, loaded=200.0)
    # A multiprocessor's part of the copy is 10 bytes in a nanosecond, of which two thirds are loaded.
    assert launch.needed_in_flight(TINY) == pytest.approx(500 * 10 * 2 / 3)
    assert launch.needed_in_flight(replace(TINY, ghz=2.0)) == pytest.approx(250 * 10 * 2 / 3)
    assert NEEDS.needed_in_flight(TINY) == 0.0


def test_what_takes_longest_binds_and_the_last_wave_stretches_it():
    launch = replace(NEEDS, waits=0.0, warps=50)  # 1.25 waves
    bound = roofline.predict(100, [launch], TINY)
    assert bound.binds == "issue"
    assert bound.ms == pytest.approx(1e-5 * 2 / 1.25)
    assert replace(launch, blocks=15, warps=30).stretch(TINY) == pytest.approx(2 / 1.5)  # all at once, two on some
    memory = roofline.predict(10000, [launch], TINY)
    assert (memory.binds, memory.share, memory.ms) == ("memory", 1.0, pytest.approx(1e-4))
    assert roofline.predict(10000, [launch, launch], TINY).ms == pytest.approx(1e-4 + bound.ms)


def test_calibration_takes_the_place_of_what_is_assumed():
    rates = {"FFMA": 1.92, "IMAD": 0.9, "PRMT": 0.96, "MUFU": 0.24, "LDS": 0.48}  # T lanes/s of 10 multiprocessors
    gpu = replace(
        TINY, lanes={"issue": 128, "fma": 128, "imad": 60, "alu": 64, "mufu": 16, "lsu": 32, "l1": 32, "l2": 64}
    )
    figures = [{"what": kind, "tera_per_s": rate} for kind, rate in rates.items()]
    figures += [{"what": "rates", "copy_gb_per_s": 90.0}, {"what": "latency", "idle_clocks": 700.0}]
    results = {"header": {"gpu": "NVIDIA G"}, "parts": {"calibration": {"figures": figures}}}
    found = roofline._calibrated(gpu, [{"header": {"gpu": "another"}, "parts": {}}, results])
    assert (found.ghz, found.copy_gb_per_s, found.latency, found.source) == (1.5, 90.0, (700.0, 50), "NVIDIA G")
    assert found.lanes == gpu.lanes
    figures[1]["tera_per_s"] = 0.6  # IMAD is slower than assumed: so may the clock be, for all that is known
    slower = roofline._calibrated(gpu, [results])
    assert slower.ghz == 1.0
    assert {pipe: lanes * slower.ghz for pipe, lanes in slower.lanes.items() if pipe in ("fma", "imad", "mufu")} == {
        "fma": 192.0,
        "imad": 60.0,
        "mufu": 24.0,
    }
    assert roofline._calibrated(gpu, [{**results, "parts": {}}]) == gpu


@pytest.mark.parametrize(
    ("opcode", "pipe"),
    [
        *(("FFMA", "fma"), ("IMAD.WIDE.U32", "imad"), ("LOP3.LUT", "alu"), ("MUFU.RSQ", "mufu"), ("LDG.E.128", "lsu")),
        *(("UIADD3", ""), ("EXIT", ""), ("HSET2.BF16_V2.EQ.AND", "half"), ("FMNMX.NAN", "alu")),
    ],
)
def test_pipes_of_instructions(opcode, pipe):
    assert roofline.pipe(opcode) == pipe


def test_resident_warps_are_limited_by_registers_blocks_and_shared_memory():
    launched = next(iter(launches.triton(work("lrn", "bf16"))))

    def resident(**changes):
        return roofline.resident_warps(replace(launched, **changes))

    assert launched.launch.warps == 4
    assert [resident(registers=r, shared=0) for r in (32, 33, 64, 128, 255)] == [64, 48, 32, 16, 8]
    assert [resident(registers=32, shared=s << 10) for s in (1, 47, 113)] == [64, 16, 8]


def work(op, dtype, format="channels_last", mode="forward", layer="AlexNet conv1"):
    wanted = op, layer, dtype, format, mode
    return next(w for w in workloads.workloads() if (w.op, w.layer, w.dtype, w.format, w.mode) == wanted)


# -- floors -----------------------------------------------------------------------------------------------------------

KINDS = ("bf16", "channels_last"), ("fp32", "NCHW")
CHECKED = [
    *(work(op, *kind, mode) for op, kind, mode in product(roofline.OPS, KINDS, ("forward", "backward"))),
    *(work("augment", *kind, layer=layer) for kind, layer in product(KINDS, workloads.CROPPED)),
]


@pytest.mark.slow
@pytest.mark.parametrize("language", roofline.LANGUAGES)
def test_no_kernel_falls_below_its_floor(language):
    """With a compiler for which there are floors."""
    if language == "cuda" and not shutil.which("nvcc"):
        pytest.skip("there is no nvcc")
    compiler = roofline.compiler(language)
    floors = json.loads(roofline.FLOORS.read_text()).get(compiler)
    if floors is None:
        pytest.skip(f"there are no floors for {compiler}; `make roofline` writes them")
    # Those for another compiler than `make roofline` had may be older than an operator.
    latest = compiler in json.loads(roofline.ROWS.read_text())["compilers"]
    checked = [work for work in CHECKED if latest or str(work) in floors]
    shares = {row.key: roofline.floor(row) for row in roofline.rows([language], checked)}
    assert len(shares) == len(checked)
    below = {key: (share, floors[key]) for key, share in shares.items() if share < floors[key]}
    assert not below


# -- what follows ------------------------------------------------------------------------------------------------------


def test_operators_choose_what_is_predicted_or_was_measured_to_be_faster():
    times: dict[tuple, dict[str, float]] = {}
    for row in json.loads(roofline.ROWS.read_text())["rows"]:
        name = row["op"] + ("_backward" if row["mode"] == "backward" else "")
        ms = times.setdefault((name, *row["first"]), {})
        ms[row["language"]] = ms.get(row["language"], 0.0) + row["predictions"]["H100"]["ms"]
    times = {key: ms for key, ms in times.items() if len(ms) == 2}
    rows = {
        tuple(key): rest for *key, rest in ((*r[:4], r[4:]) for r in json.loads(roofline.FASTER.read_text())["rows"])
    }
    assert rows.keys() >= times.keys()
    for (op, dtype, channels_last, elements), (faster, source) in rows.items():
        if source != "measured":
            assert source == "predicted"
            ms = times[op, dtype, channels_last, elements]
            assert faster == min(ms, key=lambda language: ms[language])
        chosen = backends._faster(op, getattr(torch, dtype), channels_last, elements)
        assert chosen[0] == faster
