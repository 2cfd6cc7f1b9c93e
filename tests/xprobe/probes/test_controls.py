"""Folds keep paragraphs apart, shuffles stay within groups, and intervals allow for shared training data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from xprobe.probes.controls import fold_interval, majority, paragraph_folds, shuffle_within

PARAGRAPHS = np.repeat([f"p{i}" for i in range(7)], [3, 5, 1, 4, 6, 2, 2])


def test_no_paragraph_lies_in_training_and_test():
    folds = paragraph_folds(PARAGRAPHS, 5)
    assert len(folds) == 5
    for train, test in folds:
        assert not set(PARAGRAPHS[train]) & set(PARAGRAPHS[test])
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(len(PARAGRAPHS)))


def test_fewer_paragraphs_make_fewer_folds_and_one_makes_none():
    assert len(paragraph_folds(np.array(["a", "a", "b"]), 5)) == 2
    assert paragraph_folds(np.array(["a", "a"]), 5) == []


def test_shuffling_stays_within_groups_and_depends_on_the_seed_alone():
    order = shuffle_within(PARAGRAPHS, 1)
    assert sorted(order) == list(range(len(PARAGRAPHS)))
    assert (PARAGRAPHS[order] == PARAGRAPHS).all()
    assert np.array_equal(order, shuffle_within(PARAGRAPHS, 1))
    assert not np.array_equal(order, shuffle_within(PARAGRAPHS, 2))


def test_the_majority_is_that_of_the_training_labels():
    assert majority(np.array(list("aab")), np.array(list("abbb"))) == 0.25


def test_the_interval_of_folds_allows_for_their_common_training_data():
    scores = [0.5, 0.6, 0.55, 0.7, 0.65]
    mean, lo, hi = fold_interval(scores)
    half = stats.t.ppf(0.975, 4) * np.std(scores, ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert (mean, lo, hi) == pytest.approx((0.6, 0.6 - half, 0.6 + half))
    assert fold_interval([*scores, float("nan")]) == pytest.approx((mean, lo, hi))
    assert fold_interval([1.0, 0.9, 1.0])[2] == 1.0
    assert np.isnan(fold_interval([0.5])[1])
    assert np.isnan(fold_interval([])[0])
