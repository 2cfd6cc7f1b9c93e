"""Krippendorff's alpha against the `krippendorff` package, and in the cases that have a closed form."""

from __future__ import annotations

import krippendorff
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.intervals import interval

from xprobe.phases.alpha import krippendorff_alpha
from xprobe.phases.bootstrap import ClusterBootstrap

Floats = NDArray[np.float64]
NAN = float("nan")


def reference(ratings: Floats) -> float:
    """Alpha of ``ratings`` [raters, units] by the reference package, which refuses what has no value."""
    paired = ratings[:, (~np.isnan(ratings)).sum(0) >= 2]
    if len(np.unique(paired[~np.isnan(paired)])) < 2:
        return NAN
    return float(krippendorff.alpha(reliability_data=ratings, level_of_measurement="interval"))


def alpha(ratings: Floats) -> float:
    """Ours, of the same matrix: missing ratings stay in as NaN."""
    units = np.broadcast_to(np.arange(ratings.shape[1]), ratings.shape)
    return krippendorff_alpha(ratings.ravel(), units.ravel()).value


def random_ratings(seed: int, raters: int = 6, units: int = 25, missing: float = 0.3) -> Floats:
    generator = np.random.default_rng(seed)
    ratings = np.rint(generator.normal(15, 5, size=units) + generator.normal(0, 3, size=(raters, units)))
    ratings[generator.random(ratings.shape) < missing] = np.nan
    return ratings


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("seed", range(15))
def test_alpha_is_that_of_the_reference_package(seed: int, missing: float) -> None:
    ratings = random_ratings(seed, raters=2 + seed % 11, missing=missing)
    assert alpha(ratings) == pytest.approx(reference(ratings), abs=1e-9, nan_ok=True)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.data())
def test_alpha_is_that_of_the_reference_package_on_any_ratings(data: st.DataObject) -> None:
    raters, units = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 8))
    rating = st.one_of(st.integers(0, 30).map(float), st.just(NAN))
    ratings = np.array(data.draw(st.lists(rating, min_size=raters * units, max_size=raters * units)))
    ratings = ratings.reshape(raters, units)
    assume((~np.isnan(ratings)).any())
    assert alpha(ratings) == pytest.approx(reference(ratings), abs=1e-9, nan_ok=True)


def test_the_order_of_rows_and_missing_rows_change_nothing() -> None:
    ratings = random_ratings(3)
    values = ratings.ravel()
    units = np.broadcast_to(np.array([f"q{at}" for at in range(25)]), ratings.shape).ravel()
    order = np.random.default_rng(0).permutation(np.flatnonzero(~np.isnan(values)))
    assert krippendorff_alpha(values[order], units[order]).value == pytest.approx(alpha(ratings), abs=1e-12)


def test_a_constant_added_to_all_values_changes_nothing() -> None:
    ratings = random_ratings(4)
    assert alpha(ratings + 1e6) == pytest.approx(alpha(ratings), abs=1e-9)
    assert alpha(ratings * 1e-3) == pytest.approx(alpha(ratings), abs=1e-9)


def test_perfect_agreement_is_one() -> None:
    ratings = np.tile(np.arange(2.0, 12.0), (5, 1))
    assert alpha(ratings) == pytest.approx(1.0, abs=1e-12)
    ratings[1, 3] = ratings[2, 7] = np.nan
    assert alpha(ratings) == pytest.approx(1.0, abs=1e-12)


def test_two_raters_who_swap_two_values_by_hand() -> None:
    # D_o = 1; of the 12 ordered pairs of {0, 0, 1, 1} 8 differ by 1: D_e = 2/3
    assert alpha(np.array([[0.0, 1.0], [1.0, 0.0]])) == pytest.approx(1 - 1 / (2 / 3), abs=1e-12)


def test_labels_permuted_over_units_agree_as_chance_does() -> None:
    ratings = np.tile(np.random.default_rng(5).integers(2, 30, size=300).astype(float), (8, 1))
    shuffled = np.random.default_rng(6).permuted(ratings, axis=1)
    assert alpha(ratings) == pytest.approx(1.0, abs=1e-12)
    assert abs(alpha(shuffled)) < 0.05


@pytest.mark.parametrize(
    ("values", "units"),
    [
        ([], []),
        ([NAN, NAN], ["a", "a"]),
        ([3.0], ["a"]),
        ([3.0, 4.0, 5.0], ["a", "b", "c"]),
        ([3.0, NAN, 4.0, NAN], ["a", "a", "b", "b"]),
        ([0.1, 0.1, 0.1, 0.1, 0.1], ["a", "a", "b", "b", "b"]),
        ([0.1, 0.1, 0.1, 0.1, 7.0], ["a", "a", "b", "b", "c"]),
    ],
    ids=["empty", "all missing", "one", "all alone", "alone but for gaps", "all equal", "all that count equal"],
)
def test_alpha_without_anything_to_compare_is_nan(values: list[float], units: list[str]) -> None:
    clusters = np.array(units, dtype=str)
    for bootstrap in (None, ClusterBootstrap(clusters, 50, 0)):
        estimate = krippendorff_alpha(np.array(values, dtype=float), clusters, bootstrap)
        assert np.isnan([estimate.value, estimate.lo, estimate.hi]).all()


def test_without_a_bootstrap_there_is_no_interval() -> None:
    estimate = krippendorff_alpha(np.array([1.0, 2.0, 5.0, 6.0]), np.array([0, 0, 1, 1]))
    assert not np.isnan(estimate.value)
    assert np.isnan([estimate.lo, estimate.hi]).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_is_that_of_alpha_on_concatenated_draws(seed: int) -> None:
    ratings = random_ratings(seed, raters=4, units=18)
    ratings[:, 5] = np.nan
    paragraphs = np.broadcast_to(np.arange(18) // 3, ratings.shape)
    units = np.broadcast_to(np.arange(18), ratings.shape)
    bootstrap = ClusterBootstrap(paragraphs.ravel(), 150, seed)
    estimate = krippendorff_alpha(ratings.ravel(), units.ravel(), bootstrap)
    # a paragraph drawn twice brings its questions twice, as units of their own
    drawn = [reference(ratings[:, np.repeat(np.arange(18), np.repeat(w.astype(int), 3))]) for w in bootstrap.weights]
    held = np.array([0, 1, 2, 3, 4, 5])  # of unit 5 alone nothing is known, of its paragraph there is more
    wanted = interval(drawn, held, lambda some: reference(ratings[:, np.isin(np.arange(18) // 3, some)]))
    np.testing.assert_allclose((estimate.lo, estimate.hi), wanted, atol=1e-9)
    assert estimate.value == pytest.approx(reference(ratings), abs=1e-9)
    assert estimate.lo < estimate.value < estimate.hi


def test_units_of_one_paragraph_alone_have_no_interval() -> None:
    ratings = random_ratings(1)
    units = np.broadcast_to(np.arange(25), ratings.shape).ravel()
    estimate = krippendorff_alpha(ratings.ravel(), units, ClusterBootstrap(np.zeros(units.size), 50, 0))
    assert not np.isnan(estimate.value)
    assert np.isnan([estimate.lo, estimate.hi]).all()
