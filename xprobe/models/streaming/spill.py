"""Hidden states between two blocks: in memory up to a budget, the rest in a file that vanishes with the process."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from xprobe.errors import ModelError


class HiddenStore:
    """One hidden state per pass, replaced layer after layer.

    What does not fit into ``budget`` bytes of the device's memory goes to an unnamed file in ``folder`` (the system's
    temporary folder if None). The file is read and written, not mapped: a full disk is then an error, not a crash.

    Attributes
    ----------
    held, spilled : int
        Bytes of the states in memory, and in the file.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget, self.folder = budget, folder
        self.held = self.spilled = 0
        self._memory: dict[int, Tensor] = {}
        self._places: dict[int, tuple[int, int]] = {}  # key -> offset and room in the file
        self._shapes: dict[int, tuple[torch.dtype, torch.Size, torch.device]] = {}
        self._file: IO[bytes] | None = None

    def put(self, key: int, hidden: Tensor) -> None:
        """Keeps ``hidden`` under ``key`` in place of what was there.

        Raises
        ------
        ModelError
            The file cannot be made or written.
        """
        size = hidden.nbytes
        if key in self._memory or (key not in self._places and self.held + size <= self.budget):
            before = self._memory.get(key)
            self.held += size - (0 if before is None else before.nbytes)
            self._memory[key] = hidden
            return
        if key not in self._places or self._places[key][1] < size:
            self._places[key] = (self.spilled, size)
            self.spilled += size
        self._shapes[key] = (hidden.dtype, hidden.shape, hidden.device)
        raw = hidden.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0, prefix="xprobe-")  # noqa: SIM115
            self._file.seek(self._places[key][0])
            rest = memoryview(raw.numpy().data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise ModelError(
                f"cannot keep hidden states in {self.folder or tempfile.gettempdir()}: {error.strerror or error}; name "
                "a folder with more room, or give them more memory"
            ) from error

    def get(self, key: int) -> Tensor:
        """What was put last under ``key``, on the device it came from.

        Raises
        ------
        ModelError
            The file cannot be read back.
        """
        if key in self._memory:
            return self._memory[key]
        dtype, shape, device = self._shapes[key]
        raw = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        rest = memoryview(raw.numpy().data)
        assert self._file is not None
        try:
            self._file.seek(self._places[key][0])
            while rest:
                count = self._file.readinto(rest)  # type: ignore[attr-defined]
                if not count:
                    raise OSError("the file of hidden states was cut off")
                rest = rest[count:]
        except OSError as error:
            raise ModelError(f"cannot read hidden states back: {error.strerror or error}") from error
        return raw.view(dtype).reshape(shape).to(device)

    def drop(self, key: int) -> None:
        """Forgets ``key``: nothing will ask for it again."""
        if (before := self._memory.pop(key, None)) is not None:
            self.held -= before.nbytes

    def close(self) -> None:
        """Gives memory and file back."""
        self._memory.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
