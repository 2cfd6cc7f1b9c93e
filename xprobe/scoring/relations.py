"""How answers relate to phases: correlations over examples, and signals by layer of right and of wrong answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from xprobe.phases.bootstrap import ClusterBootstrap, Estimate

Floats = NDArray[np.float64]


def correlations(table: pd.DataFrame, columns: tuple[str, ...], draws: int, seed: int) -> dict[str, Any]:
    """Spearman correlation of F1 with each of ``columns``, over the examples of each setting.

    Parameters
    ----------
    table : DataFrame
        One row per answer: setting, paragraph, f1 and ``columns``. Rows where a column is NaN do not count for it.
    draws : int
        Bootstrap samples of paragraphs.
    seed : int

    Returns
    -------
    dict
        By setting and column: {value, lo, hi}; None where all values are equal.

    Examples
    --------
    >>> table = pd.DataFrame({
    ...     "setting": "en-x", "paragraph": list("ppqqrr"), "f1": [0, 0.2, 0.3, 0.5, 0.6, 1],
    ...     "onset": [9, 8, 8, 5, 4, 1],
    ... })
    >>> round(correlations(table, ("onset",), draws=50, seed=0)["en-x"]["onset"]["value"], 3)
    -0.986
    """
    found: dict[str, Any] = {}
    for setting, rows in table.groupby("setting", sort=False):
        bootstrap = ClusterBootstrap(rows["paragraph"].to_numpy(), draws, seed)
        f1 = rows["f1"].to_numpy(np.float64)
        found[str(setting)] = {
            name: spearman(f1, rows[name].to_numpy(np.float64), bootstrap).to_dict() for name in columns
        }
    return found


def spearman(one: Floats, other: Floats, bootstrap: ClusterBootstrap) -> Estimate:
    """Spearman's rank correlation of two figures [N], where both are known, with an interval over paragraphs.

    Ranks are those among all examples, also in the draws.

    Examples
    --------
    >>> bootstrap = ClusterBootstrap(np.array(["p", "q", "r"]), draws=50, seed=0)
    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 9.0]), bootstrap).value
    1.0
    """
    members = np.flatnonzero(~(np.isnan(one) | np.isnan(other)))
    if len(members) < 2:
        return Estimate(float("nan"), float("nan"), float("nan"))
    x, y = (rankdata(values[members]) - (len(members) + 1) / 2 for values in (one, other))
    codes = bootstrap.codes[members]
    parts = np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1)
    sums = bootstrap.sums(parts, codes)
    drawn = _pearson(bootstrap.weights @ sums)
    lo, hi = bootstrap.interval(drawn[:, None], np.array([len(np.unique(codes))]))
    return Estimate(float(_pearson(sums.sum(0, keepdims=True))[0]), float(lo[0]), float(hi[0]))


def _pearson(sums: Floats) -> Floats:
    """Correlation from sums [..., 6] of 1, x, y, xx, yy, xy; NaN where a figure does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(np.maximum(xx - x * x / n, 0) * np.maximum(yy - y * y / n, 0))
        return np.where(spread > 1e-9, (xy - x * y / n) / spread, np.nan)


def curves_by_outcome(
    frame: pd.DataFrame, signals: Mapping[str, Floats], correct: NDArray[np.bool_], draws: int, seed: int
) -> pd.DataFrame:
    """Means of signals by layer, of right and of wrong answers.

    Parameters
    ----------
    frame : DataFrame
        Describes the N examples: setting, paragraph.
    signals : mapping of str to array [N, L + 1]
    correct : bool array [N]

    Returns
    -------
    DataFrame
        Columns setting, layer, signal, outcome (``correct`` or ``wrong``), value, lo, hi, n.

    Examples
    --------
    >>> frame = pd.DataFrame({"setting": "en-x", "paragraph": list("pq")})
    >>> signals = {"readiness": np.array([[0.0, 1.0], [0.0, 0.5]])}
    >>> table = curves_by_outcome(frame, signals, np.array([True, False]), draws=9, seed=0)
    >>> table.loc[table["layer"] == 1, ["outcome", "value", "n"]].values.tolist()
    [['correct', 1.0, 1], ['wrong', 0.5, 1]]
    """
    tables = []
    for setting, indices in frame.groupby("setting", sort=False).indices.items():
        rows = np.asarray(indices)
        bootstrap = ClusterBootstrap(frame["paragraph"].to_numpy()[rows], draws, seed)
        for name, values in signals.items():
            for outcome, chosen in (("correct", correct[rows]), ("wrong", ~correct[rows])):
                members = np.flatnonzero(chosen)
                value, lo, hi, n = bootstrap.mean(values[rows][members], members)
                tables.append(
                    pd.DataFrame(
                        {
                            "setting": setting, "layer": np.arange(values.shape[1]), "signal": name,
                            "outcome": outcome, "value": value, "lo": lo, "hi": hi, "n": n,
                        }
                    )
                )  # fmt: skip
    return pd.concat(tables, ignore_index=True)
