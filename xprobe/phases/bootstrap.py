"""Paragraph-cluster bootstrap: questions on one paragraph are not independent, so whole paragraphs are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval. NaN where there is nothing to estimate or to draw from."""

    value: float
    lo: float
    hi: float

    def to_dict(self) -> dict[str, float | None]:
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
    """

    def __init__(self, clusters: NDArray, draws: int, seed: int) -> None:
        _, self.codes = np.unique(clusters, return_inverse=True)
        self.n_clusters = int(self.codes.max()) + 1 if len(self.codes) else 0
        generator = np.random.default_rng(seed)
        even = np.full(max(self.n_clusters, 1), 1 / max(self.n_clusters, 1))
        self.weights: Floats = generator.multinomial(max(self.n_clusters, 1), even, size=draws).astype(np.float64)

    def sums(self, values: Floats, codes: NDArray) -> Floats:
        """Sum of ``values`` [N, ...] within each cluster, [C, ...]."""
        total = np.zeros((max(self.n_clusters, 1), *values.shape[1:]))
        np.add.at(total, codes, values)
        return total

    def mean(self, values: Floats, members: NDArray | None = None) -> tuple[Floats, Floats, Floats, NDArray[np.int64]]:
        """Mean of ``values`` [N, K] over examples, NaN left out, with intervals: (value, lo, hi, n), each [K].

        ``members`` [N] (indices into the clusters given at construction) names the rows if they are not all examples.
        """
        totals, counts = self._totals(values, members)
        with np.errstate(invalid="ignore", divide="ignore"):
            value, drawn = totals.sum(0) / counts.sum(0), (self.weights @ totals) / (self.weights @ counts)
            without = np.where(counts > 0, (totals.sum(0) - totals) / (counts.sum(0) - counts), np.nan)
        lo, hi = self.interval(drawn, (counts > 0).sum(0), value, without)
        return value, lo, hi, counts.sum(0).astype(np.int64)

    def drawn_means(self, values: Floats, members: NDArray | None = None) -> tuple[Floats, Floats, Floats]:
        """Means as in ``mean``: of all examples [K], of every draw [draws, K], and the values per cluster [C, K]."""
        totals, counts = self._totals(values, members)
        with np.errstate(invalid="ignore", divide="ignore"):
            return totals.sum(0) / counts.sum(0), (self.weights @ totals) / (self.weights @ counts), counts

    def _totals(self, values: Floats, members: NDArray | None) -> tuple[Floats, Floats]:
        """Sum and number of the values per cluster [C, K], NaN left out."""
        codes = self.codes if members is None else self.codes[members]
        present = ~np.isnan(values)
        return self.sums(np.where(present, values, 0.0), codes), self.sums(present.astype(np.float64), codes)

    def median(self, values: Floats, members: NDArray | None = None) -> Estimate:
        """Median of ``values`` [N] over examples, NaN left out, with its interval."""
        value, drawn, clusters = self.drawn_medians(values, members)
        lo, hi = self.interval(drawn[:, None], np.array([clusters]))
        return Estimate(value, float(lo[0]), float(hi[0]))

    def drawn_medians(self, values: Floats, members: NDArray | None = None) -> tuple[float, Floats, int]:
        """Medians as in ``median``: of all examples, of every draw [draws], and how many clusters hold a value."""
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

        For values that repeat, as layers do: each draw is a histogram of them.
        """
        codes = self.codes if members is None else self.codes[members]
        present = ~np.isnan(values)
        if not present.any():
            return Estimate(float("nan"), float("nan"), float("nan"))
        kinds, which = np.unique(values[present], return_inverse=True)
        counts = np.zeros((max(self.n_clusters, 1), len(kinds)))
        np.add.at(counts, (codes[present], which), 1.0)
        drawn = _deviations(kinds, np.concatenate([counts.sum(0, keepdims=True), self.weights @ counts]))
        lo, hi = self.interval(drawn[1:, None], np.array([len(np.unique(codes[present]))]))
        return Estimate(float(drawn[0]), float(lo[0]), float(hi[0]))

    @staticmethod
    def interval(
        drawn: Floats, clusters: NDArray, value: Floats | None = None, without: Floats | None = None
    ) -> tuple[Floats, Floats]:
        """95 % interval of K figures from their draws, (lo, hi); NaN where fewer than two clusters hold a value.

        Percentiles of the draws: not 2.5 and 97.5, as the draws of n clusters vary too little by (n - 1) / n and their
        variance is itself estimated, but those at sqrt(n / (n - 1)) times Student's t (Hesterberg 2015, "What Teachers
        Should Know About the Bootstrap"). With ``value`` and ``without`` also corrected for bias and skewness (BCa;
        Efron 1987, "Better Bootstrap Confidence Intervals").

        Parameters
        ----------
        drawn : array [draws, K]
        clusters : int array [K]
            How many clusters hold a value.
        value : array [K], optional
            The figure of all clusters.
        without : array [C, K], optional
            The figure when each cluster is left out; NaN for those that hold no value.
        """
        known = (~np.isnan(drawn)).sum(0)
        empty = (known == 0) | (clusters < 2)
        n = np.where(empty, 2, clusters)
        reach = np.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.975)
        z, bias, skewness = np.stack([-reach, reach]), np.zeros(len(n)), np.zeros(len(n))
        if value is not None and without is not None:
            near = 1e-12 * np.abs(value)
            count = (drawn < value - near).sum(0) + (drawn <= value + near).sum(0)
            bias = ndtri(np.clip(count / np.maximum(2 * known, 1), 0.5 / len(drawn), 1 - 0.5 / len(drawn)))
            skewness = _acceleration(without)
        levels = ndtr(bias + (bias + z) / (1 - skewness * (bias + z)))
        lo, hi = _quantiles(np.sort(drawn, axis=0), known, levels)
        return np.where(empty, np.nan, lo), np.where(empty, np.nan, hi)


