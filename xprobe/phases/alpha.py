"""Krippendorff's alpha (interval metric) of retrieval onsets: languages as raters, questions as units."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xprobe.phases.bootstrap import ClusterBootstrap, Estimate

Floats = NDArray[np.float64]


def krippendorff_alpha(values: Floats, units: NDArray, bootstrap: ClusterBootstrap | None = None) -> Estimate:
    """Chance-corrected agreement of ``values`` within ``units``: 1 perfect, 0 chance, below 0 systematic disagreement.

    ``alpha = 1 - D_o / D_e`` with squared differences (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability"). NaN values are missing ratings; units with fewer than two values do not count.

    Parameters
    ----------
    values : float array [N]
    units : array [N]
        The unit (question) that each value rates.
    bootstrap : ClusterBootstrap over the same N, optional
        Gives the interval; units must lie within clusters.

    Returns
    -------
    Estimate
        NaN if no unit counts or all values are equal; the interval is NaN without ``bootstrap``.

    Examples
    --------
    Two languages swap the onsets of two questions: less agreement than chance gives.

    >>> onsets, questions = np.array([0.0, 1.0, 1.0, 0.0]), np.array(["a", "a", "b", "b"])
    >>> krippendorff_alpha(onsets, questions).value
    -0.5

    They agree on both:

    >>> krippendorff_alpha(np.array([0.0, 0.0, 1.0, 1.0]), questions).value
    1.0
    """
    unit_sums, first = _unit_sums(values, units)
    alpha = float(_alpha(unit_sums.sum(0, keepdims=True))[0])
    if bootstrap is None:
        return Estimate(alpha, float("nan"), float("nan"))
    codes = bootstrap.codes[first]
    sums = bootstrap.sums(unit_sums, codes)
    drawn = _alpha(bootstrap.weights @ sums)
    jackknife = np.where(sums[:, 0] > 0, _alpha(sums.sum(0) - sums), np.nan)
    n_clusters = np.array([len(np.unique(codes))])
    lo, hi = bootstrap.interval(drawn[:, None], n_clusters, np.array([alpha]), jackknife[:, None])
    return Estimate(alpha, float(lo[0]), float(hi[0]))


def drawn_alphas(
    values: Floats, units: NDArray, members: NDArray, bootstrap: ClusterBootstrap
) -> tuple[float, Floats, int]:
    """``krippendorff_alpha`` of all values, of every draw [draws], and the number of clusters that hold a unit.

    Parameters
    ----------
    values, units : arrays [N]
    members : int array [N]
        The example of ``bootstrap`` whose cluster each value lies in.
    bootstrap : ClusterBootstrap

    Examples
    --------
    >>> bootstrap = ClusterBootstrap(np.array(["p", "q"]), draws=20, seed=0)
    >>> onsets, questions = np.array([0.0, 0.0, 1.0, 1.0]), np.array(["a", "a", "b", "b"])
    >>> drawn_alphas(onsets, questions, np.array([0, 0, 1, 1]), bootstrap)[0]
    1.0
    """
    unit_sums, first = _unit_sums(values, units)
    codes = bootstrap.codes[members[first]]
    sums = bootstrap.sums(unit_sums, codes)
    return float(_alpha(sums.sum(0, keepdims=True))[0]), _alpha(bootstrap.weights @ sums), len(np.unique(codes))


def _unit_sums(values: Floats, units: NDArray) -> tuple[Floats, NDArray[np.int64]]:
    """Per unit (number of values, their sum, sum of squares, within-unit disagreement) and the index of one example."""
    present = np.flatnonzero(~np.isnan(values))
    _, codes, sizes = np.unique(units[present], return_inverse=True, return_counts=True)
    present = present[sizes[codes] >= 2]  # a unit with one value has no pair
    _, first, codes = np.unique(units[present], return_index=True, return_inverse=True)
    x = values[present] - (values[present].mean() if len(present) else 0.0)  # centred: less rounding
    n = np.bincount(codes, minlength=len(first)).astype(np.float64)
    total = np.bincount(codes, x, minlength=len(first))
    squares = np.bincount(codes, np.square(x), minlength=len(first))
    within = 2 * (n * squares - np.square(total)) / (n - 1)  # sum over ordered pairs, over n - 1
    return np.stack([n, total, squares, within], 1), present[first]


def _alpha(sums: Floats) -> Floats:
    """Alpha from summed unit sums [draws, 4]."""
    n, total, squares, within = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        observed = within / n
        expected = 2 * (n * squares - np.square(total)) / (n * (n - 1))
        return np.where(expected > 1e-12 * squares / n, 1 - observed / expected, np.nan)
