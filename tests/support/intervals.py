"""95 % bootstrap intervals as scipy gives them from the same draws."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats


def interval(
    drawn: Any, clusters: NDArray, statistic: Callable[[NDArray], float], corrected: bool = True
) -> tuple[float, float]:
    """(lo, hi) from the figures ``drawn``; NaN among them are left out.

    ``clusters`` names those that hold a value, ``statistic`` gives the figure of some of them; ``corrected``: for bias
    and skewness. The level is what makes a normal interval of n clusters one of Student's, with the n - 1 of variance.
    """
    drawn, n = np.asarray(drawn, dtype=float), len(clusters)
    drawn = drawn[~np.isnan(drawn)].round(12)  # figures that differ by rounding alone tie
    if n == 2:  # Student's quantile for one degree of freedom, 12.7, lies beyond every draw
        return drawn.min(), drawn.max()
    level = 1 - 2 * stats.norm.sf(stats.t.ppf(0.975, n - 1) * np.sqrt(n / (n - 1)))
    found = stats.bootstrap(
        (clusters,), lambda some: round(statistic(some), 12), vectorized=False, n_resamples=0, confidence_level=level,
        method="BCa" if corrected else "percentile", bootstrap_result=SimpleNamespace(bootstrap_distribution=drawn),
    ).confidence_interval  # fmt: skip
    return found.low, found.high