def _acceleration(without: Floats) -> Floats:
    """A sixth of the skewness of jackknife values [C, K], as BCa takes it; 0 where they are all equal."""
    known = ~np.isnan(without)
    mean = np.where(known, without, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    apart = np.where(known, mean - without, 0.0)
    apart[np.abs(apart) <= 1e-12 * np.abs(mean)] = 0.0
    apart /= np.maximum(np.abs(apart).max(0), 1e-300)
    squares = np.square(apart).sum(0)
    return (apart**3).sum(0) / (6 * np.maximum(squares, 1.0) ** 1.5)  # the largest is 1, or all are 0


def _quantiles(ordered: Floats, known: NDArray[np.int64], levels: Floats) -> Floats:
    """Quantiles ``levels`` [2, K] of the first ``known`` [K] of rising values [draws, K], interpolated linearly."""
    at = levels * np.maximum(known - 1, 0)
    below = np.floor(at).astype(np.int64)
    columns = np.arange(ordered.shape[1])
    lower, upper = ordered[below, columns], ordered[np.minimum(below + 1, np.maximum(known - 1, 0)), columns]
    return lower + (upper - lower) * (at - below)


def _deviations(kinds: Floats, counts: Floats) -> Floats:
    """Median absolute deviation of every row of ``counts`` [B, V], how often each of the rising ``kinds`` occurs."""
    centre = _medians(np.broadcast_to(kinds, counts.shape), counts)
    apart = np.abs(kinds - centre[:, None])
    order = np.argsort(apart, axis=1, kind="stable")
    return _medians(np.take_along_axis(apart, order, 1), np.take_along_axis(counts, order, 1))


def _medians(values: Floats, counts: Floats) -> Floats:
    """Median of each row of rising ``values`` [B, V] that occur ``counts`` times; NaN where none does.

    The usual one: the mean of the two middle values, counted with multiplicity.
    """
    heights = np.cumsum(counts, axis=1)
    half = heights[:, -1:] / 2
    rows, last = np.arange(len(values)), values.shape[1] - 1
    lower = values[rows, np.minimum((heights < half).sum(1), last)]
    upper = values[rows, np.minimum((heights <= half).sum(1), last)]
    return np.where(heights[:, -1] > 0, (lower + upper) / 2, np.nan)
