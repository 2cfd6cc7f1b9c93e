"""Depth of relevance: definitions by hand, and what must hold for any relevance."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from xprobe.phases.depth import major_relevance_depth, relevance_shares, weighted_depth

VALUES = arrays(np.float64, (6, 4), elements=st.floats(-10, 10, allow_subnormal=False))


def by_hand(column: np.ndarray, first: int) -> float:
    total = sum(column[first:])
    running = 0.0
    for layer in range(first, len(column)):
        running += column[layer]
        if running >= 0.95 * total * (1 - 1e-12):
            return float(layer)
    return float("nan")


@given(VALUES, st.booleans(), st.booleans())
def test_depth_is_the_first_layer_that_reaches_its_share(values: np.ndarray, positive: bool, embeddings: bool) -> None:
    amounts = np.maximum(values, 0) if positive else np.abs(values)
    first = 0 if embeddings else 1
    found = major_relevance_depth(values, positive=positive, embeddings=embeddings)
    for token in range(4):
        if amounts[first:, token].sum() > 0:
            assert found[token] == by_hand(amounts[:, token], first)
        else:
            assert np.isnan(found[token])


@given(VALUES)
def test_shares_sum_to_one(values: np.ndarray) -> None:
    shares = relevance_shares(values, np.array([0, 1, 1, 3]), 4)
    known = np.abs(values).sum(1) > 0
    assert np.allclose(shares[known].sum(1), 1)
    assert np.isnan(shares[~known]).all()
    assert (shares[known][:, 2] == 0).all()


def test_weighted_depth_leaves_out_tokens_without_relevance() -> None:
    mean, quartiles = weighted_depth(np.array([np.nan, 2.0, 6.0, 10.0]), np.array([0.0, 1.0, 2.0, 1.0]))
    assert mean == pytest.approx(6.0)
    assert quartiles.tolist() == [2.0, 6.0, 6.0]
    mean, quartiles = weighted_depth(np.array([np.nan]), np.array([0.0]))
    assert np.isnan(mean)
    assert np.isnan(quartiles).all()
