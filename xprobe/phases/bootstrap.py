"""Paragraph-cluster bootstrap: questions on one paragraph are not independent, so whole paragraphs are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval. NaN where there is nothing to estimate or to draw from.

    Examples
    --------
    >>> Estimate(0.5, float("nan"), float("nan")).to_dict()
    {'value': 0.5, 'lo': None, 'hi': None}
    """

    value: float
    lo: float
    hi: float

    def to_dict(self) -> dict[str, float | None]:
        """Plain values, None for NaN."""
        return {name: None if np.isnan(number) else number for name, number in vars(self).items()}


class ClusterBootstrap:
    """Draws of whole clusters with replacement; the same draws serve every figure of a study.

    Parameters
    ----------
    clusters : array [N] of hashables
        The cluster (paragraph) of each example.
    draws : int
        Number of bootstrap samples.
    seed : int
        Of the draws; the same seed and clusters give the same intervals.

    Attributes
    ----------
    codes : int array [N]
        The cluster of each example, as a number from 0 to C - 1.
    n_clusters : int
        C.
    weights : float array [draws, C]
        How often each draw holds each cluster.

    Examples
    --------
    >>> paragraphs = np.array(["p", "p", "q", "q"])
    >>> bootstrap = ClusterBootstrap(paragraphs, draws=400, seed=0)
    >>> bootstrap.median(np.array([1.0, 2.0, 8.0, 9.0]))
    Estimate(value=5.0, lo=1.5, hi=8.5)
    """

    def __init__(self, clusters: NDArray, draws: int, seed: int) -> None:
        _, self.codes = np.unique(clusters, return_inverse=True)
        self.n_clusters = int(self.codes.max()) + 1 if len(self.codes) else 0
        generator = np.random.default_rng(seed)
        chances = np.full(max(self.n_clusters, 1), 1 / max(self.n_clusters, 1))
        self.weights: Floats = generator.multinomial(max(self.n_clusters, 1), chances, size=draws).astype(np.float64)

    def sums(self, values: Floats, codes: NDArray) -> Floats:
        """Sum of ``values`` [N, ...] within each cluster, [C, ...]; ``codes`` [N] as in the attribute.

        Examples
        --------
        >>> bootstrap = ClusterBootstrap(np.array(["p", "p", "q"]), draws=10, seed=0)
        >>> bootstrap.sums(np.array([1.0, 2.0, 5.0]), bootstrap.codes).tolist()
        [3.0, 5.0]
        """
        total = np.zeros((max(self.n_clusters, 1), *values.shape[1:]))
        np.add.at(total, codes, values)
        return total

    def mean(self, values: Floats, members: NDArray | None = None) -> tuple[Floats, Floats, Floats, NDArray[np.int64]]:
        """Mean of ``values`` [N, K] over examples, NaN left out, with intervals.

        Parameters
        ----------
        values : array [N, K]
        members : int array [N], optional
            The examples that the rows of ``values`` belong to, as indices into the clusters given at construction; all
            examples if None.

        Returns
        -------
        value, lo, hi : arrays [K]
        n : int array [K]
            How many examples have a value.

        Examples
        --------
        >>> bootstrap = ClusterBootstrap(np.array(["p", "p", "q"]), draws=100, seed=0)
        >>> value, lo, hi, n = bootstrap.mean(np.array([[1.0], [np.nan], [4.0]]))
        >>> value.tolist(), n.tolist()
        ([2.5], [2])
        """
        totals, counts = self._totals(values, members)
        with np.errstate(invalid="ignore", divide="ignore"):
            value, drawn = totals.sum(0) / counts.sum(0), (self.weights @ totals) / (self.weights @ counts)
            jackknife = np.where(counts > 0, (totals.sum(0) - totals) / (counts.sum(0) - counts), np.nan)
        lo, hi = self.interval(drawn, (counts > 0).sum(0), value, jackknife)
        return value, lo, hi, counts.sum(0).astype(np.int64)

    def drawn_means(self, values: Floats, members: NDArray | None = None) -> tuple[Floats, Floats, Floats]:
        """Means as in ``mean``: of all examples [K], of every draw [draws, K]; number of values per cluster [C, K].

        Examples
        --------
        >>> bootstrap = ClusterBootstrap(np.array(["p", "p", "q"]), draws=100, seed=0)
        >>> value, drawn, counts = bootstrap.drawn_means(np.array([[1.0], [3.0], [8.0]]))
        >>> value.tolist(), sorted(set(drawn[:, 0].tolist())), counts.tolist()
        ([4.0], [2.0, 4.0, 8.0], [[2.0], [1.0]])
        """
        totals, counts = self._totals(values, members)
        with np.errstate(invalid="ignore", divide="ignore"):
            return totals.sum(0) / counts.sum(0), (self.weights @ totals) / (self.weights @ counts), counts

    def _totals(self, values: Floats, members: NDArray | None) -> tuple[Floats, Floats]:
        """Sum and number of the values per cluster [C, K], NaN left out."""
        codes = self.codes if members is None else self.codes[members]
        present = ~np.isnan(values)
        return self.sums(np.where(present, values, 0.0), codes), self.sums(present.astype(np.float64), codes)

    def median(self, values: Floats, members: NDArray | None = None) -> Estimate:
        """Median of ``values`` [N] over examples, NaN left out, with its interval; ``members`` as in ``mean``.

        Examples
        --------
        >>> ClusterBootstrap(np.array(["p", "q", "r"]), draws=100, seed=0).median(np.array([4.0, 4.0, 5.0])).value
        4.0
        """
        value, drawn, n_clusters = self.drawn_medians(values, members)
        lo, hi = self.interval(drawn[:, None], np.array([n_clusters]))
        return Estimate(value, float(lo[0]), float(hi[0]))

    def drawn_medians(self, values: Floats, members: NDArray | None = None) -> tuple[float, Floats, int]:
        """Medians as in ``median``: of all examples, of every draw [draws]; how many clusters hold a value.

        Examples
        --------
        >>> bootstrap = ClusterBootstrap(np.array(["p", "p", "q"]), draws=100, seed=0)
        >>> value, drawn, n_clusters = bootstrap.drawn_medians(np.array([1.0, 3.0, 8.0]))
        >>> value, sorted(set(drawn.tolist())), n_clusters
        (3.0, [2.0, 3.0, 8.0], 2)
        """
        codes = self.codes if members is None else self.codes[members]
        present = ~np.isnan(values)
        if not present.any():
            return float("nan"), np.full(len(self.weights), np.nan), 0
        order = np.argsort(values[present], kind="stable")
        ordered, codes = values[present][order], codes[present][order]
        drawn = _medians(np.broadcast_to(ordered, (len(self.weights), len(ordered))), self.weights[:, codes])
        return float(np.median(ordered)), drawn, len(np.unique(codes))

    def spread(self, values: Floats, members: NDArray | None = None) -> Estimate:
        """Median absolute deviation from the median of ``values`` [N], NaN left out, with its interval.

        For values that repeat, as layers do: each draw is a histogram of them. ``members`` as in ``mean``.

        Examples
        --------
        >>> ClusterBootstrap(np.arange(4), draws=100, seed=0).spread(np.array([3.0, 5.0, 5.0, 9.0])).value
        1.0
        """
        codes = self.codes if members is None else self.codes[members]
        present = ~np.isnan(values)
        if not present.any():
            return Estimate(float("nan"), float("nan"), float("nan"))
        distinct, indices = np.unique(values[present], return_inverse=True)
        counts = np.zeros((max(self.n_clusters, 1), len(distinct)))
        np.add.at(counts, (codes[present], indices), 1.0)
        drawn = _deviations(distinct, np.concatenate([counts.sum(0, keepdims=True), self.weights @ counts]))
        lo, hi = self.interval(drawn[1:, None], np.array([len(np.unique(codes[present]))]))
        return Estimate(float(drawn[0]), float(lo[0]), float(hi[0]))

    @staticmethod
    def interval(
        drawn: Floats, clusters: NDArray, value: Floats | None = None, jackknife: Floats | None = None
    ) -> tuple[Floats, Floats]:
        """95 % interval of K figures from their draws, (lo, hi); NaN where fewer than two clusters hold a value.

        The bounds are percentiles of the draws. The percentiles 2.5 and 97.5 would be too narrow: the variance of the
        draws of n clusters is too small by (n - 1) / n, and it is itself an estimate. So the percentiles are those at
        sqrt(n / (n - 1)) times Student's t (Hesterberg 2015, "What Teachers Should Know About the Bootstrap"). With
        ``value`` and ``jackknife`` they are also corrected for bias and skewness (BCa; Efron 1987, "Better Bootstrap
        Confidence Intervals").

        Parameters
        ----------
        drawn : array [draws, K]
        clusters : int array [K]
            How many clusters hold a value.
        value : array [K], optional
            The figure of all clusters.
        jackknife : array [C, K], optional
            The figure when each cluster is left out; NaN for those that hold no value.

        Examples
        --------
        >>> drawn = np.random.default_rng(0).normal(size=(10_000, 1))
        >>> lo, hi = ClusterBootstrap.interval(drawn, clusters=np.array([1000]))
        >>> lo.round(1).tolist(), hi.round(1).tolist()
        ([-2.0], [2.0])
        """
        known = (~np.isnan(drawn)).sum(0)
        empty = (known == 0) | (clusters < 2)
        n = np.where(empty, 2, clusters)
        reach = np.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975)
        z, bias, skewness = np.stack([-reach, reach]), np.zeros(len(n)), np.zeros(len(n))
        if value is not None and jackknife is not None:
            tolerance = 1e-12 * np.abs(value)
            count = (drawn < value - tolerance).sum(0) + (drawn <= value + tolerance).sum(0)
            bias = ndtri(np.clip(count / np.maximum(2 * known, 1), 0.5 / len(drawn), 1 - 0.5 / len(drawn)))
            skewness = _acceleration(jackknife)
        levels = ndtr(bias + (bias + z) / (1 - skewness * (bias + z)))
        lo, hi = _quantiles(np.sort(drawn, axis=0), known, levels)
        return np.where(empty, np.nan, lo), np.where(empty, np.nan, hi)


