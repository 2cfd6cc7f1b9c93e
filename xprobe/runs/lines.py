"""A file of JSON lines that a run appends to while it works. Each line carries its own checksum.

Lines are synced to the disk before ``append`` returns. A line that a killed process wrote only in part, or that was
changed later, does not count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
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


class KeptLines:
    """The lines that one computation keeps in such a file, each under a name. Other computations have other keys.

    Parameters
    ----------
    path : Path
    key : str
        Checksum of everything that the lines depend on.
    name : callable (line) -> hashable or None
        What a line is about; None for a line that only helps to go on after a stop.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> one, other = (KeptLines(folder / "sums.jsonl", key, lambda line: line["of"]) for key in ("k1", "k2"))
    >>> one.append([{"of": "b", "sum": 3}, {"of": "a", "sum": 1}])
    >>> other.append([{"of": "a", "sum": 7}])
    >>> one.tidy(["a", "b"])
    >>> list(one.read()), other.read()["a"]["sum"]
    (['a', 'b'], 7)
    """

    def __init__(self, path: Path, key: str, name: Callable[[dict[str, Any]], Hashable | None]) -> None:
        self.path, self.key, self._name = path, key, name

    def own_lines(self) -> list[dict[str, Any]]:
        """All lines with this key, in their order."""
        return [line for line in read_lines(self.path) if line.get("key") == self.key]

    def read(self) -> dict[Any, dict[str, Any]]:
        """The named lines, by name. Of two with one name the later counts."""
        named = ((self._name(line), line) for line in self.own_lines())
        return {name: line for name, line in named if name is not None}

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Appends lines under this key, and waits until the disk has them."""
        append_lines(self.path, [{"key": self.key, **line} for line in lines])

    def tidy(self, wanted: Iterable[Hashable]) -> None:
        """Rewrites the file: the wanted lines in their order, this key's other named lines, the lines of other keys.

        A computation that was stopped then leaves the same file as one that was not.
        """
        own = self.read()
        first = {name: own[name] for name in wanted}
        rest = [line for name, line in own.items() if name not in first]
        others = [line for line in read_lines(self.path) if line.get("key") != self.key]
        rewrite_lines(self.path, [*first.values(), *rest, *others])
