"""What the run folder asks of the disk: errors that name the path, folders and files that outlive a power cut."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xprobe.errors import RunFolderError, UsageError

# network file systems that sync no folders write names through; a folder that may be written but not read is no error
_FOLDERS_SYNC_THEMSELVES = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


def check_writable(path: Path) -> None:
    """Raises RunFolderError early if ``path`` could not be made: before a model is loaded, not after."""
    nearest = path
    while not nearest.exists() and nearest.parent != nearest:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UsageError(f"cannot make {path}: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunFolderError(f"cannot write {nearest}: permission denied; choose another --out")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the errors of the system into one that names the path."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot write {error.filename or path}: {error.strerror or error}; choose another --out or make room"
        ) from error


def make_folder(path: Path) -> list[Path]:
    """Makes ``path`` and what is missing above it, on the disk too; the folders made, deepest first."""
    made = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        made.append(folder)
    for left in reversed(range(20)):
        try:
            path.mkdir(parents=True, exist_ok=True)
            break
        except FileExistsError:  # a file; or a folder that another process took away again at this moment
            if not left or path.is_file():
                raise
    for folder in made:
        sync(folder.parent)
    return made


def sync(path: Path) -> None:
    """Waits until the disk has the file, or the names in the folder."""
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return  # folders cannot be opened there; a renaming is written through
    try:
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not is_folder or error.errno not in _FOLDERS_SYNC_THEMSELVES:
            raise


def checksum(path: Path) -> str | None:
    """SHA-256 of a file; None if there is no such file, or it cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except (OSError, ValueError):
        return None
