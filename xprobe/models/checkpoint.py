"""The safetensors files of a folder. Each tensor is read on demand, and the bytes are counted."""

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
    """Position, dtype and shape of a tensor in a file.

    ``stored[...]`` reads the whole tensor. transformers' loader expects this interface.
    """

    checkpoint: Checkpoint
    name: str
    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: object) -> Tensor:
        if index is not ...:
            raise IndexError(f"a stored tensor can only be read whole: {self.name}[...]")
        return self.checkpoint.read(self.name)


class Checkpoint(Mapping[str, StoredTensor]):
    """The tensors in the safetensors files of a local folder, by name: one file, or shards and their index.

    The constructor reads the headers only. Several threads may call ``read``.

    Attributes
    ----------
    bytes_read : int
        Bytes of the tensors that were read. A tensor that is read twice counts twice.

    Raises
    ------
    ModelError
        The folder has no safetensors, a shard is missing, or a file is damaged, cut off or quantised.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.torch import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"weight": torch.ones(2, 3)}, f"{folder}/model.safetensors")
    ...     checkpoint = Checkpoint(folder)
    ...     print(checkpoint["weight"].shape, checkpoint.bytes_read)
    ...     print(checkpoint.read("weight"), checkpoint.bytes_read)
    (2, 3) 0
    tensor([[1., 1., 1.],
            [1., 1., 1.]]) 24
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._tensors: dict[str, StoredTensor] = {}
        files, indexed = _files(self.folder)
        for file in files:
            for name, dtype, shape, offset in _header(file):
                if name in self._tensors:
                    raise ModelError(
                        f"{self.folder}: tensor {name!r} is in two files, {self._tensors[name].file.name} and "
                        f"{file.name}, and it is unknown which one is right: fetch the checkpoint again"
                    )
                self._tensors[name] = StoredTensor(self, name, file, offset, dtype, shape)
        missing = sorted(indexed - self._tensors.keys())
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
        """Bytes of all tensors without the headers."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Reads the tensor ``name`` and converts it to ``dtype`` (if None, the stored dtype).

        Raises
        ------
        ModelError
            There is no such tensor, the file is shorter than its header says, or it cannot be read.
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
    """Refuses quantised checkpoints.

    Raises
    ------
    ModelError
        ``config`` or its text part has a ``quantization_config`` or a ``compression_config``. The message names the
        method of quantisation.
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
    """The safetensors files of a folder, and the tensor names in its index."""
    if folder.suffix == ".gguf":
        raise ModelError(f"{folder.name} is a GGUF file: block-by-block runs read folders with safetensors")
    if not folder.is_dir():
        raise ModelError(f"no folder at {folder}")
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], set()
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            if any(Path(name).name != name for name in names):
                raise ValueError("it names files outside the folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is damaged ({error}): fetch the checkpoint again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(
                f"{folder} lacks {len(missing)} of the {len(names)} shards that its index names ({missing[0]}, ...)"
            )
        return [folder / name for name in names], set(weight_map)
    file_names = sorted(path.name for path in folder.iterdir())
    for suffixes, what in (((".gguf",), "GGUF files"), (PICKLES, "pickled weights")):
        if names := [name for name in file_names if name.endswith(suffixes)]:
            raise ModelError(
                f"{folder} holds only {what} ({names[0]}): block-by-block runs read safetensors; "
                "load the model whole and save it again with save_pretrained"
            )
    raise ModelError(f"{folder} holds no weights in safetensors format: expected {SINGLE} or {INDEX}")


def _header(file: Path) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], int]]:
    """Yields (name, dtype, shape, offset in the file) of every tensor, and checks its size."""
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError("its header does not fit; perhaps it is a pointer file of git-lfs")
            entries = json.loads(handle.read(length))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            kind, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if kind not in DTYPES:
                raise ModelError(f"{file}: tensor {name!r} is stored as {kind}, which is a quantised format")
            if stop - start != math.prod(shape) * DTYPES[kind].itemsize or start < 0:
                raise ValueError(f"tensor {name!r} has the wrong size")
            if 8 + length + stop > size:
                raise ValueError(f"it ends before the end of tensor {name!r}")
            yield name, DTYPES[kind], shape, 8 + length + start
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is damaged or cut off ({error}): fetch the checkpoint again") from error
