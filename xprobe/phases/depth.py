"""Depth of relevance: at which layer most of the relevance of a token has been met. Numbers in, numbers out.

The term and the 95th percentile are those of Gao et al. 2025 (arXiv 2504.10906); how they sum is not public to us.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SHARE = 0.95


def major_relevance_depth(
    relevance: Floats, *, positive: bool = False, embeddings: bool = False
) -> NDArray[np.float64]:
    """Major relevance depth (MRD) of every token: the smallest l with sum over k <= l of |R[k]| >= 95 % of all.

    Parameters
    ----------
    relevance : array [L + 1, T]
        Layer 0 is the input of the first block.
    positive : bool
        Count the positive part of R instead of |R|.
    embeddings : bool
        Sum from layer 0 on, not from layer 1.

    Returns
    -------
    array [T]
        Layers; NaN for a token without relevance.

    Examples
    --------
    >>> relevance = np.array([[9.0, 0.0], [1.0, -1.0], [0.0, 1.0], [0.0, 2.0]])
    >>> major_relevance_depth(relevance).tolist()
    [1.0, 3.0]
    >>> major_relevance_depth(relevance, embeddings=True).tolist()
    [1.0, 3.0]
    """
    first = 0 if embeddings else 1
    amounts = np.maximum(relevance[first:], 0.0) if positive else np.abs(relevance[first:])
    sums = np.cumsum(amounts, axis=0)
    total = sums[-1]
    reached = sums >= SHARE * total * (1 - 1e-12)
    return np.where(total > 0, reached.argmax(0) + first, np.nan).astype(np.float64)


def weighted_depth(depths: Floats, weights: Floats) -> tuple[float, Floats]:
    """Mean and quartiles of the depths [T] of a group of tokens, weighted by their relevance.

    A quartile is the smallest depth at which the weights sum to so much of their total.

    Examples
    --------
    >>> mean, quartiles = weighted_depth(np.array([4.0, 8.0]), np.array([3.0, 1.0]))
    >>> mean, quartiles.tolist()
    (5.0, [4.0, 4.0, 4.0])
    """
    known = ~np.isnan(depths) & (weights > 0)
    if not known.any():
        return float("nan"), np.full(3, np.nan)
    order = np.argsort(depths[known], kind="stable")
    ordered, own = depths[known][order], weights[known][order]
    sums = np.cumsum(own) / own.sum()
    places = np.searchsorted(sums, np.array([0.25, 0.5, 0.75]) - 1e-12)
    return float((ordered * own).sum() / own.sum()), ordered[np.minimum(places, len(ordered) - 1)]


def relevance_shares(relevance: Floats, groups: NDArray[np.int64], count: int) -> Floats:
    """Share of \\|R\\| on each group of tokens at every layer.

    Parameters
    ----------
    relevance : array [L + 1, T]
    groups : int array [T]
        Group of each token, 0 to ``count - 1``.
    count : int

    Returns
    -------
    array [L + 1, count]
        Each row sums to 1; NaN for a layer without relevance.

    Examples
    --------
    >>> relevance_shares(np.array([[1.0, -3.0, 0.0]]), np.array([0, 1, 1]), 2).tolist()
    [[0.25, 0.75]]
    """
    amounts = np.abs(relevance)
    members = (groups[:, None] == np.arange(count)).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (amounts @ members) / amounts.sum(1, keepdims=True)
