"""A file of JSON lines that a run appends to while it works. Each line carries its own checksum.

Lines are synced to the disk before ``append`` returns. A line that a killed process wrote only in part, or that was
changed later, does not count.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xprobe.runs import journal
from xprobe.runs.disk import expect, read_file, replacing, writing
from xprobe.runs.identity import checksum_of

SHA256 = "sha256"


def append_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Appends objects of plain values, and waits until the disk has them.

    Raises
    ------
    RunFolderError
        The file cannot be written.
    """
    with writing(path.parent):
        journal.append(path, [{**line, SHA256: checksum_of(line)} for line in lines])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that are as they were written, in their order, without their checksums.

    Raises
    ------
    RunFolderError
        ``path`` is something else than a file, or cannot be read.
    """
    found = []
    for line in read_file(path).split(b"\n") if expect(path) else []:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and values.pop(SHA256, None) == checksum_of(values):
            found.append(values)
    return found


def rewrite_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Replaces the file's content in one step."""
    content = "".join(json.dumps({**line, SHA256: checksum_of(line)}) + "\n" for line in lines).encode()
    if read_file(path) != content if expect(path) else True:
        with writing(path.parent), replacing(path) as temporary:
            temporary.write_bytes(content)
