"""Controls: folds of whole paragraphs, shuffled labels, majority baseline, and intervals over folds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.model_selection import GroupKFold

Fold = tuple[NDArray[np.int64], NDArray[np.int64]]


def paragraph_folds(paragraphs: NDArray, n_folds: int) -> list[Fold]:
    """(training, test) indices of at most ``n_folds`` folds; no paragraph lies in both.

    Parameters
    ----------
    paragraphs : array [n]
        The paragraph of each example.
    n_folds : int

    Returns
    -------
    list of (int array, int array)
        Fewer than ``n_folds`` where there are fewer paragraphs; [] for one paragraph.

    Examples
    --------
    >>> [(train.tolist(), test.tolist()) for train, test in paragraph_folds(np.array(["p", "p", "q"]), 5)]
    [([2], [0, 1]), ([0, 1], [2])]
    """
    n = min(n_folds, len(np.unique(paragraphs)))
    return list(GroupKFold(n).split(paragraphs, groups=paragraphs)) if n >= 2 else []


def shuffle_within(groups: NDArray, seed: int) -> NDArray[np.int64]:
    """A permutation of ``range(len(groups))`` that keeps every index in its group.

    ``labels[shuffle_within(groups, seed)]`` are the labels of the control task (Hewitt & Liang 2019, "Designing and
    Interpreting Probes with Control Tasks"): each group has the same labels as before, in another order.

    Parameters
    ----------
    groups : array [n]
    seed : int

    Examples
    --------
    >>> labels, groups = np.array(["en", "de", "th", "en", "de", "th"]), np.array([0, 0, 0, 1, 1, 1])
    >>> labels[shuffle_within(groups, seed=0)].tolist()
    ['th', 'en', 'de', 'th', 'de', 'en']
    """
    order = np.arange(len(groups))
    generator = np.random.default_rng(seed)
    _, codes = np.unique(groups, return_inverse=True)
    for code in range(codes.max() + 1 if len(codes) else 0):
        members = np.flatnonzero(codes == code)
        order[members] = generator.permutation(members)
    return order


def majority(train: NDArray, test: NDArray) -> float:
    """Accuracy on the labels ``test`` of always answering the most frequent label of ``train``.

    Examples
    --------
    >>> majority(np.array(["en", "en", "th"]), np.array(["en", "th", "th", "th"]))
    0.25
    """
    values, counts = np.unique(train, return_counts=True)
    return float((test == values[counts.argmax()]).mean())


def fold_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the scores of k folds, with its 95 % interval: (mean, lo, hi).

    Folds share most of their training data, so the plain standard error is too small. Nadeau & Bengio (2003,
    "Inference for the Generalization Error") correct the variance of the mean from s²/k to s² (1/k + n_test/n_train),
    here s² (1/k + 1/(k − 1)).

    Parameters
    ----------
    scores : sequence of float
        NaN scores are left out; fewer than two scores give no interval (NaN). The interval of scores from 0 to 1 ends
        there.

    Examples
    --------
    >>> [round(value, 3) for value in fold_interval([0.5, 0.6, 0.7])]
    [0.6, 0.207, 0.993]
    """
    known = np.array([score for score in scores if not np.isnan(score)])
    k = len(known)
    if k < 2:
        return (float(known[0]) if k else float("nan")), float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, k - 1) * known.std(ddof=1) * np.sqrt(1 / k + 1 / (k - 1)))
    mean = float(known.mean())
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)
