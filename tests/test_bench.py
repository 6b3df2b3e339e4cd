"""The benchmark: what it measures, that nothing wrong gets a time, and that its figures follow from the times."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from narrow import assert_readable
from rich.console import Console
from torch import Tensor, nn

import fastcnn
import fastcnn.data
import fastcnn.functional as FF
from fastcnn.bench import isolate, report
from fastcnn.bench import measure as measuring
from fastcnn.bench.cases import ANY_FORMAT, Case
from fastcnn.bench.measure import Budget, measure, time_rounds
from fastcnn.bench.memory import saved_bytes
from fastcnn.bench.operator_workload import CHECKED_IMAGES, OperatorWorkload
from fastcnn.bench.operators import LRN, OPERATORS, PEERS, POOL, SHAPES, STAGES, convolution, select
from fastcnn.bench.providers import OperatorProvider, operator_providers
from fastcnn.bench.rows import Row, add_ratios

SMALL, PICTURES = (5, 6, 9, 11), (5, 3, 9, 11)
ONCE = Budget(repeats=1)
HAS_CPU = "cpu" in fastcnn.backends.available()


def lrn_case(**options: Any) -> Case:
    return Case("lrn", SMALL, **options)


def row(provider: str, median_ms: float | None = None, *, case: Case | None = None, **options: Any) -> Row:
    case = case or lrn_case()
    return Row(
        case.op, case.shape, case.dtype, case.format, case.mode, case.memory, provider, median_ms=median_ms, **options
    )


def provider(function: Callable[..., Tensor], name: str = "fastcnn.other") -> OperatorProvider:
    return OperatorProvider(name, lambda *_: function)


def run(case: Case | list[Case], *providers: OperatorProvider, source: str = "random", **options: Any) -> list[Row]:
    cases = case if isinstance(case, list) else [case]
    return measure(cases, partial(OperatorWorkload, source=source), providers, ONCE, **options)


def right(x: Tensor) -> Tensor:
    return FF.local_response_norm(x, LRN.size, LRN.alpha, LRN.beta, LRN.k)


def text_of(*tables: object, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(*tables)
    return capture.get()


# Cases


def test_usual_cases_are_those_of_the_first_stage() -> None:
    cases = select()
    usual = {"conv2d_relu": SHAPES["conv2"], "augment": (128, 3, 256, 256), "augment_resized": (128, 3, 256, 256)}
    assert all(case.shape == usual.get(case.op, STAGES["stage1"]) for case in cases)
    assert {case.shape for case in cases if case.op == "conv2d_relu"} == {(32, 96, 27, 27)}
    assert {case.format for case in cases} == {"NCHW", "channels_last"}
    assert {(c.op, c.mode, c.memory, c.dtype) for c in cases} == {
        ("lrn", "forward", "fresh", "fp32"),
        ("lrn", "forward", "mapped", "fp32"),
        ("lrn", "backward", "fresh", "fp32"),
        ("lrn", "backward", "mapped", "fp32"),
        *(("relu_lrn_max_pool2d", "forward", memory, t) for memory in ("fresh", "mapped") for t in ("fp32", "bf16")),
        ("max_pool2d", "forward", "mapped", "fp32"),
        ("batch_norm_relu_max_pool2d", "forward", "fresh", "fp32"),
        ("batch_norm_relu_max_pool2d", "forward+backward", "fresh", "fp32"),
        ("relu_lrn_max_pool2d", "forward+backward", "fresh", "fp32"),
        *((op, m, "fresh", "fp32") for op in ("max_pool2d", "conv2d_relu") for m in ("forward", "forward+backward")),
        *((op, "forward", "fresh", dtype) for op in ("augment", "augment_resized") for dtype in ("fp32", "bf16")),
    }


def test_batch_replaces_every_n() -> None:
    assert {case.shape[0] for case in select(batch=7, full=True)} == {7}
    assert select(ops=["lrn"], shapes=[SMALL], batch=7)[0].shape == (7, *SMALL[1:])
    of_layers = select(layers=["VGG-16 conv5", "AlexNet conv3"], modes=["backward"], dtypes=["fp32"], batch=2)
    assert {(case.op, case.layer, case.shape) for case in of_layers} == {
        ("conv2d_relu", "VGG-16 conv5", (2, 512, 14, 14)),
        ("conv2d_relu", "AlexNet conv3", (2, 256, 13, 13)),
    }


def test_full_holds_every_usual_case_once() -> None:
    full = select(full=True)
    assert set(select()) < set(full)
    assert len(set(full)) == len(full)


def test_what_is_asked_for_replaces_the_usual() -> None:
    asked = select(ops=["lrn"], shapes=[SMALL], dtypes=["fp16"], formats=["NCHW"], modes=["forward+backward"])
    assert asked == [Case("lrn", SMALL, "fp16", "NCHW", "forward+backward")]


@pytest.mark.parametrize(
    ("op", "mode", "expected"),
    [
        ("lrn", "forward", 4 * (100 + 100)),
        ("lrn", "backward", 4 * (100 + 100 + 100)),
        ("lrn", "forward+backward", 4 * 500),
        ("relu_lrn_max_pool2d", "forward", 4 * (100 + 16)),
        ("relu_lrn_max_pool2d", "forward+backward", 4 * (100 + 16) + 16 + 16 + 4 * (16 + 100 + 100)),
        ("batch_norm_relu_max_pool2d", "forward", 4 * (200 + 16)),
        ("batch_norm_relu_max_pool2d", "backward", 4 * (300 + 32) + 32),
        ("max_pool2d", "forward+backward", 4 * (100 + 16) + 16 + 16 + 4 * (16 + 100)),
        ("augment", "forward", 3 * 4 * 4 * (1 + 4)),
        ("conv2d_relu", "forward", 4 * (100 + 6400 + 256 * 2 * 25)),
        ("conv2d_relu", "backward", 2 * 4 * (100 + 6400 + 256 * 2 * 25)),
    ],
)
def test_bytes_moved_counts_each_tensor_once(op: str, mode: str, expected: int) -> None:
    assert OPERATORS[op].bytes_moved(Case(op, (1, 4, 5, 5), mode=mode), 4) == expected


# Inputs


@pytest.mark.parametrize("stage", SHAPES)
def test_photographs_give_the_feature_maps_of_each_stage(stage: str) -> None:
    shape = (3, *SHAPES[stage][1:])
    workload = OperatorWorkload(Case("relu_lrn_max_pool2d", shape, "bf16"), "photographs")
    x, dy = workload.x, workload.dy
    assert (x.shape, x.dtype) == (shape, torch.bfloat16)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert dy.is_contiguous(memory_format=torch.channels_last)
    assert 10 < x.float().std() < 1000
    assert not torch.equal(x[0], x[1])


def test_inputs_are_the_same_in_every_format() -> None:
    one, other = OperatorWorkload(lrn_case(format="NCHW")), OperatorWorkload(lrn_case())
    assert torch.equal(one.x, other.x)
    assert torch.equal(one.dy, other.dy)


def test_windows_without_a_clear_maximum_get_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = torch.ones(SMALL)
    flat[0, 0, 0, 0] = 2.0
    monkeypatch.setattr("fastcnn.bench.operator_workload.features", lambda *_: flat)
    dy = OperatorWorkload(Case("relu_lrn_max_pool2d", SMALL, mode="forward+backward")).dy
    checked = dy[:CHECKED_IMAGES].clone()
    assert checked[0, 0, 0, 0] != 0
    checked[0, :, 0, 0] = 0  # the peak's neighbours in its LRN windows stand out too, downwards
    assert not checked.any()


# Checks


@pytest.mark.usefixtures("best_backend")
@pytest.mark.parametrize("format", ["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("op", "mode"), [(op, mode) for op, record in OPERATORS.items() for mode in record.modes])
def test_right_outputs_get_a_time(op: str, dtype: str, format: str, mode: str) -> None:
    providers = [p for name, p in operator_providers().items() if name.startswith("fastcnn.")]
    rows = run(Case(op, PICTURES if OPERATORS[op].takes_pictures else SMALL, dtype, format, mode), *providers)
    assert [r.failure for r in rows] == [None] * len(rows)
    for r in rows:
        assert r.n == 1
        assert r.median_ms is not None
        assert r.median_ms > 0
        assert r.error is not None
        assert r.tolerance is not None
        assert r.error <= r.tolerance


@pytest.mark.usefixtures("best_backend")
@pytest.mark.parametrize("op", ["augment", "augment_resized"])
def test_others_augmentations_are_those_of_fastcnn(op: str) -> None:
    """But one who has one crop for all is right for the first picture."""
    case, here = Case(op, PICTURES), operator_providers()
    names = ["torch.eager", "torch.compile", *(name for name in PEERS if "torchvision" not in name)]
    rows = run(case, *(here[name] for name in names))
    assert [row.failure for row in rows] == [None] * len(rows)
    for name in PEERS:
        assert not here[name].takes_part(replace(case, dtype="bf16"))
        assert not here[name].takes_part(lrn_case())
    everyone = here["torch.eager"].function(OperatorWorkload(case), torch.float32)
    wrong = OperatorProvider("fastcnn.wrong", lambda *_: lambda x: everyone(x).flip(0))
    assert "error" in (run(case, wrong)[0].failure or "")
    first = OperatorProvider(
        "torchvision v2, one crop for all", lambda *_: lambda x: everyone(x)[:1].expand(5, -1, -1, -1)
    )
    assert run(case, first)[0].failure is None


@pytest.mark.usefixtures("best_backend")
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, weight, bias: F.relu(F.conv2d(x, weight, bias, padding=2, groups=2)) * 1.0001,
        lambda x, weight, bias: F.relu(F.conv2d(x, weight, bias.detach() + bias * 0, padding=2, groups=2)),
        lambda x, weight, bias: F.relu(F.conv2d(x, weight.roll(128, 0), bias, padding=2, groups=2)),
    ],
    ids=["output", "bias gradient", "swapped towers"],
)
def test_wrong_convolutions_are_found(wrong: Callable[..., Tensor]) -> None:
    case = Case("conv2d_relu", SMALL, mode="forward+backward")
    failed, good = run(case, provider(wrong), operator_providers()["torch.eager"])
    assert "error" in (failed.failure or "")
    assert (failed.median_ms, good.failure) == (None, None)


@pytest.mark.usefixtures("best_backend")
def test_convolutions_signs_in_doubt_get_no_gradient() -> None:
    case = Case("conv2d_relu", SMALL, mode="forward+backward")
    workload = OperatorWorkload(case)
    dy, (weight, bias) = workload.dy, OPERATORS[case.op].parameters(case, workload.x)
    z = F.conv2d(workload.x, weight, bias, *convolution(case).params.op_args())
    assert (dy == 0).sum() < 0.01 * dy.numel()
    assert not dy[z.abs() < 5e-5 * z.std()].any()


def nan_at_one_place(x: Tensor) -> Tensor:
    y = right(x)
    return torch.where(torch.arange(y.numel()).view(y.shape) == 17, torch.nan, y)


def gradient_of_another(x: Tensor) -> Tensor:
    return right(x).detach() + (x - x.detach())


def raises(x: Tensor) -> Tensor:
    raise RuntimeError("no [such] kernel\nand a second line")


@pytest.mark.usefixtures("best_backend")
@pytest.mark.parametrize(
    ("wrong", "mode", "reason"),
    [
        (lambda x: right(x) * 1.00001, "forward", "error 1.0e-05, allowed is 1.0e-06"),
        (nan_at_one_place, "forward", "error nan"),
        (lambda x: right(x)[..., 1:], "forward", "shape"),
        (gradient_of_another, "backward", "error"),
        (gradient_of_another, "forward+backward", "error"),
        (raises, "forward", "RuntimeError: no [such] kernel"),
    ],
)
def test_wrong_outputs_are_shown_failed_without_a_time(
    wrong: Callable[[Tensor], Tensor], mode: str, reason: str
) -> None:
    rows = run(lrn_case(mode=mode), provider(wrong), provider(right, "fastcnn.right"))
    failed, good = rows
    assert failed.failure is not None
    assert failed.failure.startswith(reason)
    assert (failed.median_ms, failed.n, failed.gb_per_s, failed.vs_eager) == (None, 0, None, None)
    assert good.failure is None
    shown = text_of(*report.tables(rows))
    assert f"fastcnn.other, fp32 channels_last: failed: {reason}" in shown
    assert "second line" not in shown
    assert "fastcnn.other" not in text_of(*report.summaries(rows))


def test_nobody_right_is_still_a_report() -> None:
    rows = run(lrn_case(), provider(raises))
    document = report.report(rows, command="", source="random")
    assert document["header"]["copy_gb_per_s"] is None
    assert "failed" in text_of(*report.tables(rows), *report.summaries(rows))


def test_torch_without_16_bit_kernels_also_runs_in_fp32() -> None:
    def fp32_only(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise NotImplementedError("not in 16 bits")
        return fastcnn.reference.local_response_norm(x, LRN.size, LRN.alpha, LRN.beta, LRN.k)

    reference = operator_providers()["fastcnn.reference"]
    rows = run(lrn_case(dtype="bf16"), reference, provider(fp32_only, "torch.eager"))
    assert [r.provider for r in rows] == ["fastcnn.reference", "torch.eager", "torch.eager (fp32)"]
    ours, failed, wide = rows
    assert failed.failure == "NotImplementedError: not in 16 bits"
    assert ours.median_ms
    assert wide.median_ms
    assert ours.vs_eager == pytest.approx(wide.median_ms / ours.median_ms)
    assert wide.bytes_moved == 2 * (ours.bytes_moved or 0)


def test_forced_backend_also_runs_the_backward() -> None:
    seen = []

    class Recording(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            seen.append(fastcnn.backends.choose("lrn", fastcnn.backends.NAMES, grads[0]))
            return grads[0]

    run(lrn_case(mode="backward"), OperatorProvider("fastcnn.reference", lambda *_: Recording.apply, "reference"))
    assert set(seen) == {"reference"}


@pytest.mark.skipif(not HAS_CPU, reason="only the C++ kernels write into given memory")
@pytest.mark.parametrize("format", ["NCHW", "channels_last"])
@pytest.mark.parametrize(("op", "mode"), [("lrn", "forward"), ("lrn", "backward"), ("relu_lrn_max_pool2d", "forward")])
def test_mapped_memory_is_for_the_cpp_kernels_alone(op: str, mode: str, format: str) -> None:
    case = Case(op, SMALL, "fp32", format, mode, "mapped")
    rows = run(case, *operator_providers().values())
    assert [(r.provider, r.failure) for r in rows] == [("fastcnn.cpu", None)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["backward", "forward+backward"])
def test_compiled_torch_takes_part(mode: str) -> None:
    rows = run(lrn_case(mode=mode), operator_providers()["torch.compile"])
    assert [r.failure for r in rows] == [None]
    assert rows[0].saved_bytes


# Figures


def test_ratios_are_to_torch_in_its_faster_format() -> None:
    nchw, last = lrn_case(format="NCHW"), lrn_case(format="channels_last")
    rows = [
        row("fastcnn.cpu", 2.0, case=nchw),
        row("torch.eager", 30.0, case=nchw),
        row("torch.compile", 9.0, case=nchw),
        row("fastcnn.cpu", 1.0, case=last),
        row("torch.eager", 50.0, case=last),
        row("torch.compile", case=last, failure="error"),
        row("fastcnn.cpu", 3.0, case=lrn_case(mode="backward")),
    ]
    add_ratios(rows)
    assert [r.vs_eager for r in rows] == [15.0, 1.0, 30.0 / 9.0, 30.0, 0.6, None, None]
    assert [r.vs_compile for r in rows] == [4.5, 0.3, 1.0, 9.0, 0.18, None, None]


def test_what_failed_its_check_is_no_rival() -> None:
    names = ("fastcnn", "torch.eager", "torch.eager channels_last", "torch.compile", "torch.compile NCHW")
    case = Case("alexnet", SMALL, "fp32", ANY_FORMAT, "inference")
    rows = [row(name, ms, case=case) for name, ms in zip(names, (2.0, 9.0, 8.0, 5.0, None), strict=True)]
    rows[4].failure = "gradient: error 1.0e+00, allowed is 5.0e-02"
    add_ratios(rows)
    assert [r.vs_eager for r in rows] == [4.0, 8 / 9, 1.0, 1.6, None]
    assert [r.vs_compile for r in rows] == [2.5, 5 / 9, 5 / 8, 1.0, None]


def test_fp32_torch_is_the_baseline_only_where_16_bits_failed() -> None:
    case = lrn_case(dtype="bf16")
    rows = [
        row("fastcnn.cpu", 2.0, case=case),
        row("torch.eager", case=case, failure="NotImplementedError"),
        row("torch.eager (fp32)", 30.0, case=case),
        row("torch.compile", 8.0, case=case),
        row("torch.compile (fp32)", 99.0, case=case),
    ]
    add_ratios(rows)
    assert (rows[0].vs_eager, rows[0].vs_compile) == (15.0, 4.0)


def test_summary_says_what_the_ratios_are_against() -> None:
    case = lrn_case(dtype="bf16")
    quartiles = {"q1_ms": 1.0, "q3_ms": 2.0, "gb_per_s": 12.0, "copy_gb_per_s": 20.0}
    rows = [
        row("fastcnn.cpu", 2.0, case=case, **quartiles),
        row("fastcnn.cpu (fp32)", 3.0, case=case, **quartiles),
        row("fastcnn.reference", 40.0, case=case, **quartiles),
        row("torch.eager", case=case, failure="NotImplementedError"),
        row("torch.eager (fp32)", 30.0, case=case, **quartiles),
        row("torch.compile", 8.0, case=case, **quartiles),
        row("fastcnn.cpu", 1.5, case=lrn_case(dtype="bf16", memory="mapped"), **quartiles),
        row("fastcnn.cpu (fp32)", 2.5, case=lrn_case(dtype="bf16", memory="mapped"), **quartiles),
    ]
    add_ratios(rows)
    line = next(line for line in text_of(*report.summaries(rows)).splitlines() if "bf16" in line)
    assert line.split() == ["bf16", "channels_last", "15.0x", "fp32", "4.0x", "1.50x", "60%"]


RESULTS = Path(__file__).parent.parent / "benchmarks/results"


@pytest.mark.parametrize(
    "file",
    sorted(file for file in RESULTS.glob("amd*/**/*.json") if file.name in ("kernels.json", "models.json")),
    ids=lambda file: str(file.relative_to(RESULTS)),
)
def test_tables_are_readable_at_80_columns(file: Path) -> None:
    rows = report.read_rows(json.loads(file.read_text()))
    tables = (*report.tables(rows), *report.summaries(rows))
    narrow, wide = (text_of(*tables, width=width) for width in (80, 400))
    assert_readable(
        narrow, *{row.provider for row in rows}, *{f"{row.op} {row.mode}, input {row.shape}" for row in rows}
    )
    assert {word for word in narrow.split() if "─" not in word} == {word for word in wide.split() if "─" not in word}


def test_columns_too_many_for_a_line_stand_below_each_other() -> None:
    rows = [row("torch.eager", 2.0, q1_ms=1.0, q3_ms=2.0, gb_per_s=12.3, saved_bytes=4560000)]
    for width, expected in ((80, [["2.00", "50%", "12.3", "4.6"]]), (40, [["2.00", "50%"], ["12.3", "4.6"]])):
        lines = map(str.split, text_of(*report.tables(rows), width=width).splitlines())
        assert [line[1:] for line in lines if line[0:1] == ["torch.eager"]] == expected


def test_bandwidth_is_bytes_over_time(monkeypatch: pytest.MonkeyPatch) -> None:

    def times(timers: dict[Any, Any], budget: Budget) -> dict[Any, list[float]]:
        return {name: [0.001, 0.001, 0.003] if name == "copy" else [0.002, 0.004, 0.001] for name in timers}

    monkeypatch.setattr(measuring, "time_rounds", times)
    (r,) = run(lrn_case(), provider(right))
    size = 4 * torch.Size(SMALL).numel()
    assert (r.median_ms, r.q1_ms, r.q3_ms, r.n) == (2.0, 1.5, 3.0, 3)
    assert r.gb_per_s == pytest.approx(2 * size / 0.002 / 1e9)
    assert r.copy_gb_per_s == pytest.approx(2 * size / 0.001 / 1e9)


def test_saved_bytes_count_each_storage_once() -> None:
    x, weight = torch.randn(10, 10, requires_grad=True), torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(lambda: x.relu() + 1) == 400
    assert saved_bytes(lambda: x.exp() * x.view(100).view(10, 10)) == 800
    assert saved_bytes(lambda: x[0] * 2.0) == 0
    assert saved_bytes(lambda: x[0] * x[1]) == 400  # a view keeps the whole alive
    assert saved_bytes(lambda: x @ weight, [weight]) == 400  # a parameter is there anyway
    layer = nn.Linear(10, 10)
    assert saved_bytes(lambda: layer(x), layer.parameters()) == 400
    assert saved_bytes(lambda: layer(x).square().sum(), layer.parameters()) == 800  # as a loss on a feature does


@pytest.mark.usefixtures("best_backend")
def test_tail_saves_its_input_and_a_byte_per_output() -> None:
    x = torch.randn(2, 6, 9, 11, requires_grad=True)
    saved = saved_bytes(lambda: FF.relu_lrn_max_pool2d(x, lrn=LRN, pool=POOL))
    assert saved == 4 * x.numel() + 2 * 6 * 4 * 5


def test_rounds_call_everybody_once() -> None:
    called: list[str] = []

    def timer(name: str) -> Callable[[], float]:
        return lambda: (called.append(name), 0.5)[1]

    times = time_rounds({"a": timer("a"), "b": timer("b"), "c": timer("c")}, Budget(repeats=4))
    assert times == {"a": [0.5] * 4, "b": [0.5] * 4, "c": [0.5] * 4}
    assert [set(called[i : i + 3]) for i in range(0, 12, 3)] == [{"a", "b", "c"}] * 4


@pytest.mark.usefixtures("best_backend")
def test_formats_are_timed_in_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def times(timers: dict[Any, Any], budget: Budget) -> dict[Any, list[float]]:
        seen.append(len(timers))
        return time_rounds(timers, budget)

    monkeypatch.setattr(measuring, "time_rounds", times)
    eager = operator_providers()["torch.eager"]
    rows = run([lrn_case(format=format) for format in ("NCHW", "channels_last")], provider(right), eager)
    assert seen == [5]  # two providers in two formats, and the copy
    assert [(r.format, r.provider) for r in rows] == [
        (format, name) for format in ("NCHW", "channels_last") for name in ("fastcnn.other", "torch.eager")
    ]
    ours, eager_ms = rows[0], [r.median_ms or 0 for r in rows[1::2]]
    assert ours.vs_eager == pytest.approx(min(eager_ms) / (ours.median_ms or 1))


def test_who_fails_while_timed_ends_the_case() -> None:
    calls = iter(range(100))

    def fails_later(x: Tensor) -> Tensor:
        if next(calls) > 1:
            raise RuntimeError("lost")
        return right(x)

    broken, other = run(lrn_case(), provider(fails_later), provider(right, "fastcnn.right"))
    assert broken.failure == "RuntimeError: lost"
    assert other.failure == "not timed: fastcnn.other failed meanwhile"
    assert (broken.median_ms, other.median_ms) == (None, None)


# Processes of their own


def only_in_the_parent(workload: OperatorWorkload, *_: object) -> Callable[[Tensor], Tensor]:
    if multiprocessing.parent_process() is not None:
        raise RuntimeError(f"process {os.getpid()}")
    return right


def right_for(workload: OperatorWorkload, *_: object) -> Callable[[Tensor], Tensor]:
    return right


def slow_for(workload: OperatorWorkload, *_: object) -> Callable[[Tensor], Tensor]:
    return lambda x: (time.sleep(0.05), right(x))[1]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped")
def test_isolated_providers_have_processes_of_their_own() -> None:
    def processes() -> set[int]:
        return {child.pid or 0 for child in multiprocessing.active_children()}

    before = processes()
    providers = [OperatorProvider("one", only_in_the_parent), OperatorProvider("slow", slow_for)]
    providers.append(OperatorProvider("fastcnn.right", right_for))
    failed, slow, fast = run(lrn_case(mode="forward+backward"), *providers, isolate=True)
    assert (failed.failure or "").startswith("RuntimeError: process ")
    assert str(os.getpid()) not in (failed.failure or "")
    assert (slow.failure, fast.failure) == (None, None)
    assert (slow.median_ms or 0) > 50
    assert 0 < (fast.median_ms or 0) < (slow.median_ms or 0)
    assert fast.saved_bytes
    assert fast.copy_gb_per_s
    assert processes() <= before


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux tells")
def test_isolated_provider_is_stopped_while_it_is_not_its_turn() -> None:
    def is_stopped() -> bool:
        return Path(f"/proc/{one.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    provider = OperatorProvider("fastcnn.right", right_for)
    make = partial(OperatorWorkload, source="random")
    prepare = partial(measuring._prepared, make, lrn_case(), provider, "fp32", "cpu", measuring.reason)
    with isolate.Isolated(prepare) as one:
        assert one.row.failure is None
        for _ in range(2):
            assert one.seconds() > 0
            deadline = time.monotonic() + 10
            while not is_stopped():
                assert time.monotonic() < deadline
        one.process.kill()
        one.process.join()
        with pytest.raises(OSError, match=r"No such process"):
            one.seconds()


def test_budget_goes_on_until_time_and_rounds_suffice() -> None:
    budget = Budget(seconds=1.0, at_least=5)
    assert not budget.enough(5, 0.9)
    assert not budget.enough(4, 2.0)
    assert budget.enough(5, 1.0)
    assert Budget(repeats=3).enough(3, 0.0)
    assert not Budget(repeats=3).enough(2, 99.0)


# Report


def test_report_is_json_with_one_schema(tmp_path: Path) -> None:
    rows = run(lrn_case(), provider(right), provider(raises, "fastcnn.broken"))
    report.write_json(tmp_path / "new" / "kernels.json", report.report(rows, command="fastcnn bench", source="random"))
    document = json.loads((tmp_path / "new" / "kernels.json").read_text())
    schema = [field.name for field in fields(Row)]
    assert [list(r) for r in document["rows"]] == [schema, schema]
    assert document["rows"][0]["shape"] == list(SMALL)
    assert document["rows"][1]["median_ms"] is None
    header = document["header"]
    assert (header["command"], header["input"], header["threads"]) == (
        "fastcnn bench",
        "random",
        torch.get_num_threads(),
    )
    assert header["torch"] == torch.__version__
    assert header["copy_gb_per_s"] == document["rows"][0]["copy_gb_per_s"]


def test_plots_show_what_has_a_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fastcnn.bench.plots import write_plots

    header = {**report.report([], command="", source="random")["header"], "copy_gb_per_s": 20.0}
    timed = [row("fastcnn.cpu", 1.0, gb_per_s=12.0), row("torch.eager", 9.0, gb_per_s=1.0)]
    assert write_plots(tmp_path, {"header": header}, timed) == [tmp_path / "kernels_roofline.png"]
    add_ratios(timed)
    written = write_plots(tmp_path, {"header": header}, timed)
    assert [path.name for path in written] == ["kernels_speedup.png", "kernels_roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert write_plots(tmp_path, {"header": header}, [row("fastcnn.cpu", failure="wrong")]) == []


# Photographs


def test_photographs_are_four_and_their_sources_are_named() -> None:
    pytest.importorskip("PIL")
    crops = fastcnn.data.photographs(64)
    assert (crops.shape, crops.dtype) == ((4, 3, 64, 64), torch.uint8)
    assert len({crop.float().mean().item() for crop in crops}) == 4
    folder = Path(fastcnn.data.__file__).parent / "photographs"
    sources = (folder / "SOURCES.md").read_text()
    assert all(f"`{path.name}`" in sources for path in folder.glob("*.jpg"))


def test_photographs_refuse_an_empty_crop() -> None:
    with pytest.raises(ValueError, match="size=0"):
        fastcnn.data.photographs(0)
