"""Files of torch, TorchScript and safetensors: the dictionaries of tensors in them. Nothing of a file is run."""

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

DEEPEST = 8  # dictionary in a dictionary
SIGNATURES = {  # of what is often taken for a file of weights
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` fetches the file itself",
    b"\x89hdf": "a file of HDF5, such as Keras writes",
}
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
    """What a file is called in messages: by its suffix, TorchScript by its content."""
    format = {".onnx": "ONNX", ".safetensors": "safetensors", ".json": "shards"}.get(path.suffix.lower(), "torch")
    return "TorchScript" if format == "torch" and is_torchscript(path) else format


def read_entries(path: Path) -> list[Entry]:
    """Every dictionary of a file that holds tensors, the outermost first.

    Raises:
        WeightsError: the file holds objects that torch does not make without being told to.
        Exception: of any other type, for a broken file.
    """
    with path.open("rb") as file:
        beginning = file.read(64).lstrip().lower()
    for signature, what in SIGNATURES.items():
        if beginning.startswith(signature):
            raise ValueError(f"it is {what}")
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
