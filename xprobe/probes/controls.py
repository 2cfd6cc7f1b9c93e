"""Controls: shuffled labels, majority baseline, and intervals that know that folds share their training data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.model_selection import GroupKFold

Fold = tuple[NDArray[np.int64], NDArray[np.int64]]


def paragraph_folds(paragraphs: NDArray, n_folds: int) -> list[Fold]:
    """(training, test) indices of at most ``n_folds`` folds; no paragraph lies in both. None for one paragraph."""
    n = min(n_folds, len(np.unique(paragraphs)))
    return list(GroupKFold(n).split(paragraphs, groups=paragraphs)) if n >= 2 else []


def shuffle_within(groups: NDArray, seed: int) -> NDArray[np.int64]:
    """A permutation of ``range(len(groups))`` that keeps every index in its group.

    Labels taken by it give the control task (Hewitt & Liang 2019, "Designing and Interpreting Probes with Control
    Tasks"): how many there are of each, group by group, is as before, what they belong to is not.
    """
    order = np.arange(len(groups))
    generator = np.random.default_rng(seed)
    _, codes = np.unique(groups, return_inverse=True)
    for code in range(codes.max() + 1 if len(codes) else 0):
        members = np.flatnonzero(codes == code)
        order[members] = generator.permutation(members)
    return order


def majority(train: NDArray, test: NDArray) -> float:
    """Accuracy on ``test`` of always saying the most frequent label of ``train``."""
    values, counts = np.unique(train, return_counts=True)
    return float((test == values[counts.argmax()]).mean())


def fold_interval(scores: Sequence[float]) -> tuple[float, float, float]:
    """Mean of the folds' scores and its 95 % interval; NaN scores are left out, fewer than two give no interval.

    Folds share most of their training data, so the plain standard error is too small. Nadeau & Bengio (2003,
    "Inference for the Generalization Error") correct the variance of the mean from s²/k to s² (1/k + n_test/n_train),
    here s² (1/k + 1/(k − 1)). Scores lie between 0 and 1, and so does their interval.
    """
    known = np.array([score for score in scores if not np.isnan(score)])
    k = len(known)
    if k < 2:
        return (float(known[0]) if k else float("nan")), float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, k - 1) * known.std(ddof=1) * np.sqrt(1 / k + 1 / (k - 1)))
    mean = float(known.mean())
    return mean, max(mean - half, 0.0), min(mean + half, 1.0)