def _acceleration(jackknife: Floats) -> Floats:
    """A sixth of the skewness of jackknife values [C, K], as BCa takes it; 0 where they are all equal."""
    known = ~np.isnan(jackknife)
    mean = np.where(known, jackknife, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    deviations = np.where(known, mean - jackknife, 0.0)
    deviations[np.abs(deviations) <= 1e-12 * np.abs(mean)] = 0.0
    deviations /= np.maximum(np.abs(deviations).max(0), 1e-300)
    squares = np.square(deviations).sum(0)
    return (deviations**3).sum(0) / (6 * np.maximum(squares, 1.0) ** 1.5)  # the largest is 1, or all are 0


def _quantiles(ordered: Floats, known: NDArray[np.int64], levels: Floats) -> Floats:
    """Quantiles ``levels`` [2, K] of the first ``known`` [K] of rising values [draws, K], interpolated linearly."""
    position = levels * np.maximum(known - 1, 0)
    below = np.floor(position).astype(np.int64)
    columns = np.arange(ordered.shape[1])
    lower, upper = ordered[below, columns], ordered[np.minimum(below + 1, np.maximum(known - 1, 0)), columns]
    return lower + (upper - lower) * (position - below)


def _deviations(values: Floats, counts: Floats) -> Floats:
    """Median absolute deviation of B samples; row b of ``counts`` [B, V] says how often sample b holds each of the
    rising ``values`` [V]."""
    medians = _medians(np.broadcast_to(values, counts.shape), counts)
    deviations = np.abs(values - medians[:, None])
    order = np.argsort(deviations, axis=1, kind="stable")
    return _medians(np.take_along_axis(deviations, order, 1), np.take_along_axis(counts, order, 1))


def _medians(values: Floats, counts: Floats) -> Floats:
    """Median of each row of rising ``values`` [B, V] that occur ``counts`` times; NaN where none does.

    In an even sample the median is the mean of the two middle values.
    """
    cumulative = np.cumsum(counts, axis=1)
    half = cumulative[:, -1:] / 2
    rows, last = np.arange(len(values)), values.shape[1] - 1
    lower = values[rows, np.minimum((cumulative < half).sum(1), last)]
    upper = values[rows, np.minimum((cumulative <= half).sum(1), last)]
    return np.where(cumulative[:, -1] > 0, (lower + upper) / 2, np.nan)
