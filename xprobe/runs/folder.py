"""The run folder: manifest, journal, checksummed shards, tables. docs/run-folder.md describes it for readers.

A run that is stopped at any moment, by SIGKILL or by the power, leaves whole files. Each is written under a temporary
name, synced to the disk, renamed, and its folder synced. Only then are the shards of a wave entered in the journal,
which is synced too. So the disk has every shard in the journal, and the journal has its checksum.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from xprobe.config import ROWS_FILE
from xprobe.errors import RunFolderError, UsageError
from xprobe.runs import journal, manifest_file
from xprobe.runs.disk import (
    PART,
    REPLACED,
    checksum,
    entries,
    expect,
    holds_other_than,
    make_folder,
    read_file,
    replacing,
    sync,
    what_is,
    writing,
)
from xprobe.runs.identity import run_key
from xprobe.runs.lock import LOCK
from xprobe.runs.manifest import Manifest
from xprobe.runs.schema import (
    finished_complaint,
    identity_complaint,
    without_broken_extras,
    without_broken_stages,
)
from xprobe.runs.serialization import UNFINISHED, Shard, ShardFile, write_files
from xprobe.runs.tables import RunTables

MANIFEST, JOURNAL, SHARDS = "manifest.json", "journal.jsonl", "shards"
LAYERS, EXAMPLES, PROBE_TABLE = "layers.parquet", "examples.parquet", "probes.parquet"
SHARD = ".safetensors"  # end of a shard's name
PUT_BACK = "put the old manifest back, or start the run in a new folder"
_NAMED = 5  # shards that a message names


@dataclass(frozen=True)
class RunFolder(RunTables):
    """A folder that holds one run."""

    @classmethod
    def check(cls, path: Path, *, resume: bool = False) -> None:
        """Raises the errors of ``create`` without making anything."""
        kind = what_is(path)
        if kind not in (None, "a folder"):
            raise UsageError(f"{path} is {kind}: out (--out) must be a folder")
        filled = holds_other_than(path, {LOCK, PART.format(MANIFEST)}, SHARDS)
        if filled and not resume:
            raise UsageError(
                f"{path} is not empty: choose another out (--out), or resume the run in it (resume=True, --resume)"
            )
        if filled and not cls(path).has_manifest():
            raise UsageError(f"{path} holds no run to resume (no {MANIFEST}): choose another out (--out)")
        cls(path).check_places()

    @classmethod
    def create(cls, path: Path, *, resume: bool = False) -> RunFolder:
        """Makes the folder, or with ``resume`` opens it again if it is there.

        Raises
        ------
        UsageError
            The folder already holds something (and ``resume`` is False), or holds no run to resume.
        RunFolderError
            It cannot be written, or something else than a file lies where the run keeps one.
        """
        cls.check(path, resume=resume)
        folder = cls(path)
        folder.make()
        return folder

    def make(self) -> None:
        """Makes the folder and the one of its shards, where they are missing."""
        with writing(self.path):
            make_folder(self.path / SHARDS)
            sync(self.path)
        for folder in (self.path, self.path / SHARDS):
            if not os.access(folder, os.W_OK | os.X_OK):
                raise RunFolderError(f"cannot write {folder}: permission denied; use a folder that you may write to")

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """A folder that holds a run already. A text is a path, too."""
        path = Path(path)
        if not cls(path).has_manifest():
            raise UsageError(f"{path} is not a run folder: it holds no {MANIFEST}")
        return cls(path)

    def has_manifest(self) -> bool:
        """Whether a run was begun here.

        Raises
        ------
        RunFolderError
            Something else than a file has the manifest's name.
        """
        return expect(self.path / MANIFEST, remedy="put the run's own manifest there, or use another folder")

    def check_places(self) -> None:
        """Checks that every name that the run needs is free or its own.

        Raises
        ------
        RunFolderError
            Names the path, what it is, and what to do. A link with the name of a shard or table is allowed: a new
            file replaces it.
        """
        if what_is(self.path) is None:
            return
        self.has_manifest()
        expect(self.path / JOURNAL)
        expect(self.path / LOCK, follow=False)
        for name in (LAYERS, EXAMPLES, PROBE_TABLE):
            expect(self.path / name, *REPLACED, follow=False)
        folders = [self.path, self.path / SHARDS] if expect(self.path / SHARDS, "a folder") else [self.path]
        for place in (place for folder in folders for place in entries(folder)):
            if place.name.startswith(ROWS_FILE) or (place.name.startswith(".") and place.name.endswith(".part")):
                expect(place, follow=False)
            elif place.suffix == SHARD:
                expect(place, *REPLACED, follow=False)

    # -- manifest --------------------------------------------------------------------------------------------

    def _read_json(self) -> dict[str, Any]:
        """The manifest as plain values; empty if there is none yet."""
        return manifest_file.read_values(self.path / MANIFEST) if self.has_manifest() else {}

    def read_run(self) -> Manifest:
        """The manifest of a run that was started, with all that says what the run is made of.

        Raises
        ------
        RunFolderError
            An entry is missing or wrong.
        """
        return Manifest.from_dict(without_broken_stages(self._read_identity()))

    def read_study(self) -> dict[str, Any]:
        """The run's ``StudyConfig`` as it was written, with entries that this version may not know."""
        return self._read_identity()["study"]

    def _read_identity(self) -> dict[str, Any]:
        manifest = without_broken_extras(self._read_json())
        wrong = identity_complaint(manifest)
        if wrong is not None:
            raise RunFolderError(f"{self.path / MANIFEST}: {wrong}; the run cannot be used: start it in a new folder")
        return manifest

    def read_finished(self) -> Manifest:
        """The manifest of a finished run, with all that any reader relies on.

        Raises
        ------
        RunFolderError
            The run is not finished, or an entry is missing or wrong.
        """
        manifest = self._read_identity()
        if manifest["status"] != "done":
            raise RunFolderError(
                f"the run in {self.path} is not finished ({manifest['status']}): {self.resume_command} continues it"
            )
        wrong = finished_complaint(manifest)
        if wrong is not None and wrong.startswith("entry study"):
            raise RunFolderError(f"{self.path / MANIFEST}: {wrong}; the run cannot be used: {PUT_BACK}")
        if wrong is not None:
            raise RunFolderError(f"{self.path / MANIFEST}: {wrong}; {self.resume_command} writes it again")
        if not self.manifest_is_untouched():
            raise RunFolderError(
                f"{self.path / MANIFEST} was changed after xprobe wrote it. Put the old manifest back; or "
                f"{self.resume_command} compares it with model, data and shards, and writes it again"
            )
        return Manifest.from_dict(manifest)

    def check_key(self) -> None:
        """Checks that the journal names the run of the manifest, if it names any.

        Raises
        ------
        RunFolderError
            What identifies the run was changed after it wrote its shards.
        """
        if journal.runs(self.path / JOURNAL) - {self._run_key} and not self._entries():
            raise RunFolderError(
                f"{self.path / MANIFEST} was changed after the run wrote its shards: they are of another study, model "
                f"or data. {PUT_BACK.capitalize()}"
            )

    def untouched_stages(self) -> set[str]:
        """Names of the stages whose entries are as they were written."""
        return manifest_file.untouched_stages(self._read_json())

    def is_finished(self) -> bool:
        """Whether nothing has to be computed: the manifest is as it was written, and every shard is there."""
        manifest = self._read_identity()
        done = manifest["status"] == "done" and finished_complaint(manifest) is None
        return done and self.manifest_is_untouched() and self.holds(manifest["groups"])

    def manifest_is_untouched(self) -> bool:
        """Whether the manifest still has the checksum that it was written with."""
        return manifest_file.is_untouched(self.path / MANIFEST)

    def write_manifest(self, manifest: Manifest) -> None:
        """Writes the manifest with its checksums, in one step."""
        self.__dict__.pop("_run_key", None)
        self.write_bytes(MANIFEST, manifest_file.manifest_bytes(manifest))

    @cached_property
    def _run_key(self) -> str:
        """Checksum of everything that the shards depend on. Journal lines with another key are ignored."""
        return run_key(self._read_json())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a file of the folder in one step: readers see the old content or the new, never a part."""
        with writing(self.path), replacing(self.path / name) as temporary:
            temporary.write_bytes(content)

    # -- shards ----------------------------------------------------------------------------------------------

    def shard_name(self, group: str) -> str:
        return group.replace("/", ".") + SHARD

    def write_shard(self, group: str, tensors: dict[str, Any], metadata: dict[str, Any], execution: str = "") -> None:
        """Stores one context group (numpy arrays or torch tensors); see ``write_shards``."""
        self.write_shards([Shard(group, tensors, metadata)], execution)

    def write_shards(
        self, shards: Sequence[Shard], execution: str = "", stored: Callable[[list[Shard]], None] = lambda shards: None
    ) -> None:
        """Stores context groups side by side, and enters them in the journal with their checksums.

        A shard counts from its line in the journal on. The lines follow in one write, once the disk has all files. If a
        file cannot be written, the other ones are entered all the same, and the error is raised then. ``stored`` is
        called with the shards that were entered. ``execution`` is the key of the execution that computed them.
        """
        places = [self.path / SHARDS / self.shard_name(shard.group) for shard in shards]
        with writing(self.path):
            files, errors = write_files(shards, places)
            if files:
                sync(self.path / SHARDS)
                run = {"run": self._run_key, "execution": execution}
                journal.append(self.path / JOURNAL, [entry | run for entry in files.values()])
                stored(list(files))
            if errors:
                raise errors[0]

    def _entries(self) -> dict[str, dict[str, Any]]:
        """The journal's last line on each shard of this run."""
        return journal.entries(self.path / JOURNAL, self._run_key)

    def finished_shards(self) -> list[str]:
        """Names of shards that still have the checksum in the journal, in its order."""
        known = self._entries()
        return [name for name in known if checksum(self.path / SHARDS / name) == known[name].get("sha256", "")]

    def shards_by_execution(self, groups: list[str]) -> Counter[str]:
        """How many of the shards of ``groups`` each execution wrote, by its key."""
        known = self._entries()
        keys = (known.get(name, {}).get("execution") for name in map(self.shard_name, groups))
        return Counter(key for key in keys if isinstance(key, str))

    def tidy(self, groups: list[str]) -> None:
        """Makes an interrupted run's folder equal to that of a run without interruption.

        Removes temporary files of killed processes, and rewrites the journal: one line per group, in this order. Only
        the process that holds the folder's lock may call it.
        """
        with writing(self.path):
            for pattern in (PART.format("*"), f"{ROWS_FILE}*", *UNFINISHED):
                for part in [*self.path.glob(pattern), *(self.path / SHARDS).glob(pattern)]:
                    part.unlink()
            known = self._entries()
            names = [self.shard_name(group) for group in groups]
            lines = "".join(json.dumps(known[name]) + "\n" for name in names if name in known).encode()
            if read_file(self.path / JOURNAL) != lines:
                self.write_bytes(JOURNAL, lines)

    def unknown_shards(self, groups: list[str]) -> list[str]:
        """Names of shards in the folder that are of none of ``groups``."""
        known = {self.shard_name(group) for group in groups}
        return [path.name for path in entries(self.path / SHARDS) if path.suffix == SHARD and path.name not in known]

    def holds(self, groups: list[str]) -> bool:
        """Whether every one of ``groups`` has a finished shard."""
        return not self._damaged(groups)

    def check_shards(self, groups: list[str]) -> None:
        """Reads every shard of ``groups`` once and compares its checksum with the journal's.

        Raises
        ------
        RunFolderError
            Names the shards that are not what this run wrote.
        """
        self.check_places()
        damaged = self._damaged(groups)
        if damaged:
            names = ", ".join(damaged[:_NAMED]) + (f" and {len(damaged) - _NAMED} more" if damaged[_NAMED:] else "")
            what, again = ("is not the shard", "it") if len(damaged) == 1 else ("are not the shards", "them")
            place = self.path / SHARDS
            if not self.manifest_is_untouched():
                raise RunFolderError(
                    f"{self.path / MANIFEST} was changed after xprobe wrote it, so these shards are not known to be "
                    f"its own: {names}. {PUT_BACK.capitalize()}"
                )
            raise RunFolderError(
                f"{names} in {place} {what} that this run wrote: {self.resume_command} computes {again} again"
            )

    def _damaged(self, groups: list[str]) -> list[str]:
        """Names of shards that are missing, unknown to the journal, or have other bytes than it says."""
        known = self._entries()
        names = [self.shard_name(group) for group in groups]
        return [
            name
            for name in names
            if name not in known or checksum(self.path / SHARDS / name) != known[name].get("sha256", "")
        ]

    def read_shard(self, name: str, keys: tuple[str, ...] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays (only ``keys`` if given; bf16 comes back as float32) and metadata of one shard."""
        with self._opened(name) as shard:
            return shard.read(keys)

    @contextmanager
    def _opened(self, name: str) -> Iterator[ShardFile]:
        path = self.path / SHARDS / name
        try:
            with ShardFile.opened(path) as shard:
                yield shard
        except Exception as error:  # safetensors raises its own error type, OSError, KeyError
            raise RunFolderError(f"cannot read {path} ({error}): {self.resume_command} computes it again") from error

    def check_fit(self, entry: str, value: int, stored: int) -> None:
        """Compares an entry of the manifest with the value in the shards.

        Raises
        ------
        RunFolderError
            They differ.
        """
        if value != stored:
            raise RunFolderError(
                f"{self.path / MANIFEST}: entry {entry} is {value}, the shards hold {stored}; "
                f"{self.resume_command} writes it again"
            )

    def check_dtype(self, dtype: str) -> None:
        """Compares the model's dtype in the manifest with that of the hidden rows in the shards, if there are any.

        Raises
        ------
        RunFolderError
            They differ.
        """
        for name in self.finished_shards()[:1]:
            with self._opened(name) as shard:
                stored = shard.dtype("prompt_end")
            if stored not in (None, dtype):
                raise RunFolderError(
                    f"{self.path / MANIFEST}: entry model.dtype is {dtype!r}, the shards hold {stored}. "
                    f"{PUT_BACK.capitalize()}"
                )

    def row_shape(self, name: str, key: str) -> tuple[int, ...]:
        """Shape of one example in an array of a shard."""
        with self._opened(name) as shard:
            return shard.row_shape(key)

    def read_layers(self, name: str, key: str, layers: range) -> Any:
        """Layers of one array [N, K, D] of a shard as float32 [N, len(layers), D]; nothing else of it is read."""
        with self._opened(name) as shard:
            return shard.layers(key, layers)
