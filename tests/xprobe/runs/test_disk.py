"""What the run folder asks of the disk: names in errors, and names that are on the disk when they are needed."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from xprobe.errors import RunFolderError, UsageError
from xprobe.runs.disk import check_writable, checksum, make_folder, sync, writing
from xprobe.runs.folder import RunFolder


def test_check_writable_says_early_that_a_folder_cannot_be_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path / 'file'} is a file")):
        check_writable(tmp_path / "file" / "run")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a user whom permissions hold back")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    try:
        with pytest.raises(RunFolderError, match="permission denied; use a folder that you may write to"):
            check_writable(locked / "run")
        with pytest.raises(RunFolderError, match=r"cannot write .* use a folder"):
            RunFolder.create(locked / "run")
    finally:
        locked.chmod(0o700)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were synced, each really."""
    paths, real = [], os.fsync

    def fsync(handle: int) -> None:
        paths.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_the_name_of_every_new_folder_is_synced(tmp_path: Path, synced: list[str]) -> None:
    out = tmp_path / "a" / "b"
    assert make_folder(out) == [out, out.parent]
    assert sorted(synced) == [str(tmp_path), str(out.parent)]
    assert make_folder(out) == []
    assert len(synced) == 2


def fail_to_sync(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_sync(monkeypatch, errno.EINVAL)
    sync(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")


def test_a_failed_sync_is_an_error_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "run")
    folder.write_bytes("report.html", b"old")
    fail_to_sync(monkeypatch, errno.EIO)
    with pytest.raises(RunFolderError, match="Input/output error"):
        folder.write_bytes("report.html", b"new")
    assert [(path.name, path.read_bytes()) for path in folder.path.iterdir() if path.is_file()] == [
        ("report.html", b"old")
    ]


def test_a_file_that_cannot_be_read_has_no_checksum(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", tmp_path / ("x" * 5000), tmp_path / "a\0b"):
        assert checksum(path) is None


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENOSPC])
def test_advice_on_a_folder_that_cannot_be_written_fits_every_command(number: int, tmp_path: Path) -> None:
    words = rf"^cannot write {tmp_path}: {os.strerror(number)}; \w+"
    with pytest.raises(RunFolderError, match=words) as caught, writing(tmp_path):
        raise OSError(number, os.strerror(number))
    assert "--" not in str(caught.value)
