"""How far the languages of a question agree on its phases: S(l) per layer, with paragraph-bootstrap intervals."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xprobe.phases.bootstrap import ClusterBootstrap

Floats = NDArray[np.float64]


def in_phase_two(onset: Floats, n_layers: int) -> Floats:
    """1 where layer >= onset, 0 below, NaN without an onset; [N, n_layers] from onsets [N].

    Examples
    --------
    >>> in_phase_two(np.array([2.0, np.nan]), 4).tolist()
    [[0.0, 0.0, 1.0, 1.0], [nan, nan, nan, nan]]
    """
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

    Examples
    --------
    Three languages of one question; one of them finds the answer a layer later, at layer 3:

    >>> phase = in_phase_two(np.array([2.0, 2.0, 3.0]), 5)
    >>> agreement, _ = pairwise_agreement(phase, np.array(["g", "g", "g"]))
    >>> agreement.round(2).tolist()
    [[1.0, 1.0, 0.33, 1.0, 1.0]]
    """
    _, first, codes = np.unique(questions, return_index=True, return_inverse=True)
    known = ~np.isnan(phase[:, 0]) if len(phase) else np.zeros(0, bool)
    n = np.bincount(codes[known], minlength=len(first)).astype(np.float64)
    count = np.zeros((len(first), phase.shape[1]))
    np.add.at(count, codes[known], phase[known])
    enough = n >= 2
    n, count, first = n[enough, None], count[enough], first[enough]
    m = count / n
    return 1 - 2 * n * m * (1 - m) / (n - 1), first


def layer_stability(
    onset: Floats, questions: NDArray, n_layers: int, bootstrap: ClusterBootstrap
) -> tuple[Floats, Floats, Floats, NDArray[np.int64]]:
    """S(l), the mean of A_g(l) over questions, with 95 % intervals.

    Parameters
    ----------
    onset : float array [N]
        Retrieval onset of each example; NaN where there is none.
    questions : array [N]
    n_layers : int
        K.
    bootstrap : ClusterBootstrap over the same N

    Returns
    -------
    value, lo, hi : arrays [K]
    n : int array [K]
        Number of questions.

    Examples
    --------
    >>> onset = np.array([2.0, 2.0, 3.0, 4.0])
    >>> bootstrap = ClusterBootstrap(np.array(["p", "p", "q", "q"]), draws=100, seed=0)
    >>> value, lo, hi, n = layer_stability(onset, np.array(["a", "a", "b", "b"]), 6, bootstrap)
    >>> value.tolist(), n.tolist()
    ([1.0, 1.0, 1.0, 0.5, 1.0, 1.0], [2, 2, 2, 2, 2, 2])
    """
    agreement, first = pairwise_agreement(in_phase_two(onset, n_layers), questions)
    return bootstrap.mean(agreement, first)


def agreement_with(
    reference: str, onset: Floats, questions: NDArray, languages: NDArray, n_layers: int, bootstrap: ClusterBootstrap
) -> dict[str, tuple[Floats, Floats, Floats, NDArray[np.int64]]]:
    """Per language, the share of questions that it and ``reference`` put in the same phase, layer by layer.

    Parameters
    ----------
    reference : str
        A language.
    onset : float array [N]
        Retrieval onset of each example; NaN where there is none.
    questions, languages : arrays [N]
    n_layers : int
        K.
    bootstrap : ClusterBootstrap over the same N

    Returns
    -------
    dict of str to (value, lo, hi, number of questions), each an array [K]
        Languages without a question in common with ``reference`` are left out.

    Examples
    --------
    >>> languages, questions = np.array(["en", "de", "en", "de"]), np.array(["a", "a", "b", "b"])
    >>> bootstrap = ClusterBootstrap(np.array(["p", "p", "q", "q"]), draws=100, seed=0)
    >>> shares = agreement_with("en", np.array([2.0, 2.0, 2.0, 3.0]), questions, languages, 4, bootstrap)
    >>> shares["de"][0].tolist()
    [1.0, 1.0, 0.5, 1.0]
    """
    phase = in_phase_two(onset, n_layers)
    in_reference = {questions[i]: i for i in np.flatnonzero(languages == reference)}
    shares = {}
    for language in dict.fromkeys(languages.tolist()):
        if language == reference:
            continue
        examples = [i for i in np.flatnonzero(languages == language) if questions[i] in in_reference]
        if not examples:
            continue
        members = np.array(examples, dtype=np.int64)
        partners = np.array([in_reference[questions[i]] for i in examples])
        unknown = np.isnan(phase[members] + phase[partners])
        same = np.where(unknown, np.nan, phase[members] == phase[partners])
        shares[language] = bootstrap.mean(same, members)
    return shares
