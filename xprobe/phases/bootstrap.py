"""Paragraph-cluster bootstrap: questions on one paragraph are not independent, so whole paragraphs are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % percentile interval. NaN where there is nothing to estimate or to draw from."""

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
        codes = self.codes if members is None else self.codes[members]
        present = ~np.isnan(values)
        totals = self.sums(np.where(present, values, 0.0), codes)
        counts = self.sums(present.astype(np.float64), codes)
        n = counts.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            value = totals.sum(0) / n
            drawn = (self.weights @ totals) / (self.weights @ counts)
        lo, hi = self.interval(drawn, (counts > 0).sum(0))
        return value, lo, hi, n.astype(np.int64)

    def median(self, values: Floats, members: NDArray | None = None) -> Estimate:
        """Median of ``values`` [N] over examples, NaN left out, with its interval."""
        codes = self.codes if members is None else self.codes[members]
        present = ~np.isnan(values)
        if not present.any():
            return Estimate(float("nan"), float("nan"), float("nan"))
        order = np.argsort(values[present], kind="stable")
        ordered, codes = values[present][order], codes[present][order]
        heights = np.cumsum(self.weights[:, codes], axis=1)
        half = heights[:, -1:] / 2
        # the usual median of the drawn sample: the mean of the two middle values, counted with multiplicity
        lower = ordered[np.minimum((heights < half).sum(1), len(ordered) - 1)]
        upper = ordered[np.minimum((heights <= half).sum(1), len(ordered) - 1)]
        drawn = np.where(heights[:, -1] > 0, (lower + upper) / 2, np.nan)
        lo, hi = self.interval(drawn[:, None], np.array([len(np.unique(codes))]))
        return Estimate(float(np.median(ordered)), float(lo[0]), float(hi[0]))

    @staticmethod
    def interval(drawn: Floats, clusters: NDArray) -> tuple[Floats, Floats]:
        """2.5 and 97.5 percentiles of ``drawn`` [draws, K]; NaN where fewer than two ``clusters`` [K] hold a value."""
        empty = np.isnan(drawn).all(0) | (clusters < 2)
        filled = np.where(empty, 0.0, drawn)
        lo, hi = np.nanpercentile(filled, [2.5, 97.5], axis=0)
        return np.where(empty, np.nan, lo), np.where(empty, np.nan, hi)
