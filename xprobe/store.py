"""The run folder: manifest, journal, checksummed shards, tables. docs/run-folder.md describes it for readers.

Every file is written under a temporary name and renamed, so a run that is stopped at any moment leaves whole files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xprobe.errors import RunFolderError, UsageError

FORMAT = 1  # of the run folder; raised when older readers would misread it
MANIFEST, JOURNAL, SHARDS = "manifest.json", "journal.jsonl", "shards"
_NEEDED = {"status", "config", "model", "data", "template_sha256", "groups", "counts", "parity_error"}
_NEEDED_DONE = {"results", "phase_definition", "timings"}
LAYERS, EXAMPLES = "layers.parquet", "examples.parquet"


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds one run."""

    path: Path

    @classmethod
    def create(cls, path: Path, *, resume: bool = False) -> RunFolder:
        """Makes the folder, or with ``resume`` opens it again if it is there.

        Raises
        ------
        UsageError
            The folder already holds something (and ``resume`` is False), or holds no run to resume.
        RunFolderError
            It cannot be written.
        """
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file: give --out a folder")
        filled = path.is_dir() and any(path.iterdir())
        if filled and not resume:
            raise UsageError(f"{path} is not empty: choose another --out, or --resume the run in it")
        if filled and not (path / MANIFEST).is_file():
            raise UsageError(f"{path} holds no run to resume (no {MANIFEST}): choose another --out")
        with _writing(path):
            (path / SHARDS).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise RunFolderError(f"cannot write {path}: permission denied; choose another --out")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A folder that holds a run already."""
        if not (path / MANIFEST).is_file():
            raise UsageError(f"{path} is not a run folder: it holds no {MANIFEST}")
        return cls(path)

    # -- manifest --------------------------------------------------------------------------------------------

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; empty if there is none yet."""
        path = self.path / MANIFEST
        if not path.is_file():
            return {}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(manifest, dict):
                raise ValueError("not an object")
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"cannot read {path} ({error}): the run cannot be used; start it in a new folder"
            ) from error
        if manifest.get("format") != FORMAT:
            raise RunFolderError(
                f"{path} is of run format {manifest.get('format')}, this version of xprobe reads format {FORMAT}: "
                "use the version that wrote it, or start the run in a new folder"
            )
        return manifest

    def read_run(self) -> dict[str, Any]:
        """The manifest of a run that was started, checked for the entries that every reader relies on."""
        manifest = self.read_manifest()
        missing = sorted((_NEEDED | (_NEEDED_DONE if manifest.get("status") == "done" else set())) - set(manifest))
        if missing:
            lacks = f"{self.path / MANIFEST} lacks {', '.join(missing)}"
            raise RunFolderError(f"{lacks}: the run cannot be used; start it in a new folder")
        return manifest

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        self.write_bytes(MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a file of the folder in one step: readers see the old content or the new, never a part."""
        with _writing(self.path), self._renamed(name) as temporary:
            temporary.write_bytes(content)

    # -- shards ----------------------------------------------------------------------------------------------

    def shard_name(self, group: str) -> str:
        return group.replace("/", ".") + ".safetensors"

    def write_shard(self, group: str, tensors: dict[str, Any], metadata: dict[str, Any]) -> None:
        """Stores one context group (numpy arrays or torch tensors) and enters it in the journal with its checksum."""
        from safetensors.torch import save

        name = self.shard_name(group)
        # one entry: safetensors writes several in an order that changes from process to process
        content = save(_as_torch(tensors), {"xprobe": json.dumps({"group": group, **metadata}, ensure_ascii=False)})
        with _writing(self.path):
            with self._renamed(f"{SHARDS}/{name}") as temporary:
                temporary.write_bytes(content)
            entry = {"shard": name, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            with (self.path / JOURNAL).open("a+", encoding="utf-8", errors="replace") as journal:
                journal.seek(0)
                whole = journal.read()
                cut_off = whole and not whole.endswith("\n")  # the last line of a run that was killed in it
                journal.write("\n" * bool(cut_off) + json.dumps(entry) + "\n")
                journal.flush()
                os.fsync(journal.fileno())

    def finished_shards(self) -> list[str]:
        """Names of shards that the journal knows and whose bytes still have the checksum entered there, in order."""
        entries: dict[str, str] = {}
        path = self.path / JOURNAL
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
            try:
                entry = json.loads(line)
                entries[entry["shard"]] = entry["sha256"]
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a run that was killed while writing it
        return [name for name, sha256 in entries.items() if _checksum(self.path / SHARDS / name) == sha256]

    def holds(self, groups: list[str]) -> bool:
        """Whether every one of ``groups`` has a finished shard."""
        return {self.shard_name(group) for group in groups} <= set(self.finished_shards())

    def read_shard(self, name: str, keys: tuple[str, ...] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays (only ``keys`` if given; bf16 comes back as float32) and metadata of one shard."""
        from safetensors import safe_open

        path = self.path / SHARDS / name
        try:
            with safe_open(path, framework="pt") as handle:
                found = {key: handle.get_tensor(key) for key in (keys or handle.keys())}
                metadata = json.loads(handle.metadata()["xprobe"])
        except Exception as error:  # safetensors raises its own error type, OSError, KeyError
            raise RunFolderError(f"cannot read {path} ({error}): compute it again with --resume") from error
        arrays = {
            key: (t.float() if t.dtype.itemsize == 2 and t.is_floating_point() else t).numpy()
            for key, t in found.items()
        }
        return arrays, metadata

    # -- tables ----------------------------------------------------------------------------------------------

    def write_table(self, name: str, frame: Any) -> None:
        with _writing(self.path), self._renamed(name) as temporary:
            frame.to_parquet(temporary, index=False)

    def read_table(self, name: str) -> Any:
        import pandas as pd

        path = self.path / name
        if not path.is_file():
            raise RunFolderError(f"{self.path} holds no {name}: the run is not finished; continue it with --resume")
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise RunFolderError(f"cannot read {path} ({error}): write it again with --resume") from error

    @contextmanager
    def _renamed(self, name: str) -> Iterator[Path]:
        final = self.path / name
        temporary = final.with_name(f".{final.name}.part")
        try:
            yield temporary
            temporary.replace(final)
        finally:
            temporary.unlink(missing_ok=True)


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
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot write {error.filename or path}: {error.strerror or error}; choose another --out or make room"
        ) from error


def _checksum(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _as_torch(tensors: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(value))
        return value.detach().cpu().contiguous()

    return {name: convert(value) for name, value in tensors.items()}
