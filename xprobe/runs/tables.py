"""Tables of a run folder: written with their checksums, and read only if they are the ones that the run wrote."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xprobe.errors import RunFolderError
from xprobe.runs.commands import resume_command
from xprobe.runs.disk import checksum, expect, read_file, replacing, writing


@dataclass(frozen=True)
class RunTables:
    """The tables in the folder ``path`` of a run."""

    path: Path

    @property
    def resume_command(self) -> str:
        """The command that writes everything again that can be written again, for messages."""
        return f"`{resume_command(self.path)}`"

    def write_table(self, name: str, frame: Any) -> str:
        """Writes one table; its checksum."""
        with self.writing_tables({name: frame}) as digests:
            pass
        return digests[name]

    @contextmanager
    def writing_tables(self, frames: dict[str, Any]) -> Iterator[dict[str, str]]:
        """Writes tables, by file name, under temporary names, and renames them when the block ends.

        The block gets their checksums by file name. If it raises, or if the disk is full, the old tables stay.
        """
        with writing(self.path), ExitStack() as stack:
            digests: dict[str, str] = {}
            for name, frame in frames.items():
                temporary = stack.enter_context(replacing(self.path / name))
                frame.to_parquet(temporary, index=False)
                digests[name] = checksum(temporary) or ""
            yield digests

    def holds_table(self, name: str, digest: str) -> bool:
        """Whether a table is there, with the checksum that its stage entered in the manifest."""
        return checksum(self.path / name) == digest

    def check_table(self, name: str, digest: str, stage: str, remedy: str) -> None:
        """Compares the bytes of a table with the checksum that its stage entered in the manifest.

        ``remedy`` says in the error how to compute the stage again.

        Raises
        ------
        RunFolderError
            They differ, or there is no such table.
        """
        found = checksum(self.path / name)
        if found != digest:
            what = "is not there" if found is None else f"is not the table that the stage {stage!r} of this run wrote"
            raise RunFolderError(f"{self.path / name} {what}: {remedy}, or put the table back")

    def read_table(self, name: str, digest: str | None = None) -> Any:
        """A table as a data frame.

        Raises
        ------
        RunFolderError
            It is not there, cannot be read, or has another checksum than ``digest``.
        """
        import pandas as pd

        path = self.path / name
        if not expect(path):
            raise RunFolderError(f"{self.path} holds no {name}: {self.resume_command} writes it from the shards")
        content = read_file(path)
        if digest is not None and hashlib.sha256(content).hexdigest() != digest:
            raise RunFolderError(
                f"{path} is not the table that this run wrote: {self.resume_command} writes it again from the shards"
            )
        try:
            return pd.read_parquet(io.BytesIO(content))
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"cannot read {path} ({error}): {self.resume_command} writes it again from the shards"
            ) from error
