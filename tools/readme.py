"""``make readme``: the README's tables of figures, from the files in ``benchmarks/results``.

The figures stand between ``<!-- figures: NAME -->`` and ``<!-- end of figures -->``; what is there is replaced.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastcnn.bench.data import DataRow, who
from fastcnn.bench.environment import sources_digest
from fastcnn.bench.report import ratio, read_rows
from fastcnn.bench.rows import Row, fastest
from fastcnn.bench.training import Parity, TrainingRow

_R = TypeVar("_R")

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks/results/intel-xeon-2-threads"
OPERATORS = {
    "relu_lrn_max_pool2d": "ReLU + LRN + pool",
    "lrn": "LRN",
    "max_pool2d": "max-pool 3x3/2",
    "conv2d_relu": "AlexNet's conv2 + ReLU",
}
NETWORKS = {
    "alexnet": "AlexNet",
    "vgg16": "VGG-16",
    "inception_v1": "InceptionV1",
    "vgg16-features": "VGG-16's features, frozen",
}
RUNTIMES = {
    "fastcnn": "fastcnn",
    "torch.eager": "eager",
    "torch.compile": "torch.compile",
    "onnxruntime": "onnxruntime",
    "openvino": "OpenVINO",
}


def kernels(rows: Sequence[Row]) -> list[str]:
    """How many times faster than PyTorch each operator is, all in their faster memory format."""
    lines = ["| | fastcnn | times faster than eager | than torch.compile |", "|---|---|---|---|"]
    for name, title in OPERATORS.items():
        fresh = [row for row in rows if (row.op, row.memory) == (name, "fresh")]
        for (mode, dtype), members in _grouped(fresh, lambda row: (row.mode, row.dtype)):
            ours = fastest(members, "fastcnn")
            assert ours is not None
            cells = [f"{title}, {mode.replace('+', ' + ')}, {dtype}", f"{ours.median_ms:.2f} ms"]
            for rival in (fastest(members, "torch.eager"), fastest(members, "torch.compile")):
                note = " in fp32" if rival and rival.provider.endswith("(fp32)") else ""
                cells.append(f"{ratio((rival.median_ms or 0) / (ours.median_ms or 1))}{note}" if rival else "")
            lines.append(_line(cells))
    return lines


AUGMENTATIONS = {
    "augment": "crops of 227 from 128 pictures of 256x256",
    "augment_resized": "crops of 224 from the same, resized to 256 to 512",
}
RIVALS = "torch.eager", "torch.compile", "Pillow and numpy", "torchvision v2", "torchvision v2, one crop for all"


def augmentations(rows: Sequence[Row]) -> list[str]:
    """Of the augmentation in C++ the time and the rate by a copy's, then how many times faster it is than others."""
    lines = [_line(["", "fastcnn", "of a copy", *RIVALS]), "|---" * (len(RIVALS) + 3) + "|"]
    for (op, dtype), members in _grouped(rows, lambda row: (row.op, row.dtype)):
        rivals = [fastest([row for row in members if row.provider == name], name) for name in RIVALS]
        for row in members:
            if row.provider == "fastcnn.cpu" and row.median_ms and row.gb_per_s and row.copy_gb_per_s:
                ratios = [ratio((rival.median_ms or 0) / row.median_ms) if rival else "" for rival in rivals]
                what = f"{AUGMENTATIONS[op]}, {dtype} {row.format}"
                rate = f"{row.gb_per_s / row.copy_gb_per_s:.2f}"
                lines.append(_line([what, f"{row.median_ms:.2f} ms", rate, *ratios]))
    return lines


def networks(rows: Sequence[Row]) -> list[str]:
    """Images per second, each in its faster memory format, the fastest in bold; then where that is not fastcnn."""
    lines = [_line(["images per second", *RUNTIMES.values()]), "|---" * (len(RUNTIMES) + 1) + "|"]
    slower = []
    for (op, mode, batch, dtype), members in _grouped(rows, lambda row: (row.op, row.mode, row.shape[0], row.dtype)):
        found = {name: fastest(members, name) for name in RUNTIMES}
        rates = {name: row.images_per_s or 0.0 for name, row in found.items() if row is not None}
        best = max(rates, key=lambda name: rates[name])
        shown = [f"**{_rate(rates[name])}**" if name == best else _rate(rates.get(name)) for name in RUNTIMES]
        what = f"{NETWORKS[op]}, {mode} of {batch}{'' if dtype == 'fp32' else f', {dtype}'}"
        lines.append(_line([what, *shown]))
        if best != "fastcnn":
            slower.append(f"{what} ({rates['fastcnn'] / rates[best]:.2f} of {RUNTIMES[best]})")
    saved = (
        f"{NETWORKS[row.op]} {row.saved_vs_eager:.0%}"
        for row in rows
        if row.provider == "fastcnn" and row.saved_vs_eager
    )
    kept = f"Bytes saved for backward, of eager's: {', '.join(saved)}."
    told = f"fastcnn is not the fastest at: {'; '.join(slower)}." if slower else "fastcnn is the fastest everywhere."
    return [*lines, "", told, kept]


