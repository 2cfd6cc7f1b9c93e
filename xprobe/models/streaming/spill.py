"""Stores hidden states between two blocks: up to a budget in memory, the rest in a temporary file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from xprobe.errors import ModelError


class HiddenStore:
    """Stores one hidden state per pass. Each layer replaces the state of the layer before.

    The file has no name and disappears with the process. It is not memory-mapped, so a full disk leads to an error and
    not to a crash.

    Parameters
    ----------
    budget : int
        Bytes of the device's memory for hidden states.
    folder : Path, optional
        Folder of the file; the system's temporary folder if None.

    Attributes
    ----------
    held : int
        Bytes of the states in memory.
    spilled : int
        Bytes of the states in the file.

    Examples
    --------
    >>> store = HiddenStore(budget=16)
    >>> store.put(0, torch.zeros(1, 1, 4))
    >>> store.put(1, torch.ones(1, 1, 4))
    >>> store.held, store.spilled
    (16, 16)
    >>> store.get(1)
    tensor([[[1., 1., 1., 1.]]])
    >>> store.close()
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget, self.folder = budget, folder
        self.held = self.spilled = 0
        self._memory: dict[int, Tensor] = {}
        self._slots: dict[int, tuple[int, int]] = {}  # key -> offset and size of its slot in the file
        self._shapes: dict[int, tuple[torch.dtype, torch.Size, torch.device]] = {}
        self._file: IO[bytes] | None = None

    def put(self, key: int, hidden: Tensor) -> None:
        """Stores ``hidden`` under ``key`` and replaces the previous state.

        Raises
        ------
        ModelError
            The file cannot be created or written.
        """
        size = hidden.nbytes
        if key in self._memory or (key not in self._slots and self.held + size <= self.budget):
            before = self._memory.get(key)
            self.held += size - (0 if before is None else before.nbytes)
            self._memory[key] = hidden
            return
        if key not in self._slots or self._slots[key][1] < size:
            self._slots[key] = (self.spilled, size)
            self.spilled += size
        self._shapes[key] = (hidden.dtype, hidden.shape, hidden.device)
        raw = hidden.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0, prefix="xprobe-")  # noqa: SIM115
            self._file.seek(self._slots[key][0])
            rest = memoryview(raw.numpy().data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise ModelError(
                f"cannot keep hidden states in {self.folder or tempfile.gettempdir()}: {error.strerror or error}; name "
                "a folder with more space, or give them more memory"
            ) from error

    def get(self, key: int) -> Tensor:
        """The last state under ``key``, on its original device.

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
            self._file.seek(self._slots[key][0])
            while rest:
                count = self._file.readinto(rest)  # type: ignore[attr-defined]
                if not count:
                    raise OSError("the file of hidden states was cut off")
                rest = rest[count:]
        except OSError as error:
            raise ModelError(f"cannot read hidden states back: {error.strerror or error}") from error
        return raw.view(dtype).reshape(shape).to(device)

    def drop(self, key: int) -> None:
        """Frees the memory of ``key``. The state is then gone; space in the file stays taken."""
        if (before := self._memory.pop(key, None)) is not None:
            self.held -= before.nbytes

    def close(self) -> None:
        """Frees the memory and deletes the file."""
        self._memory.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
