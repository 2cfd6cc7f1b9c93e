"""The run folder: manifest, journal, checksummed shards, tables. docs/run-folder.md describes it for readers.

A run that is stopped at any moment, by SIGKILL or by the power, leaves whole files. Each is written under a temporary
name, synced to the disk, renamed, and its folder synced; only then is a shard entered in the journal, which is synced
too. So the journal never knows more than the disk holds, and what it knows has a checksum.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from xprobe.disk import checksum, make_folder, sync, writing
from xprobe.errors import RunFolderError, UsageError
from xprobe.lock import LOCK

FORMAT = 1  # of the run folder; raised when older readers would misread it
MANIFEST, JOURNAL, SHARDS = "manifest.json", "journal.jsonl", "shards"
LAYERS, EXAMPLES, PROBE_TABLE = "layers.parquet", "examples.parquet", "probes.parquet"
MAY_CHANGE = ("batch_tokens", "model", "data")  # of the configuration on resume; the bytes of model and data may not
_NEEDED: dict[str, type | tuple[type, ...]] = {
    "status": str, "config": dict, "model": dict, "data": dict, "template_sha256": str, "groups": list,
    "counts": dict, "left_out": dict, "parity_error": (int, float),
}  # fmt: skip
_NEEDED_DONE: dict[str, type | tuple[type, ...]] = {"results": dict, "phase_definition": int, "timings": dict}
_SELF = "sha256"  # entry of the manifest: checksum of all the others
ROWS = ".rows-"  # beginning of the name that a file of hidden rows has before it loses it
_PART = ".{}.part"  # temporary name of a file that is being written


@dataclass(frozen=True)
class RunFolder:
    """A folder that holds one run."""

    path: Path

    @staticmethod
    def check(path: Path, *, resume: bool = False) -> None:
        """Raises the UsageError of ``create`` without making anything."""
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file: give --out a folder")
        filled = holds_something(path)
        if filled and not resume:
            raise UsageError(f"{path} is not empty: choose another --out, or --resume the run in it")
        if filled and not (path / MANIFEST).is_file():
            raise UsageError(f"{path} holds no run to resume (no {MANIFEST}): choose another --out")

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
        cls.check(path, resume=resume)
        with writing(path):
            make_folder(path / SHARDS)
            sync(path)
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
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(
                f"cannot read {path} ({error}): the run cannot be used; start it in a new folder"
            ) from error
        if type(manifest.get("format")) is not int or manifest["format"] != FORMAT:
            raise RunFolderError(
                f"{path} is of run format {manifest.get('format')}, this version of xprobe reads format {FORMAT}: "
                "use the version that wrote it, or start the run in a new folder"
            )
        manifest.pop(_SELF, None)
        return manifest

    def read_run(self) -> dict[str, Any]:
        """The manifest of a run that was started, checked for the entries that every reader relies on."""
        manifest = self.read_manifest()
        done = manifest.get("status") == "done"
        needed = _NEEDED | (_NEEDED_DONE if done else {})
        if not done and manifest.get("parity_error", 0) is None:  # block by block it is known at the end of the sweep
            needed = {name: kind for name, kind in needed.items() if name != "parity_error"}
        missing = sorted(set(needed) - set(manifest))
        wrong = sorted(name for name in set(needed) - set(missing) if not isinstance(manifest[name], needed[name]))
        if not missing and not wrong and not all(isinstance(group, str) for group in manifest["groups"]):
            wrong = ["groups"]
        if missing or wrong:
            reasons = [f"lacks {', '.join(missing)}"] * bool(missing)
            reasons += [f"holds something else than expected as {', '.join(wrong)}"] * bool(wrong)
            what = f"{self.path / MANIFEST} {' and '.join(reasons)}"
            raise RunFolderError(f"{what}: the run cannot be used; start it in a new folder")
        return manifest

    def manifest_is_untouched(self) -> bool:
        """Whether the manifest still has the checksum that it was written with."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            return manifest.pop(_SELF) == _own_checksum(manifest)
        except (OSError, ValueError, RecursionError, AttributeError, KeyError):
            return False

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        manifest = json.loads(json.dumps(manifest))  # as readers will see it
        manifest[_SELF] = _own_checksum(manifest)
        self.__dict__.pop("_run_key", None)
        self.write_bytes(MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())

    @cached_property
    def _run_key(self) -> str:
        """What the shards of this run depend on, in one checksum: journal lines of another run are not believed."""
        manifest = self.read_manifest()
        parts = {name: dict(manifest.get(name) or {}) for name in ("config", "model", "data")}
        values = {
            "config": {name: value for name, value in parts["config"].items() if name not in MAY_CHANGE},
            "model": parts["model"].get("files_sha256"),
            "data": parts["data"].get("files_sha256"),
            "template": manifest.get("template_sha256"),
        }
        return _own_checksum(values)

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a file of the folder in one step: readers see the old content or the new, never a part."""
        with writing(self.path), self._renamed(name) as temporary:
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
        with writing(self.path):
            with self._renamed(f"{SHARDS}/{name}") as temporary:
                temporary.write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            self._enter({"shard": name, "sha256": digest, "bytes": len(content), "run": self._run_key})

    def _enter(self, entry: dict[str, Any]) -> None:
        """Appends a line to the journal and waits until the disk has it."""
        path = self.path / JOURNAL
        new = not path.exists()
        with path.open("ab+", buffering=0) as journal:
            if journal.seek(0, os.SEEK_END):
                journal.seek(-1, os.SEEK_END)
                new_line = b"" if journal.read(1) == b"\n" else b"\n"  # after the last line of a run killed in it
            else:
                new_line = b""
            line = new_line + json.dumps(entry).encode() + b"\n"
            while line:
                line = line[os.write(journal.fileno(), line) :]
            os.fsync(journal.fileno())
        if new:
            sync(self.path)

    def _entries(self) -> dict[str, dict[str, Any]]:
        """The journal's last line on each shard of this run; lines that are damaged or of another run left out."""
        entries: dict[str, dict[str, Any]] = {}
        path = self.path / JOURNAL
        for line in path.read_bytes().split(b"\n") if path.is_file() else []:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue  # cut off where a run was killed while writing it
            if isinstance(entry, dict) and isinstance(entry.get("shard"), str) and entry.get("run") == self._run_key:
                entries[entry["shard"]] = entry
        return entries

    def finished_shards(self) -> list[str]:
        """Names of shards that the journal knows and whose bytes still have the checksum entered there, in order."""
        entries = self._entries()
        return [name for name in entries if checksum(self.path / SHARDS / name) == entries[name].get("sha256", "")]

    def tidy(self, groups: list[str]) -> None:
        """Leaves the folder as a run that nobody interrupted leaves it.

        Removes what a killed process left of files, and rewrites the journal: one line per group, in this order.
        Only for the process that holds the folder's lock.
        """
        with writing(self.path):
            for folder in (self.path, self.path / SHARDS):
                for part in [*folder.glob(_PART.format("*")), *folder.glob(f"{ROWS}*")]:
                    part.unlink()
            entries = self._entries()
            names = [self.shard_name(group) for group in groups]
            lines = "".join(json.dumps(entries[name]) + "\n" for name in names if name in entries).encode()
            if (self.path / JOURNAL).read_bytes() != lines:
                self.write_bytes(JOURNAL, lines)

    def holds(self, groups: list[str]) -> bool:
        """Whether every one of ``groups`` has a finished shard."""
        return {self.shard_name(group) for group in groups} <= set(self.finished_shards())

    def read_shard(self, name: str, keys: tuple[str, ...] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays (only ``keys`` if given; bf16 comes back as float32) and metadata of one shard."""
        with self._opened(name) as handle:
            found = {key: handle.get_tensor(key) for key in (keys or handle.keys())}
            metadata = json.loads(handle.metadata()["xprobe"])
        arrays = {
            key: (t.float() if t.dtype.itemsize == 2 and t.is_floating_point() else t).numpy()
            for key, t in found.items()
        }
        return arrays, metadata

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        from safetensors import safe_open

        path = self.path / SHARDS / name
        try:
            with safe_open(path, framework="pt") as handle:
                yield handle
        except Exception as error:  # safetensors raises its own error type, OSError, KeyError
            raise RunFolderError(f"cannot read {path} ({error}): compute it again with --resume") from error

    def read_layers(self, name: str, key: str, layers: range) -> Any:
        """Layers of one array [N, K, D] of a shard as float32 [N, len(layers), D]; nothing else of it is read."""
        with self._opened(name) as handle:
            return handle.get_slice(key)[:, layers.start : layers.stop].float().numpy()

    # -- tables ----------------------------------------------------------------------------------------------

    def write_table(self, name: str, frame: Any) -> None:
        with writing(self.path), self._renamed(name) as temporary:
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
        """A temporary name to write to; what is there in the end is on the disk under its own name."""
        final = self.path / name
        temporary = final.with_name(_PART.format(final.name))
        try:
            yield temporary
            sync(temporary)  # before the renaming: a name must never stand for bytes that the disk does not have
            temporary.replace(final)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(final.parent)


def holds_something(path: Path) -> bool:
    """Whether ``path`` is a folder with more in it than a run that was killed before its first file was whole."""
    if not path.is_dir():
        return False
    nothing = {LOCK, _PART.format(MANIFEST)}
    rest = [entry for entry in path.iterdir() if entry.name not in nothing]
    return any(entry.name != SHARDS or not entry.is_dir() or any(entry.iterdir()) for entry in rest)


def _own_checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _as_torch(tensors: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(value))
        return value.detach().cpu().contiguous()

    return {name: convert(value) for name, value in tensors.items()}
