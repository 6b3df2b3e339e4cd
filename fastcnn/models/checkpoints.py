"""Files of torch, TorchScript and safetensors: the dictionaries of tensors in them. No code of a file is executed."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import WeightsError
from .torchscript import is_torchscript, read_torchscript

DEEPEST = 8  # levels of dictionaries and lists
SIGNATURES = {  # of what is often taken for a file of weights
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"version https://git-lfs": "a Git LFS pointer; `git lfs pull` fetches the file itself",
    b"\x89hdf": "an HDF5 file (e.g. from Keras)",
    b"\x93numpy": "a NumPy array",
    b"\x1f\x8b": "compressed by gzip; decompress it first",
}
NUMPY_REMEDY = """NumPy scalars are harmless; to allow just these:
    import numpy, torch
    scalar = numpy.float64(0).__reduce__()[0]
    dtypes = {type(numpy.dtype(code)) for code in numpy.typecodes["All"] if code != "O"}
    allowed = [scalar, (scalar, "numpy.core.multiarray.scalar"), numpy.dtype, *dtypes]
    with torch.serialization.safe_globals(allowed):
        ...  # load_weights as before"""
TRUSTED_REMEDY = """If you trust the file, re-save only the weights, in an environment that can import its classes:
    content = torch.load(FILE, weights_only=False)  # executes code from the file
    torch.save(content["state_dict"], NEW)  # of a whole module: content.state_dict()"""


@dataclass(eq=False)
class Entry:
    """One of the dictionaries in a file.

    Attributes:
        name: the keys that lead to it, joined with dots; empty for the file itself.
        tensors: by key.
        others: the types of what else it holds, by key.
    """

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


def format_of(path: Path) -> str:
    """What to read a file as: by its suffix, or as TorchScript or safetensors by its content."""
    format = {".onnx": "ONNX", ".safetensors": "safetensors", ".json": "shards"}.get(path.suffix.lower(), "torch")
    if format == "torch" and is_torchscript(path):
        return "TorchScript"
    if format == "torch" and _is_safetensors(path):
        return "safetensors"
    return format


def read_entries(path: Path, format: str) -> list[Entry]:
    """Every dictionary of a file, of a format of :func:`format_of`, that holds tensors; the outermost first.

    Raises:
        WeightsError: the file holds objects that torch does not create unless they are allowed.
        Exception: of any other type, for a broken file.
    """
    with path.open("rb") as file:
        beginning = file.read(64).lstrip().lower()
    for signature, what in SIGNATURES.items():
        if beginning.startswith(signature):
            raise ValueError(f"it is {what}")
    content = READERS[format](path)
    if not isinstance(content, Mapping | list | tuple):
        raise ValueError(f"it holds a {type(content).__name__}, not a state_dict")
    entries = [entry for entry in _entries(content, "", 0, set()) if entry.tensors]
    if not entries:
        raise ValueError(f"no dictionary in it holds tensors, down to a depth of {DEEPEST}")
    return entries


def _entries(content: Any, name: str, depth: int, seen: set[int]) -> Iterator[Entry]:
    """Dictionaries, and those in lists; each once, as there may be many ways to it."""
    if not isinstance(content, Mapping | list | tuple) or id(content) in seen or depth >= DEEPEST:
        return
    seen.add(id(content))
    items = list(content.items() if isinstance(content, Mapping) else enumerate(content))
    entry = Entry(name)
    for key, value in items:
        if isinstance(value, Tensor) and isinstance(key, str) and not value.is_nested:
            entry.tensors[key] = value
        else:
            entry.others[str(key)] = type(value).__name__
    yield entry
    for key, value in items:
        yield from _entries(value, f"{name}.{key}" if name else str(key), depth + 1, seen)


def _read_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
                raise ValueError("its records are compressed, which torch does not do")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # also of torch, for objects it refuses
        reason = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
        names = _refused_objects(path) or re.findall(r"GLOBAL (\S+)", reason)
    failed = f"load_weights(): {path} cannot be read as a PyTorch checkpoint"
    if names:
        numbers = all(re.fullmatch(r"numpy\.(dtype|_?core\.multiarray\.scalar)", name) for name in names)
        objects = f"besides tensors it holds objects whose unpickling can execute arbitrary code: {', '.join(names)}"
        raise WeightsError(f"{failed}: {objects}. {NUMPY_REMEDY if numbers else TRUSTED_REMEDY}")
    if reason.startswith("Unsupported operand") and (zipfile.is_zipfile(path) or path.read_bytes()[:1] == b"\x80"):
        raise WeightsError(f"{failed}: it was saved with a pickle protocol other than torch's 2. {TRUSTED_REMEDY}")
    raise ValueError(reason.partition("\n")[0])


def _refused_objects(path: Path) -> list[str]:
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # not a zip file, or of another protocol
        return []


def _is_safetensors(path: Path) -> bool:
    """By its beginning: the length of the header, then JSON."""
    try:
        with path.open("rb") as file:
            beginning = file.read(9)
    except OSError:  # which reading will report
        return False
    return beginning[8:] == b"{" and int.from_bytes(beginning[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("reading safetensors needs the package of this name: pip install fastcnn[models]") from None
    return load_file(path)


def _read_shards(path: Path) -> dict[str, Tensor]:
    """The files that an index names, which must lie beside it."""
    index = json.loads(path.read_text(encoding="utf-8"))
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError("it is no index of shards: it has no weight_map")
    files = sorted(set(places.values()))
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"the index names {file!r}, which is not a file beside it")
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        raise ValueError(f"shards are missing: {', '.join(missing)}")
    state: dict[str, Tensor] = {}
    for file in files:
        shard = (_read_safetensors if file.endswith(".safetensors") else _read_torch)(path.parent / file)
        if not isinstance(shard, Mapping):
            raise ValueError(f"{file} holds a {type(shard).__name__}, not a state_dict")
        for key, tensor in shard.items():
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
