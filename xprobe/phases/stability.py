"""How far the languages of a question agree on its phases: S(l) per layer, with paragraph-bootstrap intervals."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xprobe.phases.bootstrap import ClusterBootstrap

Floats = NDArray[np.float64]


def in_phase_two(onset: Floats, n_layers: int) -> Floats:
    """1 where layer >= onset, 0 below, NaN without an onset; [N, n_layers] from onsets [N]."""
    layers = np.arange(n_layers)
    return np.where(np.isnan(onset)[:, None], np.nan, (layers >= onset[:, None]).astype(np.float64))


def pairwise_agreement(phase: Floats, questions: NDArray) -> tuple[Floats, NDArray[np.int64]]:
    """``A_g(l) = 1 - 2 n m (1 - m) / (n - 1)`` for every question g with n >= 2 languages.

    Parameters
    ----------
    phase : array [N, K]
        ``in_phase_two``; rows of NaN (no onset) do not count towards n.
    questions : array [N]
        Question of each example.

    Returns
    -------
    agreement : array [G, K]
        Chance that two languages of a question drawn at random put layer l in the same phase.
    first : int array [G]
        Index of one example of each question (for its paragraph).
    """
    _, first, codes = np.unique(questions, return_index=True, return_inverse=True)
    known = ~np.isnan(phase[:, 0]) if len(phase) else np.zeros(0, bool)
    n = np.bincount(codes[known], minlength=len(first)).astype(np.float64)
    in_two = np.zeros((len(first), phase.shape[1]))
    np.add.at(in_two, codes[known], phase[known])
    enough = n >= 2
    n, in_two, first = n[enough, None], in_two[enough], first[enough]
    m = in_two / n
    return 1 - 2 * n * m * (1 - m) / (n - 1), first


def layer_stability(
    onset: Floats, questions: NDArray, n_layers: int, bootstrap: ClusterBootstrap
) -> tuple[Floats, Floats, Floats, NDArray[np.int64]]:
    """S(l), the mean of A_g(l) over questions, with 95 % intervals: (value, lo, hi, number of questions), each [K]."""
    agreement, first = pairwise_agreement(in_phase_two(onset, n_layers), questions)
    return bootstrap.mean(agreement, first)


def agreement_with(
    reference: str, onset: Floats, questions: NDArray, languages: NDArray, n_layers: int, bootstrap: ClusterBootstrap
) -> dict[str, tuple[Floats, Floats, Floats, NDArray[np.int64]]]:
    """Per language, the share of questions that it and ``reference`` put in the same phase, layer by layer."""
    phase = in_phase_two(onset, n_layers)
    theirs = {questions[i]: i for i in np.flatnonzero(languages == reference)}
    result = {}
    for language in dict.fromkeys(languages.tolist()):
        mine = np.array([i for i in np.flatnonzero(languages == language) if questions[i] in theirs], dtype=np.int64)
        if language == reference or not len(mine):
            continue
        other = np.array([theirs[questions[i]] for i in mine])
        same = np.where(np.isnan(phase[mine] + phase[other]), np.nan, phase[mine] == phase[other])
        result[language] = bootstrap.mean(same, mine)
    return result
