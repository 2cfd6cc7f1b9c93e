"""Summaries: means, shares and ratios by hand, and intervals that hold a planted ratio."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from xprobe.phases.bootstrap import ClusterBootstrap
from xprobe.scoring.relations import curves_by_outcome, spearman
from xprobe.scoring.summaries import summarise


def answers(rows: list[tuple[str, str, str, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["setting", "language", "question_id", "f1"])
    table["paragraph"] = table["question_id"].str[0]
    table["exact_match"] = table["f1"] == 1
    table["error_type"] = np.where(table["f1"] >= 0.5, "correct", "content")
    return table


BY_HAND = answers([
    ("en-x", "en", "p1", 1.0), ("en-x", "en", "p2", 0.5), ("en-x", "en", "q1", 0.0),
    ("en-x", "th", "p1", 0.5), ("en-x", "th", "q1", 0.25),
    ("x-x", "th", "p1", 0.2), ("x-x", "th", "p2", 0.4),
])  # fmt: skip


def test_by_hand() -> None:
    found = summarise(BY_HAND, draws=200, seed=0)
    assert found["en-x"]["f1"]["value"] == pytest.approx(2.25 / 5)
    assert found["en-x"]["n"] == 5
    english, thai, other = (
        found["en-x"]["languages"]["en"],
        found["en-x"]["languages"]["th"],
        found["x-x"]["languages"]["th"],
    )
    assert english["f1"]["value"] == pytest.approx(0.5)
    assert english["exact_match"]["value"] == pytest.approx(1 / 3)
    assert english["f1_ratio"]["value"] == 1
    assert english["error_types"] == {"correct": pytest.approx(2 / 3), "content": pytest.approx(1 / 3)}
    assert thai["f1_ratio"]["value"] == pytest.approx(0.75 / 1.0)  # over p1 and q1, which both have
    assert other["f1_ratio"]["value"] == pytest.approx(0.6 / 1.5)  # English answers are those of en-x
    assert other["f1"]["lo"] is None  # one paragraph: nothing to draw from


def test_without_english_there_is_no_ratio() -> None:
    found = summarise(BY_HAND[BY_HAND["language"] == "th"], draws=50, seed=0)
    assert found["en-x"]["languages"]["th"]["f1_ratio"] == {"value": None, "lo": None, "hi": None}


def test_english_answers_without_any_word_right_give_no_ratio() -> None:
    table = BY_HAND.assign(f1=np.where(BY_HAND["language"] == "en", 0.0, BY_HAND["f1"]))
    found = summarise(table, draws=50, seed=0)
    assert found["en-x"]["languages"]["th"]["f1_ratio"]["value"] is None


def test_intervals_hold_a_planted_ratio_and_repeat() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for trial in range(40):
        rows = []
        for paragraph in "abcdefghijklmnopqrst":
            level = generator.uniform(0.3, 0.9)
            for question in range(3):
                english = level * generator.uniform(0.8, 1.2)
                rows.append(("en-x", "en", f"{paragraph}{question}", english))
                rows.append(("en-x", "hi", f"{paragraph}{question}", 0.6 * english * generator.uniform(0.7, 1.3)))
        table = answers(rows)
        found = summarise(table, draws=300, seed=trial)
        ratio = found["en-x"]["languages"]["hi"]["f1_ratio"]
        held += ratio["lo"] <= 0.6 <= ratio["hi"]
        assert summarise(table, draws=300, seed=trial) == found
    assert held >= 34  # of 40, 38 expected


def test_spearman_is_that_of_scipy_and_its_interval_holds_a_planted_one() -> None:
    generator = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 5)
    one = generator.normal(size=200) + generator.normal(size=40)[clusters]
    other = np.round(one + 2 * generator.normal(size=200), 1)  # with ties
    other[::17] = np.nan
    known = ~np.isnan(other)
    found = spearman(one, other, ClusterBootstrap(clusters, draws=400, seed=0))
    assert found.value == pytest.approx(spearmanr(one[known], other[known]).statistic)
    assert found.lo < found.value < found.hi
    assert np.isnan(spearman(one, np.ones(200), ClusterBootstrap(clusters, draws=20, seed=0)).value)


def test_curves_by_outcome_are_plain_means() -> None:
    generator = np.random.default_rng(1)
    frame = pd.DataFrame({"setting": ["en-x"] * 6 + ["x-x"] * 6, "paragraph": list("ppqqrr") * 2})
    values, correct = generator.normal(size=(12, 3)), np.array([True, False] * 6)
    values[0, 1] = np.nan
    table = curves_by_outcome(frame, {"rank": values}, correct, draws=20, seed=0)
    for row in table.itertuples():
        rows = (frame["setting"] == row.setting).to_numpy() & (correct == (row.outcome == "correct"))
        assert row.value == pytest.approx(np.nanmean(values[rows, row.layer]))
        assert row.n == np.sum(~np.isnan(values[rows, row.layer]))
