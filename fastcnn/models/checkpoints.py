"""Checkpoints as people have them: the weights among what else a file holds, under whatever prefix of their keys."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import WeightsError
from .torchscript import is_torchscript, read_torchscript

WRAPPERS = frozenset(  # of modules: DataParallel and EMA; torch.compile; Lightning and others; FSDP; checkpointing
    ("module", "_orig_mod", "model", "net", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)")
DEEPEST = 8  # dictionaries, and modules of a prefix
NUMPY_REMEDY = """Numbers of numpy do nothing; this allows them, and only them:
    import numpy, torch
    scalar = numpy.float64(0).__reduce__()[0]
    dtypes = {type(numpy.dtype(letter)) for letter in "?bhilqBHILQefd"}
    allowed = [scalar, (scalar, "numpy.core.multiarray.scalar"), numpy.dtype, *dtypes]
    with torch.serialization.safe_globals(allowed):
        ...  # load_weights as before"""
TRUSTED_REMEDY = """If you trust the file, save its weights alone, where what it needs can be imported:
    content = torch.load(FILE, weights_only=False)  # runs what the file says
    torch.save(content["state_dict"], NEW)  # of a whole module: content.state_dict()"""


@dataclass
class Entry:
    """A dictionary of a checkpoint, or those of its keys that begin with one prefix.

    Attributes:
        name: the keys that lead to it, joined with dots; empty for the file itself.
        tensors: by key, without the prefix.
        others: what else it holds: types by key.
    """

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


# -- reading ----------------------------------------------------------------------------------------------------------


def format_of(path: Path) -> str:
    """What a file is called in messages: by its suffix, TorchScript by its content."""
    format = {".onnx": "ONNX", ".safetensors": "safetensors", ".json": "shards"}.get(path.suffix.lower(), "torch")
    return "TorchScript" if format == "torch" and is_torchscript(path) else format


def read_entries(path: Path) -> list[Entry]:
    """Every dictionary of a file that holds tensors, the outermost first.

    Raises:
        WeightsError: the file holds objects that torch does not make without being told to.
        Exception: of any other type, for a broken file.
    """
    content = READERS[format_of(path)](path)
    entries = list(_entries(content, "", set()))
    if not any(entry.tensors for entry in entries):
        kind = type(content).__name__
        raise ValueError(f"it holds a {kind}, not a state_dict" if not entries else "it holds no tensors")
    return [entry for entry in entries if entry.tensors]


def _entries(content: Any, name: str, seen: set[int]) -> Iterator[Entry]:
    if not isinstance(content, Mapping) or id(content) in seen or name.count(".") >= DEEPEST:
        return
    seen.add(id(content))
    entry = Entry(name)
    for key, value in content.items():
        if isinstance(value, Tensor):
            entry.tensors[str(key)] = value
        else:
            entry.others[str(key)] = type(value).__name__
    yield entry
    for key, value in content.items():
        yield from _entries(value, f"{name}.{key}" if name else str(key), seen)


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # also of torch, for objects it refuses
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
        names = _refused_objects(path) or re.findall(r"GLOBAL (\S+)", reason)
        if not names:
            raise ValueError(reason.partition("\n")[0]) from None
    numbers = all(re.fullmatch(r"numpy\.(dtype|_?core\.multiarray\.scalar)", name) for name in names)
    raise WeightsError(
        f"load_weights(): {path} cannot be read as a file of torch weights: beside tensors it holds objects that could "
        f"do anything when they are created: {', '.join(names)}. {NUMPY_REMEDY if numbers else TRUSTED_REMEDY}"
    )


def _refused_objects(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip file, or of another protocol
        return []


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("reading safetensors needs the package of this name: pip install fastcnn[models]") from None
    return load_file(path)


def _read_shards(path: Path) -> dict[str, Tensor]:
    """The files that an index names, which must lie beside it."""
    places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    files = sorted({str(file) for file in places.values()})
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"the index names {file!r}, which is not a file beside it")
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        raise ValueError(f"shards are missing: {', '.join(missing)}")
    state: dict[str, Tensor] = {}
    for file in files:
        read = _read_safetensors if file.endswith(".safetensors") else _read_torch
        for key, tensor in read(path.parent / file).items():
            if places.get(key) != file:
                raise ValueError(f"{key!r} is in {file}, but the index says {places.get(key)}")
            state[key] = tensor
    absent = [key for key in places if key not in state]
    if absent:
        raise ValueError(f"tensors are missing in their shards: {', '.join(absent)}")
    return state


