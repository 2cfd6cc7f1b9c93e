"""Signals of one example at every layer, from the lens values at its answer positions (docs/method.md, "Signals")."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Readout(Protocol):
    """Lens values of the gold token at P positions and K layers; each array is [P, K] (``xprobe.lenses.reading``)."""

    @property
    def logit(self) -> NDArray: ...

    @property
    def logsumexp(self) -> NDArray: ...

    @property
    def rank(self) -> NDArray: ...

    @property
    def entropy(self) -> NDArray: ...

    @property
    def kl(self) -> NDArray: ...


def readiness(rank: NDArray, vocab_size: int) -> Floats:
    """``1 - log2(rank) / log2(V)``; NaN where rank is 0 (no value).

    Examples
    --------
    >>> readiness(np.array([1, 4, 256]), 256).tolist()
    [1.0, 0.75, 0.0]
    """
    known = np.where(rank > 0, rank, np.nan).astype(np.float64)
    return 1.0 - np.log2(known) / np.log2(vocab_size)


def example_signals(values: Readout, offsets: NDArray, vocab_size: int) -> dict[str, Floats]:
    """Mean over an example's answer tokens of every signal, [N, L + 1] each.

    Parameters
    ----------
    values : Readout of [P, L + 1] arrays
    offsets : int array [N + 1]
        Example i owns answer positions ``offsets[i]:offsets[i + 1]``; none may be empty.
    vocab_size : int
        V.

    Returns
    -------
    dict of str to float array [N, L + 1]
        readiness (0 to 1), log_probability (nats), rank (1: on top), entropy (nats), kl (nats).

    Examples
    --------
    One answer of two tokens, at two layers:

    >>> from types import SimpleNamespace
    >>> zeros = np.zeros((2, 2))
    >>> readout = SimpleNamespace(logit=zeros, logsumexp=zeros + 1, rank=np.array([[256, 1], [1, 1]]), entropy=zeros,
    ...                           kl=zeros)
    >>> signals = example_signals(readout, np.array([0, 2]), vocab_size=256)
    >>> signals["readiness"].tolist(), signals["log_probability"].tolist()
    ([[0.5, 1.0]], [[-1.0, -1.0]])
    """
    per_token = {
        "readiness": readiness(values.rank, vocab_size),
        "log_probability": values.logit.astype(np.float64) - values.logsumexp,
        "rank": np.where(values.rank > 0, values.rank, np.nan).astype(np.float64),
        "entropy": values.entropy.astype(np.float64),
        "kl": values.kl.astype(np.float64),
    }
    counts = np.diff(offsets)[:, None]
    return {name: np.add.reduceat(token, offsets[:-1], axis=0) / counts for name, token in per_token.items()}
