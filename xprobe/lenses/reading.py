"""The lens over captured rows: all layers and answer positions, in parts that fit into memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xprobe_kernels import Unembedding, lens
from xprobe_kernels.transfer import HostCopy

from xprobe.capture.memory import is_out_of_memory, release_memory
from xprobe.lenses.transport import Transport

FIELDS = ("logit", "logsumexp", "rank", "entropy", "kl")
ROW_BYTES = 256 << 20  # most bytes of rows in one call of the lens


@dataclass(frozen=True, eq=False)
class AnswerReadout:
    """Lens values of the gold token at P answer positions and all layers; each array is [P, L + 1].

    ``logit``, ``logsumexp``, ``entropy`` and ``kl`` (KL(final layer || layer)) are float32 in nats; ``rank`` is int32.
    """

    logit: NDArray[np.float32]
    logsumexp: NDArray[np.float32]
    rank: NDArray[np.int32]
    entropy: NDArray[np.float32]
    kl: NDArray[np.float32]

    @property
    def finite(self) -> bool:
        """Whether no row had NaN or infinity."""
        return bool(np.isfinite(self.logsumexp).all())

    def part(self, start: int, stop: int) -> AnswerReadout:
        """The values of the positions ``start`` to ``stop - 1``."""
        return AnswerReadout(**{name: getattr(self, name)[start:stop] for name in FIELDS})


class Reading:
    """Lens values that a device computes. ``start_reading`` starts the work, ``values`` waits for it."""

    def __init__(self, parts: list[HostCopy], layers: int) -> None:
        self._parts, self._layers = parts, layers

    def values(self) -> AnswerReadout:
        """Waits for the device and returns the values."""
        parts = [part.wait() for part in self._parts]
        tables = {name: [self._table(part[name]) for part in parts] for name in FIELDS}
        return AnswerReadout(**{name: np.concatenate(pieces) for name, pieces in tables.items()})

    def _table(self, flat: torch.Tensor) -> NDArray:
        dtype = np.int32 if flat.dtype == torch.int64 else np.float32
        return np.ascontiguousarray(flat.reshape(self._layers, -1).T.numpy().astype(dtype))


def read_answers(
    rows: Tensor, targets: Tensor, head: Unembedding, backend: str = "auto", transport: Transport | None = None
) -> AnswerReadout:
    """Runs the lens over every layer's row at every answer position, with the model's own norm and head.

    Parameters
    ----------
    rows : Tensor [L + 1, P, D]
        Hidden rows before the final norm.
    targets : Tensor [P], int64
        The gold token that follows each position.
    head : Unembedding
    backend : str
        ``auto`` or one of ``xprobe_kernels.available_backends()``.
    transport : Transport, optional
        Maps of another lens than the logit lens, applied before the norm.

    Examples
    --------
    >>> head = Unembedding(torch.eye(4), norm="none")
    >>> rows = torch.tensor([[[0.0, 1.0, 2.0, 3.0]], [[3.0, 2.0, 1.0, 0.0]]])  # two layers, one position
    >>> read_answers(rows, torch.tensor([3]), head).rank.tolist()
    [[1, 4]]
    """
    return start_reading(rows, targets, head, backend, transport).values()


def start_reading(
    rows: Tensor, targets: Tensor, head: Unembedding, backend: str = "auto", transport: Transport | None = None
) -> Reading:
    """Starts the work of ``read_answers``. It does not wait for a GPU; on a CPU the work is done on return.

    If memory runs out, it continues with half as many positions at a time. The values of a position do not depend on
    this number.
    """
    layers, positions, width = rows.shape
    step = max(1, ROW_BYTES // (layers * width * 4))
    parts: list[HostCopy] = []
    start = 0
    while start < positions:
        part = slice(start, min(start + step, positions))
        try:
            parts.append(_start(rows[:, part], targets[part], head, backend, transport))
            start += step
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or step == 1:
                raise
        release_memory()
        step = max(1, step // 2)
    return Reading(parts, layers)


def _start(rows: Tensor, targets: Tensor, head: Unembedding, backend: str, transport: Transport | None) -> HostCopy:
    device = head.weight.device
    rows = rows.to(device)  # rows of a streamed model are in a file
    if transport is not None:
        rows = transport.apply(rows)
    layers, positions, width = rows.shape
    final = torch.arange(positions) + (layers - 1) * positions
    values = lens(
        rows.reshape(layers * positions, width),
        head,
        targets.to(device).repeat(layers),
        final_rows=final.repeat(layers),
        backend=backend,
        check=device.type != "cuda",  # the check would wait for the device; the caller has checked the ids
    )
    assert values.kl is not None  # final_rows was given
    fields = {"logit": values.logits[:, 0], "logsumexp": values.logsumexp, "rank": values.rank[:, 0]}
    return HostCopy(fields | {"entropy": values.entropy, "kl": values.kl})
