"""One process per run folder: a lock that the system removes when the process ends, also if it is killed."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from xprobe.errors import UsageError
from xprobe.runs.disk import expect, make_folder, writing

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"  # in the run folder while a process works on it; holds the process's id and host
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, errno.EBADF)
_TRIES = 100  # to find the file still there after locking it: another process may just have finished with it

_held: dict[str, int] = {}  # real path of a folder -> handle of its lock, of this process
_guard = threading.Lock()


class FolderLock:
    """Holds a run folder for one process, as a context manager. Makes the folder where it is missing.

    The lock is ``flock`` on the file ``.lock``. It ends with the process, also if the process is killed; the file that
    is left then locks nothing. On exit the file is removed, and so are folders made here that stayed empty.
    Reading a run needs no lock.

    Attributes
    ----------
    warning : str or None
        Set if the file system has no such locks: then only processes of this machine are noticed.

    Raises
    ------
    UsageError
        Another process or thread holds the folder: names its process id and host.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warning: str | None = None
        self._made: list[Path] = []
        self._key = ""
        self._owner = 0

    def __enter__(self) -> FolderLock:
        with writing(self.path):
            self._made = make_folder(self.path)
            self._key = os.path.realpath(self.path)
            try:
                with _guard:
                    if self._key in _held:
                        raise UsageError(_busy_message(self.path, _this_process()))
                    _held[self._key] = self._open()
            except BaseException:
                self._unmake()
                raise
        self._owner = os.getpid()
        _close_in_forks()
        return self

    def _open(self) -> int:
        """Handle of the lock file, locked, and still the one that others find under its name."""
        for _ in range(_TRIES):
            expect(self.path / LOCK, follow=False)
            try:
                handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # the process that made the folder has just removed it
                self._made = make_folder(self.path) or self._made
                continue
            try:
                self._take(handle)
                if _is_named(handle, self.path / LOCK):
                    os.ftruncate(handle, 0)
                    os.lseek(handle, 0, os.SEEK_SET)
                    os.write(handle, json.dumps(_this_process()).encode())
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
        raise UsageError(_busy_message(self.path, {}))

    def _take(self, handle: int) -> None:
        before = _read(handle)
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no flock")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(_busy_message(self.path, before)) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                raise
            if _runs_here(before):
                stale = f". If that process is no xprobe, remove {self.path / LOCK}"
                raise UsageError(_busy_message(self.path, before) + stale) from error
            self.warning = (
                f"the file system of {self.path} has no locks: nothing keeps a process of another machine out of it"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.getpid() != self._owner:
            return  # a fork leaves the block; the lock belongs to its parent
        with _guard:
            handle = _held.pop(self._key)
            # removed while locked: a process that has opened it sees that the name is gone, and tries again
            if fcntl is not None and _is_named(handle, self.path / LOCK):
                (self.path / LOCK).unlink(missing_ok=True)
            os.close(handle)
            if fcntl is None:  # open files cannot be removed there
                (self.path / LOCK).unlink(missing_ok=True)
        self._unmake()

    def _unmake(self) -> None:
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:
                break  # the run is in it


def _this_process() -> dict[str, Any]:
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": started}


def _read(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.read(handle, 4096))
        return found if isinstance(found, dict) else {}
    except ValueError:
        return {}  # empty, or cut off


def _is_named(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _runs_here(holder: dict[str, Any]) -> bool:
    """Whether the process in a lock file is one of this machine that still runs."""
    pid = holder.get("pid")
    if type(pid) is not int or pid <= 0 or holder.get("host") != socket.gethostname() or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it runs, as somebody else
    return True


def _busy_message(path: Path, holder: dict[str, Any]) -> str:
    if holder.get("pid") == os.getpid() and holder.get("host") == socket.gethostname():
        who = f"this process ({os.getpid()} on {socket.gethostname()})"
    elif "pid" in holder:
        who = f"process {holder['pid']} on {holder.get('host', 'an unknown host')}"
    else:
        who = "another process"
    return f"{path} is being written by {who}: wait until it ends, stop it, or use another folder"


_fork_hook_installed = False


def _close_in_forks() -> None:
    """Makes forked processes close their copy of the lock: a fork must not keep the folder locked."""
    global _fork_hook_installed
    if not _fork_hook_installed and hasattr(os, "register_at_fork"):
        _fork_hook_installed = True
        os.register_at_fork(after_in_child=_release_in_fork)


def _release_in_fork() -> None:
    global _guard
    _guard = threading.Lock()  # another thread of the parent may have held it
    for handle in _held.values():
        os.close(handle)
    _held.clear()
