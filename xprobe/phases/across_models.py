"""How figures of several models relate: the same paragraphs are drawn for all models, and models are drawn too."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, t

from xprobe.phases.bootstrap import ClusterBootstrap, Estimate

Floats = NDArray[np.float64]
FEWEST = 3  # models of a correlation
FEWEST_OF_INTERVAL = 6  # with fewer, draws of models are too much alike: the interval would be too narrow
METHODS = ("pearson", "spearman")


@dataclass(frozen=True, eq=False)
class Drawn:
    """A figure of one model, and its values under the draws of paragraphs.

    Attributes
    ----------
    value : float
    drawn : array [draws]
    """

    value: float
    drawn: Floats


def mean_of(values: Floats, members: NDArray, bootstrap: ClusterBootstrap) -> Drawn:
    """Mean of ``values`` [N] under draws of paragraphs; ``members`` [N] as in ``ClusterBootstrap.mean``.

    Examples
    --------
    >>> bootstrap = ClusterBootstrap(np.arange(4), draws=50, seed=0)
    >>> mean_of(np.array([1.0, 3.0]), np.array([0, 1]), bootstrap).value
    2.0
    """
    value, drawn, _ = bootstrap.drawn_means(values[:, None], members)
    return Drawn(float(value[0]), drawn[:, 0])


def median_of(values: Floats, members: NDArray, bootstrap: ClusterBootstrap) -> Drawn:
    """Median of ``values`` [N], as ``mean_of``.

    Examples
    --------
    >>> bootstrap = ClusterBootstrap(np.arange(4), draws=50, seed=0)
    >>> median_of(np.array([1.0, 3.0, 8.0]), np.array([0, 1, 2]), bootstrap).value
    3.0
    """
    value, drawn, _ = bootstrap.drawn_medians(values, members)
    return Drawn(value, drawn)


def correlation(one: list[Drawn], other: list[Drawn], method: str, seed: int) -> Estimate:
    """Correlation of two figures over M models, with an interval over models and paragraphs.

    Each draw takes M models with replacement, and the figures of one draw of paragraphs. Draws with fewer than three
    different models do not count. With fewer than six models there is no interval: draws of so few are too much alike.
    Of figures that have nothing to do with each other, the interval held 0 in 68, 90, 96, 96 and 94 % of 200 trials
    with 4, 5, 6, 8 and 12 models.

    Parameters
    ----------
    one, other : list of Drawn [M]
        Of the same models in the same order, under the same draws of paragraphs.
    method : str
        ``pearson``, or ``spearman`` (of ranks).
    seed : int
        Of the draws of models.

    Returns
    -------
    Estimate
        NaN with fewer than three models, or if a figure is the same for all.

    Examples
    --------
    >>> rising = [Drawn(float(i), np.full(200, float(i))) for i in range(6)]
    >>> round(correlation(rising, rising, "spearman", seed=0).value, 6)
    1.0
    >>> correlation(rising[:2], rising[:2], "pearson", seed=0).value
    nan
    """
    return _of_correlations([one], other, method, seed)


def correlation_difference(one: list[Drawn], less: list[Drawn], other: list[Drawn], method: str, seed: int) -> Estimate:
    """Correlation of ``one`` with ``other``, less that of ``less`` with ``other``; as ``correlation``.

    Examples
    --------
    >>> rising = [Drawn(float(i), np.full(200, float(i))) for i in range(6)]
    >>> falling = [Drawn(-drawn.value, -drawn.drawn) for drawn in rising]
    >>> round(correlation_difference(rising, falling, rising, "spearman", seed=0).value, 6)
    2.0
    """
    return _of_correlations([one, less], other, method, seed)


def mean_over_models(models: list[Drawn]) -> Estimate:
    """Mean of a figure over M models, with the 95 % interval for other models of the same kind.

    Student's t with M - 1 degrees of freedom. The variance is that over models, and that of the mean over draws of
    paragraphs: models that answer the same questions share the luck of the draw.

    Returns
    -------
    Estimate
        Without an interval for one model; NaN for none. Models whose figure is NaN are left out.

    Examples
    --------
    >>> found = mean_over_models([Drawn(0.2, np.full(50, 0.2)), Drawn(0.4, np.full(50, 0.4))])
    >>> round(found.value, 6), round(found.hi - found.lo, 2)
    (0.3, 2.54)
    """
    known = [model for model in models if not np.isnan(model.value)]
    if not known:
        return Estimate(float("nan"), float("nan"), float("nan"))
    values = np.array([model.value for model in known])
    value = float(values.mean())
    if len(known) == 1:
        return Estimate(value, float("nan"), float("nan"))
    paragraphs = np.nanvar(np.stack([model.drawn for model in known]).mean(0))
    half = float(t.ppf(0.975, len(known) - 1) * np.sqrt(values.var(ddof=1) / len(known) + paragraphs))
    return Estimate(value, value - half, value + half)


def _of_correlations(ones: list[list[Drawn]], other: list[Drawn], method: str, seed: int) -> Estimate:
    """Correlation of the first of ``ones`` with ``other``, less that of the second if there is one."""
    rows = [row for row in zip(*ones, other, strict=True) if not np.isnan([figure.value for figure in row]).any()]
    models = len(rows)
    if models < FEWEST:
        return Estimate(float("nan"), float("nan"), float("nan"))
    *values, last = np.array([[figure.value for figure in row] for row in rows]).T
    value = _difference([_correlations(one[None], last[None], method) for one in values])
    if models < FEWEST_OF_INTERVAL:
        return Estimate(float(value[0]), float("nan"), float("nan"))
    figures = [np.stack([row[side].drawn for row in rows], 1) for side in range(len(ones) + 1)]
    chosen = np.random.default_rng(seed).integers(models, size=(len(figures[0]), models))
    *figures, last = (np.take_along_axis(figure, chosen, 1) for figure in figures)
    drawn = _difference([_correlations(one, last, method) for one in figures])
    drawn[[len(set(row)) < FEWEST for row in chosen.tolist()]] = np.nan
    lo, hi = ClusterBootstrap.interval(drawn[:, None], np.array([models]))
    return Estimate(float(value[0]), float(lo[0]), float(hi[0]))


def _difference(parts: list[Floats]) -> Floats:
    return parts[0] if len(parts) == 1 else parts[0] - parts[1]


def _correlations(x: Floats, y: Floats, method: str) -> Floats:
    """Correlations of the rows of [draws, M]; NaN where a row is constant."""
    if method == "spearman":
        x, y = rankdata(x, axis=1), rankdata(y, axis=1)
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    size = np.sqrt(np.square(x).sum(1) * np.square(y).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(size > 1e-12, (x * y).sum(1) / size, np.nan)
