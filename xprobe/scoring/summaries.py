"""Means of F1 and EM, shares of error types, and ratios between settings, with intervals over paragraphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.phases.bootstrap import ClusterBootstrap, Estimate
from xprobe.scoring.error_types import ERROR_TYPES

MEASURES = ("f1", "exact_match")
NOTHING = Estimate(float("nan"), float("nan"), float("nan"))


def summarise(answers: pd.DataFrame, draws: int, seed: int) -> dict[str, Any]:
    """Summaries of each setting, and of each of its languages.

    Parameters
    ----------
    answers : DataFrame
        One row per answer: setting, language, question_id, paragraph, f1, exact_match, error_type.
    draws : int
        Bootstrap samples of paragraphs.
    seed : int

    Returns
    -------
    dict
        By setting: ``f1``, ``exact_match`` ({value, lo, hi}), ``error_types`` (shares), ``n``, and ``languages`` with
        the same for each language. A language also has ``f1_ratio`` and ``exact_match_ratio``: its mean as a share of
        that of English questions on English contexts, over the questions that both have.

    Examples
    --------
    >>> answers = pd.DataFrame({
    ...     "setting": ["en-x"] * 4, "language": ["en", "en", "th", "th"], "question_id": list("abab"),
    ...     "paragraph": list("pqpq"), "f1": [1.0, 0.5, 0.5, 0.25], "exact_match": [True, False, False, False],
    ...     "error_type": ["correct", "correct", "correct", "content"],
    ... })
    >>> found = summarise(answers, draws=100, seed=0)["en-x"]
    >>> found["f1"]["value"], found["languages"]["th"]["f1_ratio"]["value"]
    (0.5625, 0.5)
    >>> found["languages"]["th"]["error_types"]
    {'correct': 0.5, 'content': 0.5}
    """
    bootstrap = ClusterBootstrap(answers["paragraph"].to_numpy(), draws, seed)
    english = answers.reset_index(drop=True)
    english = english[english["language"] == "en"].drop_duplicates("question_id")  # en-en is in either setting
    found: dict[str, Any] = {}
    for setting, rows in answers.reset_index(drop=True).groupby("setting", sort=False):
        languages = {
            str(language): _summary(own, bootstrap) | _ratios(own, english, bootstrap)
            for language, own in rows.groupby("language", sort=False)
        }
        found[str(setting)] = {**_summary(rows, bootstrap), "languages": languages}
    return found


def _summary(rows: pd.DataFrame, bootstrap: ClusterBootstrap) -> dict[str, Any]:
    members = rows.index.to_numpy()
    values = rows[list(MEASURES)].to_numpy(np.float64)
    value, lo, hi, _ = bootstrap.mean(values, members)
    parts = zip(MEASURES, value.tolist(), lo.tolist(), hi.tolist(), strict=True)
    measures = {name: Estimate(*part).to_dict() for name, *part in parts}
    counts = rows["error_type"].value_counts()
    shares = {name: float(counts[name] / len(rows)) for name in ERROR_TYPES if name in counts}
    return {**measures, "error_types": shares, "n": len(rows)}


def _ratios(rows: pd.DataFrame, english: pd.DataFrame, bootstrap: ClusterBootstrap) -> dict[str, Any]:
    """Ratios of means over the questions that both have; both are drawn together."""
    index = english.set_index("question_id")
    both = rows[rows["question_id"].isin(index.index)]
    found = {}
    for name in MEASURES:
        own = both[name].to_numpy(np.float64)
        other = index.loc[both["question_id"], name].to_numpy(np.float64)
        found[f"{name}_ratio"] = ratio(own, other, both.index.to_numpy(), bootstrap).to_dict()
    return found


def ratio(values: NDArray, others: NDArray, members: NDArray, bootstrap: ClusterBootstrap) -> Estimate:
    """Mean of ``values`` [n] divided by that of ``others`` [n], with an interval; both in the same draws.

    ``members`` [n] are the examples, as indices into the clusters of ``bootstrap``.

    Examples
    --------
    >>> bootstrap = ClusterBootstrap(np.array(["p", "q"]), draws=100, seed=0)
    >>> ratio(np.array([0.5, 1.0]), np.array([1.0, 2.0]), np.array([0, 1]), bootstrap)
    Estimate(value=0.5, lo=0.5, hi=0.5)
    """
    if not len(values):
        return NOTHING
    codes = bootstrap.codes[members]
    own, other = (bootstrap.sums(part, codes) for part in (values, others))
    if not other.sum():
        return NOTHING
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (bootstrap.weights @ own) / (bootstrap.weights @ other)
    drawn = np.where(np.isfinite(drawn), drawn, np.nan)
    lo, hi = bootstrap.interval(drawn[:, None], np.array([len(np.unique(codes))]))
    return Estimate(float(own.sum() / other.sum()), float(lo[0]), float(hi[0]))
