"""The lens over captured rows: all layers' rows at all answer positions, as many positions at a time as fit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from xprobe_kernels import Unembedding, lens

from xprobe.capture.memory import is_out_of_memory, release_memory
from xprobe.capture.rows import Captured

FIELDS = ("logit", "logsumexp", "rank", "entropy", "kl")
ROW_BYTES = 256 << 20  # of rows that the lens is given at a time


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
        """Whether every row was a number."""
        return bool(np.isfinite(self.logsumexp).all())

    def part(self, start: int, stop: int) -> AnswerReadout:
        """Positions ``start:stop`` alone."""
        return AnswerReadout(**{name: getattr(self, name)[start:stop] for name in FIELDS})


def read_answers(captured: Captured, head: Unembedding, backend: str = "auto") -> AnswerReadout:
    """Reads every layer's rows at the answer positions with the model's own norm and head.

    Where memory runs out it goes on with half as many positions at a time; what a position gives does not depend on
    how many there are.
    """
    layers, positions, width = captured.answers.shape
    step = max(1, ROW_BYTES // (layers * width * 4))
    parts: list[AnswerReadout] = []
    at = 0
    while at < positions:
        try:
            parts.append(_read(captured, slice(at, min(at + step, positions)), head, backend))
            at += step
            continue
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or step == 1:
                raise
        release_memory()
        step = max(1, step // 2)
    return AnswerReadout(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS})


def _read(captured: Captured, some: slice, head: Unembedding, backend: str) -> AnswerReadout:
    rows = captured.answers[:, some]
    layers, positions, width = rows.shape
    final = torch.arange(positions, device=rows.device) + (layers - 1) * positions
    values = lens(
        rows.reshape(layers * positions, width),
        head,
        captured.targets[some].repeat(layers),
        final_rows=final.repeat(layers),
        backend=backend,
    )

    def table(flat: torch.Tensor, dtype: type) -> NDArray:
        return np.ascontiguousarray(flat.reshape(layers, positions).T.cpu().numpy().astype(dtype))

    assert values.kl is not None  # final_rows was given
    return AnswerReadout(
        logit=table(values.logits[:, 0], np.float32),
        logsumexp=table(values.logsumexp, np.float32),
        rank=table(values.rank[:, 0], np.int32),
        entropy=table(values.entropy, np.float32),
        kl=table(values.kl, np.float32),
    )