def data(rows: Sequence[DataRow]) -> list[str]:
    """Pictures a second of each source, and what part of Pillow's decoding alone the loader reaches."""
    providers = list(dict.fromkeys(row.provider for row in rows))
    lines = [_line(["pictures per second", *providers, "fastcnn of Pillow's decoding"])]
    lines.append("|---" * (len(providers) + 2) + "|")
    for (source, processes), members in _grouped(rows, lambda row: (row.source, row.processes)):
        found = {row.provider: row for row in members}
        rates = [f"{found[name].pictures_per_s:,.0f}" if name in found else "" for name in providers]
        share = found["fastcnn"].of_bare
        lines.append(_line([f"{source}; {who(processes)}", *rates, "" if share is None else f"{share:.2f}"]))
    return lines


def read_data_rows(document: dict[str, Any]) -> list[DataRow]:
    """The rows of a file of ``fastcnn bench data`` that have figures."""
    return [row for row in (DataRow(**fields) for fields in document["rows"]) if row.failure is None]


def training(runs: Sequence[tuple[str, Parity, list[TrainingRow]]]) -> list[str]:
    """Pictures a second of each network and provider, and by how much fastcnn is faster; what was checked before."""
    names = list(dict.fromkeys(row.provider for _, _, rows in runs for row in rows))
    lines = [_line(["pictures per second, from JPEG files", *names, "times faster than the best other"])]
    lines.append("|---" * (len(names) + 2) + "|")
    for title, _, rows in runs:
        rates = {row.provider: _rate(row.pictures_per_s) for row in rows}
        best = max((row for row in rows if row.provider != "fastcnn"), key=lambda row: row.pictures_per_s)
        lines.append(_line([title, *(rates.get(name, "") for name in names), ratio(best.speedup)]))
    worst = max(parity.loss for _, parity, _ in runs), max(parity.ratio for _, parity, _ in runs)
    told = (
        f"Before that, the losses of {runs[0][1].steps} steps in float64 differed from those of torch's layers by "
        f"{worst[0]:.0e} at most, and gradients in float32 had at most {worst[1]:.2f} times the error of torch's."
    )
    return [*lines, "", told]


def read_training(document: dict[str, Any]) -> list[tuple[str, Parity, list[TrainingRow]]]:
    """What is in a file of ``fastcnn bench training``."""
    rows = [TrainingRow(**fields) for fields in document["rows"]]
    return [(document["job"], Parity(**document["parity"]), rows)]


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _grouped(rows: Iterable[_R], key: Callable[[_R], tuple[Any, ...]]) -> list[tuple[tuple[Any, ...], list[_R]]]:
    groups: dict[tuple[Any, ...], list[_R]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


# The files of each table; what they have in common is said once.
TABLES: dict[str, tuple[Callable[..., list[str]], Callable[..., list[Any]], list[str]]] = {
    "kernels": (kernels, read_rows, ["kernels.json"]),
    "models": (networks, read_rows, ["inference/models.json", "training/models.json"]),
    "training": (training, read_training, ["training.json"]),
    "data": (data, read_data_rows, ["data.json"]),
    "augment": (augmentations, read_rows, ["augment/kernels.json"]),
}


def figures(name: str, documents: Sequence[dict[str, Any]], digest: str | None) -> str:
    """A table, under a line that says how it was measured; after it, whether that was of these sources."""
    table, read, _ = TABLES[name]
    headers = [document["header"] for document in documents]
    commands = " and ".join(f"`{header['command']}`" for header in headers)
    first = headers[0]
    capability = {"avx512": "AVX-512", "avx2": "AVX2"}.get(first["cpu_capability"], first["cpu_capability"])
    machine = (
        f"{first['threads']} threads of an {first['cpu']} ({capability}), torch {first['torch'].partition('+')[0]}"
    )
    rows = [row for document in documents for row in read(document)]
    changed = any(header.get("sources") is None or header["sources"] != digest for header in headers)
    stale = ["", "The sources have changed since these figures were measured."] if changed else []
    return "\n".join([f"{commands}, {machine}, {first['date'][:10]}:", "", *table(rows), *stale])


def documents(name: str) -> list[dict[str, Any]]:
    """The files that a table is made of."""
    return [json.loads((RESULTS / file).read_text()) for file in TABLES[name][2]]


def rewritten(readme: str, digest: str | None) -> str:
    """The README with the figures that the results have."""

    def replaced(found: re.Match[str]) -> str:
        return f"{found[1]}\n{figures(found[2], documents(found[2]), digest)}\n{found[3]}"

    marks = r"(<!-- figures: (\w+) -->)\n.*?(<!-- end of figures -->)"
    return re.sub(marks, replaced, readme, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(), sources_digest()))
