"""Claims over models: each statistic is right, and the verdict is no bolder than the interval."""

from __future__ import annotations

from math import isnan, nan
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr

from xprobe.config import StudyConfig
from xprobe.phases.across_models import Drawn, correlation_difference, mean_over_models
from xprobe.phases.bootstrap import Estimate
from xprobe.sweeps.claims import ABOVE, ALIKE, APART, CLAIMS, NO_HELP, NOT_ABOVE, Region, Row, claim_rows
from xprobe.sweeps.plan import SweepModel, SweepPlan

DRAWS = 400


def fixed(value: float) -> Drawn:
    return Drawn(value, np.full(DRAWS, value))


def row(lo: float, hi: float, supported: Region, refuted: Region, models: int = 8) -> tuple[str, str]:
    return Row(1, "", Estimate((lo + hi) / 2, lo, hi), models, supported, refuted, 6, "answers").verdict()


@pytest.mark.parametrize(
    ("interval", "regions", "verdict"),
    [
        ((0.1, 0.9), (ABOVE, NOT_ABOVE), "supported"),
        ((-0.9, 0.0), (ABOVE, NOT_ABOVE), "refuted"),
        ((0.0, 0.9), (ABOVE, NOT_ABOVE), "undecided"),
        ((0.0, 0.0), (ABOVE, NOT_ABOVE), "undecided"),  # no width: the draws say nothing
        ((-0.04, 0.04), (ALIKE, APART), "supported"),
        ((-0.04, 0.06), (ALIKE, APART), "undecided"),
        ((0.06, 0.2), (ALIKE, APART), "refuted"),
        ((-0.2, -0.06), (APART, ALIKE), "supported"),
        ((-0.8, 0.2), (NO_HELP, ABOVE), "supported"),
        ((0.1, 0.2), (NO_HELP, ABOVE), "refuted"),
        ((-0.8, 0.5), (NO_HELP, ABOVE), "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(interval: Any, regions: Any, verdict: str) -> None:
    assert row(*interval, *regions)[0] == verdict
    assert row(*interval, *regions, models=5)[0] == "undecided"


def test_a_mean_over_models_has_the_interval_of_student() -> None:
    values = [0.1, 0.2, 0.6, 0.3]
    found = mean_over_models([fixed(value) for value in values])
    half = 3.182446 * np.std(values, ddof=1) / 2
    assert found.value == pytest.approx(0.3)
    assert (found.lo, found.hi) == pytest.approx((0.3 - half, 0.3 + half))
    assert isnan(mean_over_models([fixed(0.2)]).lo)
    assert isnan(mean_over_models([]).value)
    assert mean_over_models([fixed(nan), fixed(0.2), fixed(0.4)]).value == pytest.approx(0.3)


def test_its_interval_holds_the_truth_of_other_models_in_about_95_of_100_trials() -> None:
    """Also if the paragraphs, which all models share, were lucky."""
    random, held = np.random.default_rng(1), 0
    for _ in range(400):
        luck, noise = random.normal(0, 0.5), random.normal(0, 0.5, DRAWS)
        drawn = [Drawn(value + luck, value + luck + noise) for value in random.normal(1, 1, 5)]
        found = mean_over_models(drawn)
        held += found.lo <= 1 <= found.hi
    assert 0.92 <= held / 400 <= 0.995


def test_a_difference_of_correlations_is_that_of_the_two() -> None:
    random = np.random.default_rng(2)
    x, less, y = random.normal(size=(3, 7))
    found = correlation_difference(*([fixed(one) for one in values] for values in (x, less, y)), "pearson", 0)
    assert found.value == pytest.approx(pearsonr(x, y).statistic - pearsonr(less, y).statistic)
    assert -2 <= found.lo < found.hi <= 2


def planted(count: int = 12) -> tuple[dict[str, dict[str, Drawn]], SweepPlan, dict[str, float]]:
    """Models on which all four claims hold: F1 goes with stability and late readiness, not with size."""
    random = np.random.default_rng(5)
    figures, models, sizes = {}, [], {}
    for number in range(count):
        skill = number / count
        base = {
            "stability": fixed(0.5 + skill / 3),
            "alpha": fixed(skill),
            "f1": fixed(skill),
            "encoding": fixed(0.3 + random.normal(0, 0.01)),
            "late": fixed(0.4 + random.normal(0, 0.02)),
            "phase 2, early": fixed(random.normal()),
            "phase 2, late": fixed(skill),
            "found": fixed(0.2 + skill / 9),
        }
        tuned = {**base, "encoding": fixed(base["encoding"].value + random.normal(0, 0.01)),
                 "late": fixed(base["late"].value + 0.2 + random.normal(0, 0.02))}  # fmt: skip
        figures |= {f"base-{number}": base, f"chat-{number}": tuned}
        models.append(SweepModel(f"base-{number}", StudyConfig("b"), role="base"))
        models.append(SweepModel(f"chat-{number}", StudyConfig("c"), role="post-trained", base=f"base-{number}"))
        sizes[f"base-{number}"] = float((number * 7) % 5 + 1) * 1e9 - 1e8 * number
    return figures, SweepPlan(tuple(models)), sizes


def verdicts(figures: Any, plan: SweepPlan, sizes: Any) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for one in claim_rows(figures, plan, sizes, seed=0):
        found.setdefault(one.claim, set()).add(one.verdict()[0])
    return found


def test_planted_claims_are_supported_and_planted_contradictions_refuted() -> None:
    figures, plan, sizes = planted(24)
    found = verdicts(figures, plan, sizes)
    assert set(found) == set(CLAIMS)
    assert found[1] == found[2] == found[3] == found[4] == {"supported"}
    against = {
        name: {**own, "stability": fixed(-own["stability"].value), "alpha": fixed(-own["alpha"].value),
               "found": fixed(-own["found"].value), "phase 2, late": own["phase 2, early"],
               "phase 2, early": own["phase 2, late"], "encoding": fixed(-0.2 if "base" in name else 0.4),
               "late": fixed(0.4 + own["encoding"].value / 50)}
        for name, own in figures.items()
    }  # fmt: skip
    grown = {f"base-{number}": 1e9 * (number + 1) for number in range(24)}
    assert verdicts(against, plan, grown) == {1: {"refuted"}, 2: {"refuted"}, 3: {"refuted"}, 4: {"refuted"}}


def test_few_models_or_none_are_said_to_be_too_few() -> None:
    figures, plan, sizes = planted(12)
    few = {name: figures[name] for name in list(figures)[:4]}
    assert verdicts(few, plan, sizes)[1] == {"undecided"}
    assert verdicts(few, plan, sizes)[4] == {"not tested"}
    (first, *_) = claim_rows({}, plan, sizes, 0)
    assert first.verdict() == ("not tested", "needs answers of at least 3 models that differ")
    without = {name: {"f1": own["f1"]} for name, own in figures.items()}
    assert {one.verdict()[0] for one in claim_rows(without, plan, sizes, 0) if one.claim in (2, 3)} == {"not tested"}