READERS: dict[str, Callable[[Path], Any]] = {
    "torch": _read_torch,
    "TorchScript": read_torchscript,
    "safetensors": _read_safetensors,
    "shards": _read_shards,
}

# -- choosing ---------------------------------------------------------------------------------------------------------


@dataclass
class Choice:
    """The entry of a file that holds the weights of a model, and the key of it for each key of the model."""

    entry: Entry
    keys: dict[str, str]
    beside: int = 0  # tensors of the same dictionary that have another prefix
    alternatives: list[str] = field(default_factory=list)  # entries that fit too

    def state(self) -> dict[str, Tensor]:
        return {key: self.entry.tensors[theirs] for key, theirs in self.keys.items()}

    def left_over(self) -> dict[str, Tensor]:
        used = set(self.keys.values())
        return {key: tensor for key, tensor in self.entry.tensors.items() if key not in used}


def choose(
    entries: list[Entry], own: Mapping[str, Tensor], chosen: str | None, fits: Callable[[Choice], bool]
) -> Choice:
    """The entry that fits a model; if none does, the one of which most tensors do.

    Args:
        entries: of the file.
        own: the model's tensors.
        chosen: the name of the entry, or how its name begins. If None, all dictionaries of the file, and those of
            their keys that begin with the names of wrappers. Of several that fit, averages over the training (EMA) are
            not taken unless they are chosen.
        fits: whether nothing is missing, left over or of another shape.

    Raises:
        ValueError: no entry has the chosen name, or several fit.
    """
    parts = [(automatic, part, whole) for whole in entries for automatic, part in _parts(whole)]
    if chosen is None:
        allowed = [(part, whole) for automatic, part, whole in parts if automatic]
    else:
        allowed = [(p, whole) for _, p, whole in parts if p.name == chosen or p.name.startswith(f"{chosen}.")]
    if not allowed:
        names = ", ".join(repr(entry.name) for entry in entries)
        raise ValueError(f"it has no entry {chosen!r}, but {names}")

    choices = [
        Choice(part, matched(own, part.tensors), len(whole.tensors) - len(part.tensors)) for part, whole in allowed
    ]
    fitting = {frozenset(map(id, c.entry.tensors.values())): c for c in reversed(choices) if fits(c)}
    if not fitting:
        best = max(choices, key=lambda c: (_alike(own, c), -len(c.entry.tensors)))
        best.alternatives = [p.name for _, p, _ in parts if fits(Choice(p, matched(own, p.tensors)))]
        return best
    found = list(reversed(fitting.values()))
    plain = [c for c in found if not AVERAGED.search(c.entry.name.removeprefix(chosen or ""))] or found
    if len(plain) > 1:
        raise ValueError(f"several entries fit: {', '.join(repr(c.entry.name) for c in plain)}; say which, as entry=")
    plain[0].alternatives = [c.entry.name for c in found if c is not plain[0]]
    return plain[0]


def _parts(entry: Entry) -> Iterator[tuple[bool, Entry]]:
    """An entry, then its keys of each prefix; whether it is one of wrappers."""
    yield True, entry
    parts: dict[str, Entry] = {}
    for key, tensor in entry.tensors.items():
        names = key.split(".", DEEPEST)
        for depth in range(1, len(names)):
            prefix = ".".join(names[:depth])
            part = parts.setdefault(prefix, Entry(f"{entry.name}.{prefix}" if entry.name else prefix))
            part.tensors[key.removeprefix(f"{prefix}.")] = tensor
    yield from ((WRAPPERS.issuperset(prefix.split(".")), part) for prefix, part in parts.items())


def matched(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The key of the file for each key of the model that has one: the same but for the names of wrappers."""
    same = {key: key for key in own if key in tensors}
    ours, theirs = (_bare(key for key in keys if key not in same) for keys in (own, tensors))
    return same | {ours[bare]: theirs[bare] for bare in ours if bare in theirs}


def _bare(keys: Iterator[str]) -> dict[str, str]:
    """Keys by what they are without wrappers; none of those that are the same without."""
    bare: dict[str, list[str]] = {}
    for key in keys:
        bare.setdefault(".".join(name for name in key.split(".") if name not in WRAPPERS), []).append(key)
    return {name: keys[0] for name, keys in bare.items() if len(keys) == 1}


def _alike(own: Mapping[str, Tensor], choice: Choice) -> int:
    return sum(own[key].shape == tensor.shape for key, tensor in choice.state().items())
