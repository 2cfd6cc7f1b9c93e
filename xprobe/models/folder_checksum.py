"""Checksum of a model's folder: it differs for two checkpoints, and reads little of the files of a large one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

# suffixes of weights, configuration, tokenizers, and a model's own code
SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".tiktoken", ".spm", ".vocab", ".py"}
WHOLE = 256 << 20  # bytes: files up to this size are read whole
SPACING = 2 << 20  # bytes from one sampled block of a larger file to the next
BLOCK = 64 << 10  # bytes of a sampled block
_LARGEST_HEADER = 100 << 20  # bytes: the limit of safetensors


def folder_checksum(folder: Path) -> str:
    """SHA-256, in hexadecimal, of the files of a model.

    It covers the name and the size of each file. A file of up to 256 MiB is covered whole. Of a larger one it covers
    64 KiB at the start of every 2 MiB, the last 64 KiB, and in a ``.safetensors`` file 64 KiB from the start of each
    tensor. So a tensor that was trained further is seen. A change of a few values in between is not.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text("{}")
    ...     folder_checksum(Path(folder))[:12]
    'aebaac868b31'
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file()):
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            digest.update(f"{file.name} {size}\n".encode())
            if size <= WHOLE:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
            else:
                _add_blocks(digest, handle, size, file.suffix == ".safetensors")
    return digest.hexdigest()


def _add_blocks(digest: Any, handle: IO[bytes], size: int, safetensors: bool) -> None:
    """Adds the sampled blocks of a file; bytes that two blocks share are read once."""
    starts = {*range(0, size, SPACING), size - BLOCK, *(_tensor_starts(handle, size) if safetensors else ())}
    end = 0  # of what was read
    for start in sorted(starts):
        start, stop = max(start, end), min(start + BLOCK, size)
        if start < stop:
            handle.seek(start)
            digest.update(handle.read(stop - start))
            end = stop


def _tensor_starts(handle: IO[bytes], size: int) -> list[int]:
    """Where each tensor of a safetensors file begins; nothing if its header cannot be read."""
    handle.seek(0)
    length = int.from_bytes(handle.read(8), "little")
    try:
        header = json.loads(handle.read(length)) if length <= _LARGEST_HEADER else {}
        offsets = [int(entry["data_offsets"][0]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return []  # loading the model says what is wrong
    return [start for start in (8 + length + offset for offset in offsets) if 0 <= start < size]
