"""One process per run folder; a lock that ends with its process and is never in a reader's way."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest

import xprobe
from xprobe.errors import RunFolderError, UsageError
from xprobe.runs import lock as locks
from xprobe.runs.lock import LOCK, FolderLock

fcntl = pytest.importorskip("fcntl")

# the forks here do nothing that another thread could hold a lock of
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def in_a_fork(work: Any) -> str:
    """What ``work`` gives, or the message of its UsageError, in a process of its own."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            messages = str(work())
        except UsageError as error:
            messages = f"refused: {error}"
        os.write(writing, messages.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with os.fdopen(reading) as stream:
        return stream.read()


def take(path: Path) -> str:
    with FolderLock(path):
        return "taken"


def test_the_lock_makes_the_folder_and_removes_its_own_files(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    with FolderLock(out):
        assert [path.name for path in out.iterdir()] == [LOCK]
        holder = json.loads((out / LOCK).read_text())
        assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
    assert list(tmp_path.iterdir()) == []


def test_older_folders_and_folders_with_content_stay(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        pass
    assert tmp_path.is_dir()
    with FolderLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("x")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]


def test_another_process_is_refused_with_the_name_of_the_holder_and_advice(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        refused = in_a_fork(lambda: take(tmp_path))
        assert refused == (
            f"refused: {tmp_path} is being written by process {os.getpid()} on {socket.gethostname()}: "
            "wait until it ends, stop it, or use another folder"
        )
        assert (tmp_path / LOCK).exists()
    assert in_a_fork(lambda: take(tmp_path)) == "taken"


def test_the_same_process_and_its_threads_are_refused_too(tmp_path: Path) -> None:
    messages = []

    def other() -> None:
        try:
            messages.append(take(tmp_path / "." / "run"))
        except UsageError as error:
            messages.append(str(error))

    with FolderLock(tmp_path / "run"):
        with pytest.raises(UsageError, match="is being written by this process"):
            take(tmp_path / "run")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert (tmp_path / "run" / LOCK).exists()
    assert len(messages) == 1
    assert "this process" in messages[0]
    assert take(tmp_path / "run") == "taken"


def test_a_fork_neither_keeps_nor_releases_the_lock(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with FolderLock(tmp_path):
        pid = os.fork()
        if pid == 0:  # outlives the lock
            os.close(writing)
            os.read(reading, 1)
            os._exit(0)
    try:
        assert in_a_fork(lambda: take(tmp_path)) == "taken"
    finally:
        os.close(writing)
        os.waitpid(pid, 0)
        os.close(reading)

    holder = FolderLock(tmp_path)
    with holder:
        assert in_a_fork(lambda: holder.__exit__(None, None, None)) == "None"
        assert "refused" in in_a_fork(lambda: take(tmp_path))


def test_the_lock_file_of_a_killed_process_locks_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from xprobe.runs.lock import FolderLock\n"
        "with FolderLock(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment).returncode == -9
    assert (tmp_path / LOCK).exists()
    assert take(tmp_path) == "taken"
    assert not (tmp_path / LOCK).exists()


def test_a_fork_that_outlives_a_killed_process_does_not_keep_its_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from xprobe.runs.lock import FolderLock\n"
        "with FolderLock(Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"
        "        print(flush=True); sys.stdin.read(); os._exit(0)\n"
        "    signal.pause()"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    try:
        assert take(tmp_path) == "taken"
    finally:
        process.stdin.close()  # ends the fork
        process.stdout.close()


@pytest.mark.parametrize("content", [b"", b'{"pid": 12', b"[]", b"\xff\xfe", b'{"pid": "many", "host": 3}'])
def test_the_content_of_the_lock_file_does_not_lock(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(content)
    assert take(tmp_path) == "taken"
    (tmp_path / LOCK).write_bytes(content)
    with (tmp_path / LOCK).open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="is being written by"):
            take(tmp_path)


def test_only_one_of_many_processes_holds_the_lock_at_a_time(tmp_path: Path) -> None:
    """Each adds 1 to a counter, reading and writing it apart: two at once would lose one."""
    out, counter, each = tmp_path / "run", tmp_path / "counter", 50
    counter.write_text("0")

    def count() -> None:
        done = 0
        while done < each:
            try:
                with FolderLock(out):
                    value = int(counter.read_text())
                    os.sched_yield()
                    counter.write_text(str(value + 1))
                    done += 1
            except UsageError:
                os.sched_yield()

    children = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                count()
                code = 0
            except BaseException:
                traceback.print_exc()  # shown with the failure: what a fork raises is seen by nobody else
            finally:
                os._exit(code)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert int(counter.read_text()) == 4 * each
    assert not (out / LOCK).exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="cannot write"):
        take(tmp_path / "file" / "run")


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that knows no flock, as some network file systems."""

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", fail)


@pytest.mark.usefixtures("without_flock")
def test_a_file_system_without_locks_gives_a_warning_and_processes_of_this_machine_are_noticed(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as held:
        assert held.warning is not None
        assert f"the file system of {tmp_path} has no locks" in held.warning
        refused = in_a_fork(lambda: take(tmp_path))
        assert f"by process {os.getpid()} on" in refused
        assert f"remove {tmp_path / LOCK}" in refused
        with pytest.raises(UsageError, match="this process"):
            take(tmp_path)
    ended = int(in_a_fork(os.getpid))
    for gone in ({"pid": ended, "host": socket.gethostname()}, {"pid": os.getppid(), "host": "elsewhere"}):
        (tmp_path / LOCK).write_text(json.dumps(gone))
        assert take(tmp_path) == "taken"


@pytest.mark.usefixtures("without_flock")
def test_a_run_without_locks_warns_and_continues(tiny: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    xprobe.run(
        str(tiny),
        out=tmp_path / "run",
        languages="en",
        limit=1,
        probes=(),
        progress=lambda event: messages.append(str(event)),
    )
    assert "has no locks" in messages[0]


def test_reading_needs_no_lock_and_writing_needs_it(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    study = xprobe.run(str(tiny), out=out, languages="en", limit=1, probes=())
    assert not (out / LOCK).exists()
    with FolderLock(out):
        assert xprobe.load_study(out).to_dict() == study.to_dict()
        for resume in (False, True):
            with pytest.raises(UsageError, match="is being written by this process"):
                xprobe.run(str(tiny), out=out, resume=resume, languages="en", limit=1, probes=())


def test_a_failed_run_releases_the_folder(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        xprobe.run(str(tiny), out=tmp_path / "a" / "run", languages="xx")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_content_is_refused_and_not_changed(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    before = tmp_path.stat().st_mtime_ns
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"not empty|no run to resume"):
            xprobe.run(str(tiny), out=tmp_path, resume=resume)
    assert tmp_path.stat().st_mtime_ns == before
