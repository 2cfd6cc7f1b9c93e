"""The journal of a run folder: one line of JSON for each shard that the disk has, appended and synced."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xprobe.runs.disk import expect, read_file, sync


def append(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Appends a line for each entry, and waits once until the disk has them."""
    new = not expect(path)
    with path.open("ab+", buffering=0) as journal:
        if journal.seek(0, os.SEEK_END):
            journal.seek(-1, os.SEEK_END)
            new_line = b"" if journal.read(1) == b"\n" else b"\n"  # the process was killed while it wrote the last line
        else:
            new_line = b""
        lines = new_line + b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
        while lines:
            lines = lines[os.write(journal.fileno(), lines) :]
        os.fsync(journal.fileno())
    if new:
        sync(path.parent)


def runs(path: Path) -> set[str]:
    """Keys of the runs that the journal has lines of."""
    return {entry["run"] for entry in _lines(path) if isinstance(entry.get("run"), str)}


def entries(path: Path, run: str) -> dict[str, dict[str, Any]]:
    """The last line on each shard of the run with the key ``run``. Damaged lines and those of other runs are left out.

    Raises
    ------
    RunFolderError
        ``path`` is something else than a file, or cannot be read.
    """
    return {entry["shard"]: entry for entry in _lines(path) if entry.get("run") == run}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines on a shard that are whole."""
    for line in read_file(path).split(b"\n") if expect(path) else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue  # cut off where a run was killed while writing it
        if isinstance(entry, dict) and isinstance(entry.get("shard"), str):
            yield entry
