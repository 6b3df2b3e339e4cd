"""Checkpoints: folders ``step-N`` that are there in full or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.files import flush_folder, named_in_errors, remove_unfinished, write_whole

NEWEST = 3  # are kept, and the best
UNFINISHED = ".partial"  # after the name of what is being written or deleted
STATE = "state.json"

State = dict[str, Any]
Tensors = Mapping[str, Mapping[str, Tensor]]  # by file


def list_checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints of a run by their step, the oldest first."""
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in run.iterdir()) if run.is_dir() else ()
    return dict(sorted((int(match[1]), path) for match, path in found if match and path.is_dir()))


def save(run: Path, step: int, tensors: Tensors, state: State) -> Path:
    """Write a checkpoint; only its state, if there is one of this step.

    Args:
        run: the folder of the run.
        step: its number.
        tensors: for each file (``model``, ``optimizer``) its tensors by name.
        state: what else a run needs to resume; JSON.

    Raises:
        OSError: it cannot be written. Nothing is left of it then, and the checkpoints before it are as they were.
    """
    from safetensors.torch import save as to_bytes

    final, temporary = run / f"step-{step}", run / f"step-{step}{UNFINISHED}"
    if final.exists():  # from before the validation that ends the epoch: the same tensors
        files = read_state(final)["files"]
        content = _sealed({**state, "files": files})
        write_whole(final / STATE, lambda stream: stream.write(content))
        return final
    try:
        temporary.mkdir()
        hashes = {}
        for name, some in tensors.items():
            file = temporary / f"{name}.safetensors"
            hashes[file.name] = _write(file, to_bytes({key: value.contiguous() for key, value in some.items()}))
        _write(temporary / STATE, _sealed({**state, "files": hashes}))
        flush_folder(temporary)
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    flush_folder(run)
    return final


def prune(run: Path, best: int | None) -> None:
    """Delete all checkpoints but the newest three and the best."""
    checkpoints = list_checkpoints(run)
    for step in list(checkpoints)[:-NEWEST]:
        if step != best:
            remains = run / f"step-{step}{UNFINISHED}"
            os.rename(checkpoints[step], remains)  # what is half deleted is no checkpoint
            shutil.rmtree(remains)


def clean(run: Path) -> None:
    """Remove what a process has left that was killed while it wrote or deleted."""
    for remains in run.glob(f"step-*{UNFINISHED}"):
        if re.fullmatch(rf"step-\d+{UNFINISHED}", remains.name):
            shutil.rmtree(remains)
    for file in (found / STATE for found in list_checkpoints(run).values()):
        remove_unfinished(file)


def read_state(checkpoint: Path) -> State:
    """What is in ``state.json``.

    Raises:
        FileNotFoundError: it is missing.
        RuntimeError: it is damaged, or of another step than the folder's name says.
    """
    file = checkpoint / STATE
    _check_is_there(file)
    try:
        state = json.loads(file.read_text())
        if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
            raise ValueError("it is not that of a checkpoint")
        if state.pop("hash", None) != _digest(state):
            raise ValueError("it is damaged or was changed: its hash is another")
        if (saved := f"step-{state['steps_done']}") != checkpoint.name:
            raise ValueError(f"it was saved as {saved}")
    except (ValueError, KeyError, RecursionError) as error:
        raise RuntimeError(f"{file}: cannot be read: {error}{_remedy(checkpoint)}") from None
    return state


def read_tensors(checkpoint: Path, name: str, state: State) -> dict[str, Tensor]:
    """The tensors of a file of a checkpoint.

    Raises:
        FileNotFoundError: it is missing.
        RuntimeError: it is not what was written.
    """
    from safetensors.torch import load_file

    file = checkpoint / f"{name}.safetensors"
    _check_is_there(file)
    if _hash(file) != state["files"].get(file.name):
        raise RuntimeError(f"{file}: is damaged or was changed: its hash is not that in {STATE}{_remedy(checkpoint)}")
    return load_file(file)


def _check_is_there(file: Path) -> None:
    if not file.exists():
        raise FileNotFoundError(f"{file}: is missing{_remedy(file.parent)}")


def _remedy(checkpoint: Path) -> str:
    """What to do without this checkpoint."""
    others = [step for step, path in list_checkpoints(checkpoint.parent).items() if path != checkpoint]
    return f". Without {checkpoint.name} the run resumes from step {others[-1]}" if others else ""


def _sealed(state: State) -> bytes:
    """With a hash of the rest."""
    return json.dumps({**state, "hash": _digest(state)}, indent=1, allow_nan=False).encode()


def _digest(state: State) -> str:
    return sha256(json.dumps(state, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _write(file: Path, content: bytes) -> str:
    """Write a file to the disk; its hash."""
    with named_in_errors(file), open(file, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    return sha256(content).hexdigest()


def _hash(file: Path) -> str:
    digest = sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
