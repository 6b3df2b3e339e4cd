"""The parameters and buffers of a TorchScript archive, of whose code nothing is run, or even read."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
MOST_MODULES, DEEPEST = 10_000, 32


class Module:
    """Stands for an object of any class of the archive: its attributes, and none of its methods."""

    def __new__(cls, *args: Any) -> "Module":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


def is_torchscript(path: Path) -> bool:
    """Whether it is an archive as :func:`torch.jit.save` writes it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return _folder(archive) is not None


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Tensors by the dotted names of their attributes: those of the ``state_dict`` of the module that was saved.

    Raises:
        ValueError: the archive is of another kind, broken, or holds other objects than modules, tensors and numbers.
    """
    with zipfile.ZipFile(path) as archive:
        module = Unpickler(archive).load()
    found = _tensors(module)
    if not found:
        raise ValueError("the TorchScript archive has no parameters; freezing makes them constants of its code")
    return found


class Unpickler(pickle.Unpickler):
    """An unpickler that makes tensors, containers and :class:`Module` only, whatever the file asks for."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive, self.folder = archive, _folder(archive)
        super().__init__(BytesIO(self.record("data.pkl")))
        names = archive.namelist()
        if f"{self.folder}/byteorder" in names and self.record("byteorder") != b"little":
            raise ValueError("the TorchScript archive is of a big-endian machine")
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Callable[..., Any] | torch.dtype:
        if module.partition(".")[0] == "__torch__":
            return Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        # functions are new ones each time: a file can set attributes of what it gets
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if module == "torch.jit._pickle":  # lists and dictionaries of one type
            return lambda value, *_: value
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise ValueError(f"the TorchScript archive holds {module}.{name}, which is neither a tensor nor a number")

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, name, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(name, str):
            raise ValueError("the TorchScript archive holds a storage of another kind")
        if name not in self.storages:
            data = bytearray(self.record(f"data/{name}"))
            self.storages[name] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        storage = self.storages[name]
        if len(storage) != numel * dtype.itemsize:
            raise ValueError(f"storage {name} of the TorchScript archive has {len(storage)} bytes, not {numel} {dtype}")
        return storage.view(dtype)

    def record(self, name: str) -> bytes:
        """Of the archive. What is read of it is never compressed; what is could be of any size."""
        info = self.archive.getinfo(f"{self.folder}/{name}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} of the TorchScript archive is compressed")
        return self.archive.read(info)


def _folder(archive: zipfile.ZipFile) -> str | None:
    """What all records are in."""
    places = (name.partition("/") for name in archive.namelist())
    return next((folder for folder, _, name in places if name == "constants.pkl"), None)


def _tensors(module: Any) -> dict[str, Tensor]:
    found, modules = {}, 0
    pending: list[tuple[tuple[str, ...], Any]] = [((), module)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, Tensor):
            found[".".join(path)] = value
        elif isinstance(value, Module) and isinstance(getattr(value, "attributes", None), dict):
            modules += 1
            if modules > MOST_MODULES or len(path) > DEEPEST:  # of a module that is part of itself
                raise ValueError("the TorchScript archive has modules without end")
            pending += [((*path, str(key)), attribute) for key, attribute in reversed(value.attributes.items())]
    return found
