"""The lens over a captured group: one call for all layers' rows at all answer positions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from xprobe_kernels import Unembedding, lens

from xprobe.capture.engine import Captured

FIELDS = ("logit", "logsumexp", "rank", "entropy", "kl")


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


def read_answers(captured: Captured, head: Unembedding, backend: str = "auto") -> AnswerReadout:
    """Reads every layer's rows at the answer positions with the model's own norm and head."""
    layers, positions, width = captured.answers.shape
    device = captured.answers.device
    final = torch.arange(positions, device=device) + (layers - 1) * positions
    values = lens(
        captured.answers.reshape(layers * positions, width),
        head,
        captured.targets.repeat(layers),
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
