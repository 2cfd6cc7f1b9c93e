"""A folder's safetensors as tensors on demand: each is read when it is asked for, and every byte is counted."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xprobe.errors import ModelError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = (".bin", ".pt", ".pth")


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Where a tensor lies in a file. ``stored[...]`` reads all of it, as transformers' loader expects of a slice."""

    checkpoint: Checkpoint
    name: str
    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: object) -> Tensor:
        if index is not ...:
            raise IndexError(f"a stored tensor is read whole: {self.name}[...]")
        return self.checkpoint.read(self.name)


class Checkpoint(Mapping[str, StoredTensor]):
    """The tensors of a local folder in safetensors format, by name; one file, or shards and their index.

    Only headers are read when it is opened. ``read`` may be called from several threads.

    Attributes
    ----------
    bytes_read : int
        Bytes of tensors read so far; a tensor that is read twice counts twice.

    Raises
    ------
    ModelError
        No safetensors (pickles and GGUF files are named as such), a missing shard, or a file that is damaged, cut off
        or quantised.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._tensors: dict[str, StoredTensor] = {}
        files, promised = _files(self.folder)
        for file in files:
            for name, dtype, shape, offset in _header(file):
                if name in self._tensors:
                    raise ModelError(
                        f"{self.folder}: tensor {name!r} is in two files, {self._tensors[name].file.name} and "
                        f"{file.name}: which of them counts is not known, so fetch the checkpoint again"
                    )
                self._tensors[name] = StoredTensor(self, name, file, offset, dtype, shape)
        missing = sorted(promised - self._tensors.keys())
        if missing:
            raise ModelError(
                f"{self.folder / INDEX} names {len(missing)} tensors that its files do not hold ({missing[0]}, ...): "
                "fetch the checkpoint again"
            )

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor ``name`` in memory of its own, in its stored dtype unless told otherwise.

        Raises
        ------
        ModelError
            No such tensor, or the file changed or failed since it was opened.
        """
        if name not in self._tensors:
            raise ModelError(f"{self.folder} holds no tensor {name!r}")
        stored = self._tensors[name]
        raw = torch.empty(stored.nbytes, dtype=torch.uint8)
        rest = memoryview(raw.numpy().data)
        try:
            with stored.file.open("rb", buffering=0) as handle:
                handle.seek(stored.offset)
                while rest:
                    count = handle.readinto(rest)
                    if not count:
                        raise ModelError(f"{stored.file} ends inside tensor {name!r}: fetch the checkpoint again")
                    rest = rest[count:]
        except OSError as error:
            raise ModelError(f"cannot read {stored.file}: {error.strerror or error}") from error
        with self._lock:
            self.bytes_read += stored.nbytes
        tensor = raw.view(stored.dtype).reshape(stored.shape)
        return tensor if dtype is None else tensor.to(dtype)


def check_plain(config: Any, name: str) -> None:
    """Refuses quantised checkpoints by the method's name.

    Raises
    ------
    ModelError
        ``config`` or its text part has a ``quantization_config`` or a ``compression_config``.
    """
    for part in (config, config.get_text_config(decoder=True)):
        for key in ("quantization_config", "compression_config"):
            quantised = getattr(part, key, None)
            if quantised:
                settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
                raise ModelError(
                    f"{name} is a quantised checkpoint ({settings.get('quant_method', 'method not named')}): the lens "
                    "needs plain weights, so use the original model"
                )


def _files(folder: Path) -> tuple[list[Path], set[str]]:
    """The safetensors files of a folder, and the tensor names that an index promises."""
    if folder.suffix == ".gguf":
        raise ModelError(f"{folder.name} is a GGUF file: block-by-block runs read folders with safetensors")
    if not folder.is_dir():
        raise ModelError(f"no folder at {folder}")
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], set()
    index = folder / INDEX
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(places.values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("it names files outside the folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is damaged ({error}): fetch the checkpoint again") from error
        lacking = [name for name in names if not (folder / name).is_file()]
        if lacking:
            raise ModelError(
                f"{folder} lacks {len(lacking)} of the {len(names)} shards that its index names ({lacking[0]}, ...)"
            )
        return [folder / name for name in names], set(places)
    found = sorted(path.name for path in folder.iterdir())
    for suffixes, what in (((".gguf",), "GGUF files"), (PICKLES, "pickled weights")):
        if names := [name for name in found if name.endswith(suffixes)]:
            raise ModelError(
                f"{folder} holds only {what} ({names[0]}): block-by-block runs read safetensors; "
                "load the model whole and save it again with save_pretrained"
            )
    raise ModelError(f"{folder} holds no weights in safetensors format: expected {SINGLE} or {INDEX}")


def _header(file: Path) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], int]]:
    """(name, dtype, shape, offset in the file) of every tensor; sizes are checked against the file's."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError("its header does not fit; a pointer file of git-lfs, perhaps")
            entries = json.loads(handle.read(length))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if kind not in DTYPES:
                raise ModelError(f"{file}: tensor {name!r} is stored as {kind}, which is a quantised format")
            if stop - start != math.prod(shape) * DTYPES[kind].itemsize or start < 0:
                raise ValueError(f"tensor {name!r} does not have its size")
            if 8 + length + stop > size:
                raise ValueError(f"it ends before the end of tensor {name!r}")
            yield name, DTYPES[kind], shape, 8 + length + start
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is damaged or cut off ({error}): fetch the checkpoint again") from error
