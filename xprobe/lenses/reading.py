"""The lens over captured rows: all layers and answer positions, in parts that fit into memory."""

from __future__ import annotations

from collections.abc import Callable
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
    return Reading(
        _in_parts(rows, lambda part: _start(rows[:, part], targets[part], head, backend, transport)), len(rows)
    )


@dataclass(frozen=True, eq=False)
class TopReadout:
    """The most probable token of N rows at all layers, and log-probabilities of given tokens.

    ``top`` is int64 [N, L + 1]; ``log_probability`` is float32 [N, L + 1, A], in nats, NaN where nothing was looked up.
    """

    top: NDArray[np.int64]
    log_probability: NDArray[np.float32]


def read_top(
    rows: Tensor, lookup: Tensor, head: Unembedding, backend: str = "auto", transport: Transport | None = None
) -> TopReadout:
    """Runs the lens over every layer's row of N positions: the top token, and the log-probabilities of A given ones.

    Parameters
    ----------
    rows : Tensor [L + 1, N, D]
        Hidden rows before the final norm.
    lookup : Tensor [N, A], int64
        Tokens to look up in each row; -1 looks up nothing.
    head, backend, transport
        As ``read_answers`` takes them.

    Examples
    --------
    >>> head = Unembedding(torch.eye(2), norm="none")
    >>> rows = torch.tensor([[[0.25, 0.75]], [[0.5, 0.5]]]).log()  # two layers, one position
    >>> found = read_top(rows, torch.tensor([[0, -1]]), head)
    >>> found.top.tolist(), np.exp(found.log_probability[..., 0]).round(3).tolist()
    ([[1, 0]], [[0.25, 0.5]])
    """
    layers, count = len(rows), lookup.shape[1]
    parts = [
        part.wait()
        for part in _in_parts(rows, lambda part: _start_top(rows[:, part], lookup[part], head, backend, transport))
    ]
    top = [part["top"].reshape(layers, -1).T.numpy() for part in parts]
    looked_up = [part["log_probability"].reshape(layers, -1, count).transpose(0, 1).numpy() for part in parts]
    return TopReadout(np.concatenate(top), np.concatenate(looked_up).astype(np.float32))


def _in_parts(rows: Tensor, start_part: Callable[[slice], HostCopy]) -> list[HostCopy]:
    """Starts a call of the lens for every part of the positions. Parts are halved where memory runs out."""
    layers, positions, width = rows.shape
    step = max(1, ROW_BYTES // (layers * width * 4))
    parts: list[HostCopy] = []
    start = 0
    while start < positions:
        try:
            parts.append(start_part(slice(start, min(start + step, positions))))
            start += step
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or step == 1:
                raise
        release_memory()
        step = max(1, step // 2)
    return parts


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


def _start_top(rows: Tensor, lookup: Tensor, head: Unembedding, backend: str, transport: Transport | None) -> HostCopy:
    device = head.weight.device
    rows = rows.to(device)
    if transport is not None:
        rows = transport.apply(rows)
    layers, positions, width = rows.shape
    values = lens(
        rows.reshape(layers * positions, width),
        head,
        lookup.to(device).repeat(layers, 1),
        top_k=1,
        backend=backend,
        check=device.type != "cuda",
    )
    assert values.top_ids is not None  # top_k was given
    return HostCopy({"top": values.top_ids[:, 0], "log_probability": values.log_probability})
