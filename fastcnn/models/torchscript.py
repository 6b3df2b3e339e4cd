"""The tensors of a TorchScript archive, of whose code nothing is executed, or even read."""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
MOST_MODULES, DEEPEST = 10_000, 32


class Stored(NamedTuple):
    """A tensor to be: that of a storage, which has so many elements, with the arguments of ``as_strided``."""

    storage: str
    dtype: torch.dtype
    numel: int
    size: Any = ()
    stride: Any = ()
    offset: int = 0


class Module:
    """Stands for an object of any class of the archive: its attributes, and none of its methods."""

    def __new__(cls, *args: Any) -> "Module":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


def is_torchscript(path: Path) -> bool:
    """Whether it is an archive as :func:`torch.jit.save` writes it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _folder(archive) is not None
    except Exception:  # whatever it raises for what is no zip file, or a broken one
        return False


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Tensors by the dotted names of their attributes: parameters, buffers, and other attributes that are tensors.

    Raises:
        ValueError: the archive is of another kind, or holds objects that are not supported.
        Exception: of any other type, for a broken one.
    """
    with zipfile.ZipFile(path) as archive:
        unpickler = Unpickler(archive)
        found = {name: unpickler.tensor(stored) for name, stored in _attributes(unpickler.load()).items()}
    if not found:
        raise ValueError("it has no parameters: freezing makes them constants of its code")
    return found


class Unpickler(pickle._Unpickler):
    """An unpickler that creates containers, :class:`Stored` and :class:`Module` only, whatever the file asks for.

    It is the one in Python: that in C allocates as much memory as the largest index in a file says.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive, self.folder = archive, _folder(archive)
        super().__init__(BytesIO(self.record("data.pkl")))
        names = archive.namelist()
        if f"{self.folder}/byteorder" in names and self.record("byteorder") != b"little":
            raise ValueError("it was saved on a big-endian machine")
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Callable[..., Any] | torch.dtype:
        if module.partition(".")[0] == "__torch__":
            return Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        # functions are new ones each time: a file can set attributes of what it gets
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda stored, offset, size, stride, *_: stored._replace(offset=offset, size=size, stride=stride)
        if module == "torch.jit._pickle":  # lists and dictionaries of one type
            return lambda value, *_: value
        if (module, name) in (("torch", "device"), ("builtins", "complex")):
            return lambda *_: None
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise ValueError(f"it holds {module}.{name}, which is not supported")

    def persistent_load(self, pid: Any) -> Stored:
        kind, dtype, name, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(name, str):
            raise ValueError("it holds an unsupported storage")
        return Stored(name, dtype, numel)

    def tensor(self, stored: Stored) -> Tensor:
        name, dtype, numel, size, stride, offset = stored
        if name not in self.storages:
            data = bytearray(self.record(f"data/{name}"))
            empty = torch.empty(0, dtype=torch.uint8, device="cpu")
            self.storages[name] = torch.frombuffer(data, dtype=torch.uint8) if data else empty
        storage = self.storages[name]
        if len(storage) != numel * dtype.itemsize:
            raise ValueError(f"its storage {name} has {len(storage)} bytes; expected {numel} x {dtype}")
        return storage.view(dtype).as_strided(size, stride, offset)

    def record(self, name: str) -> bytes:
        """A record that is stored as it is, as all are that are read; a compressed one could be of any size."""
        info = self.archive.getinfo(f"{self.folder}/{name}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its record {name} is compressed")
        return self.archive.read(info)


def _folder(archive: zipfile.ZipFile) -> str | None:
    """What all records are in."""
    places = (name.partition("/") for name in archive.namelist())
    return next((folder for folder, _, name in places if name == "constants.pkl"), None)


def _attributes(module: Any) -> dict[str, Stored]:
    """Of a module and those in it."""
    found, modules = {}, 0
    pending: list[tuple[tuple[str, ...], Any]] = [((), module)]
    while pending:
        path, value = pending.pop()
        if isinstance(value, Stored):
            found[".".join(path)] = value
        elif isinstance(value, Module) and isinstance(getattr(value, "attributes", None), dict):
            modules += 1
            if modules > MOST_MODULES or len(path) > DEEPEST:
                raise ValueError("its modules are cyclic or too many")
            pending += [((*path, str(key)), attribute) for key, attribute in reversed(value.attributes.items())]
    return found
