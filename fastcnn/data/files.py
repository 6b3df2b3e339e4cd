"""Files that are there in full or not at all."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_whole(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, and give it its name.

    Raises:
        OSError: it cannot be written; nothing is left of it then.
    """
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with named_in_errors(file), open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(file.parent)


def remove_unfinished(file: Path) -> None:
    """Remove what processes have left that were killed in :func:`write_whole`."""
    for temporary in file.parent.glob(f"{glob.escape(file.name)}.*.tmp"):
        if temporary.name[len(file.name) + 1 : -len(".tmp")].isdigit():
            temporary.unlink()


@contextmanager
def named_in_errors(file: str | os.PathLike[str]) -> Iterator[None]:
    """Name a file in errors of the system that do not: those of its stream, such as of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(file)
        raise


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file, which is removed in the end. The lock ends with this process, and is not its children's.

    Raises:
        BlockingIOError: another process holds it; this one may not ask for it twice.
    """
    import fcntl

    with open(file, "w") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(stream.fileno()).st_ino != os.stat(file).st_ino:  # another one, by now
                raise BlockingIOError
        except (BlockingIOError, PermissionError, FileNotFoundError):
            raise BlockingIOError(f"{file}: another process holds it") from None
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
