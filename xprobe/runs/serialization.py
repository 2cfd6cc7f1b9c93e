"""Shard files: named arrays and a header, in the format of safetensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xprobe.runs.disk import checksum, replacing

UNFINISHED = (".tmp*",)  # names that safetensors gives to files that it is writing
WRITERS = 4  # threads that write shards: most of their time they wait for the disk


@dataclass(frozen=True, eq=False)
class Shard:
    """What is stored of one context group: ``tensors`` (numpy arrays or torch tensors by name) and a header.

    ``metadata`` are plain values for JSON.
    """

    group: str
    tensors: dict[str, Any]
    metadata: dict[str, Any]

    def write(self, path: Path) -> None:
        """Writes the file. Tensors go to it without a copy of the whole content in between."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        header = {"group": self.group, **self.metadata}
        try:
            # one entry: safetensors writes several in an order that changes from process to process
            save_file(_as_torch(self.tensors), path, {"xprobe": json.dumps(header, ensure_ascii=False)})
        except SafetensorError as error:
            code = re.search(r"\(os error (\d+)\)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


class ShardFile:
    """An open shard file."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[ShardFile]:
        """The file at ``path``, as long as the block runs. Errors are those of safetensors."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as handle:
            yield cls(handle)

    def read(self, keys: tuple[str, ...] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays (only ``keys`` if given; bf16 comes back as float32) and metadata."""
        tensors = {key: self._handle.get_tensor(key) for key in (keys or self._handle.keys())}
        arrays = {
            key: (tensor.float() if tensor.dtype.itemsize == 2 and tensor.is_floating_point() else tensor).numpy()
            for key, tensor in tensors.items()
        }
        return arrays, json.loads(self._handle.metadata()["xprobe"])

    def row_shape(self, key: str) -> tuple[int, ...]:
        """Shape of one example in an array."""
        return tuple(self._handle.get_slice(key).get_shape()[1:])

    def dtype(self, key: str) -> str | None:
        """Name of an array's dtype as torch writes it; None if there is no such array."""
        if key not in self._handle.keys():  # noqa: SIM118 - the handle is no mapping
            return None
        return str(self._handle.get_slice(key)[:0].dtype).removeprefix("torch.")

    def layers(self, key: str, layers: range) -> Any:
        """Layers of an array [N, K, D] as float32 [N, len(layers), D]; nothing else of it is read."""
        return self._handle.get_slice(key)[:, layers.start : layers.stop].float().numpy()


def write_files(
    shards: Sequence[Shard], paths: Sequence[Path]
) -> tuple[dict[Shard, dict[str, Any]], list[BaseException]]:
    """Writes shards side by side, each synced and under its final name; the caller syncs their folder.

    Returns
    -------
    files : dict
        Name, SHA-256 and size in bytes of each shard that was written, for the journal.
    errors : list of exceptions
        Why the other ones were not.
    """

    def write(shard: Shard, path: Path) -> dict[str, Any]:
        with replacing(path, sync_folder=False) as temporary:
            shard.write(temporary)
            return {"shard": path.name, "sha256": checksum(temporary), "bytes": temporary.stat().st_size}

    with ThreadPoolExecutor(WRITERS, "xprobe-shard") as pool:
        tasks = [pool.submit(write, shard, path) for shard, path in zip(shards, paths, strict=True)]
    errors = [error for error in (task.exception() for task in tasks) if error is not None]
    return {shard: task.result() for shard, task in zip(shards, tasks, strict=True) if task.exception() is None}, errors


def _as_torch(tensors: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(np.ascontiguousarray(value))
        return value.detach().cpu().contiguous()

    return {name: convert(value) for name, value in tensors.items()}
