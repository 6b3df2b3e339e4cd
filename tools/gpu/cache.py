"""Triton's cache on disk as something that can be taken to another machine."""

import json
import os
import tarfile
from collections import Counter
from pathlib import Path


def kernels(cache: Path) -> dict[Path, str]:
    """Of each kernel in the cache its file of machine code and its name."""
    return {file: file.stem for file in cache.glob("*/*.cubin")}


def counted(names: list[str]) -> dict[str, int]:
    """How many kernels have each name; those of torch.compile, which it numbers, under one."""
    return dict(Counter("torch.compile's" if name.startswith("triton_") else name for name in names))


def pack(cache: Path, archive: Path) -> None:
    """What is needed to launch the kernels of the cache, without the stages of their compilation."""
    unfinished = archive.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w:xz", preset=1) as tar:
        for file in sorted(cache.glob("*/*")):
            if file.suffix in (".cubin", ".json", ".so"):
                tar.add(file, file.relative_to(cache))
    unfinished.replace(archive)


def unpack(archive: Path, cache: Path) -> None:
    """Into a folder that may be anywhere, though Triton writes absolute paths into its cache."""
    with tarfile.open(archive) as tar:
        tar.extractall(cache, filter="data")
    for group in cache.glob("*/__grp__*.json"):
        children = json.loads(group.read_text())["child_paths"]
        here = {name: str(group.parent / name) for name in children if (group.parent / name).exists()}
        unfinished = group.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({"child_paths": here}))
        unfinished.replace(group)
