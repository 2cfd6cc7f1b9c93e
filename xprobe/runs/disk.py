"""Files and folders of a run: errors name the path, and what is written survives a power cut."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xprobe.errors import RunFolderError, UsageError

# some network file systems cannot sync folders and write names at once; a folder without read permission is no error
_FOLDERS_SYNC_THEMSELVES = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


def check_writable(path: Path) -> None:
    """Raises RunFolderError early if ``path`` could not be made: before a model is loaded, not after."""
    nearest = path
    while not nearest.exists() and nearest.parent != nearest:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UsageError(f"cannot make {path}: {nearest} is {what_is(nearest)}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RunFolderError(f"cannot write {nearest}: permission denied; use a folder that you may write to")


# kinds of paths that are no files
_KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISLNK, "a link"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip
DEAD_LINK = "a link to nothing"


def what_is(path: Path, *, follow: bool = True) -> str | None:
    """What a path is, in words; None if it does not exist.

    It opens nothing, because opening a named pipe would block. ``follow``: describe the target of a link.
    """
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error
    if follow and stat.S_ISLNK(mode):
        try:
            mode = os.stat(path).st_mode
        except OSError:
            return DEAD_LINK
    return next((words for test, words in _KINDS if test(mode)), "a file")


REMEDY = "move it away, then try again"


def expect(path: Path, *wanted: str, follow: bool = True, remedy: str = REMEDY) -> bool:
    """Whether ``path`` exists.

    Raises
    ------
    RunFolderError
        It is something else than ``wanted`` (a file if none is given), in the words of ``what_is``.
    """
    wanted = wanted or ("a file",)
    kind = what_is(path, follow=follow)
    if kind is not None and kind not in wanted:
        raise RunFolderError(f"{path} is {kind}, not {wanted[0]}: {remedy}")
    return kind is not None


def entries(folder: Path) -> list[Path]:
    """Paths in a folder, sorted."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error


def read_file(path: Path) -> bytes:
    """Content of a regular file.

    Raises
    ------
    RunFolderError
        It is something else, or cannot be read.
    """
    expect(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> RunFolderError:
    """An error of the system as one that names the path and says what to do."""
    advice = "give yourself the right to read it" if error.errno in _FORBIDDEN else "check the disk"
    return RunFolderError(f"cannot read {path}: {error.strerror or error}; {advice}, then try again")


_FORBIDDEN = (errno.EACCES, errno.EPERM)
_ADVICE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "make it writable, or use a folder that is"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EIO), "make room, or use a folder on another disk"),
    errno.EROFS: "use a folder on another file system",
    **dict.fromkeys(
        (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENXIO),
        "move away what stands in the way, or use another folder",
    ),
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns errors of the system inside the block into one that names the path and says what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "use another folder")
        raise RunFolderError(f"cannot write {error.filename or path}: {error.strerror or error}; {advice}") from error


def make_folder(path: Path) -> list[Path]:
    """Makes ``path`` and what is missing above it, on the disk too; the folders made, deepest first."""
    made = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        made.append(folder)
    for attempts_left in reversed(range(20)):
        try:
            path.mkdir(parents=True, exist_ok=True)
            break
        except FileExistsError:  # a file; or a folder that another process has just removed
            if not attempts_left or path.is_file():
                raise
    for folder in made:
        sync(folder.parent)
    return made


def sync(path: Path) -> None:
    """Waits until the disk has the file, or the names in the folder."""
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return  # Windows cannot open folders, and writes new names at once
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
    """SHA-256 of a regular file; None if there is no such file, or it cannot be read."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except (OSError, ValueError):
        return None


REPLACED = ("a file", "a link")  # what a new file may take the name of
PART = ".{}.part"  # temporary name of a file that is being written


@contextmanager
def replacing(final: Path, *, sync_folder: bool = True) -> Iterator[Path]:
    """A temporary name to write to. When the block ends, the file is synced and takes the name ``final``.

    Readers see the old content or the new, never a part. A block that raises leaves the old file. With
    ``sync_folder=False`` the caller syncs the folder, once for several files.
    """
    temporary = final.with_name(PART.format(final.name))
    expect(final, *REPLACED, follow=False)
    expect(temporary, follow=False)
    try:
        yield temporary
        sync(temporary)  # first: the name must never refer to bytes that the disk does not have
        temporary.replace(final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_folder:
        sync(final.parent)


def holds_other_than(path: Path, names: set[str], folder: str) -> bool:
    """Whether ``path`` is a folder with more in it than files of these names and an empty ``folder``."""
    if not path.is_dir():
        return False
    rest = [entry for entry in entries(path) if entry.name not in names]
    return any(entry.name != folder or not entry.is_dir() or bool(entries(entry)) for entry in rest)
