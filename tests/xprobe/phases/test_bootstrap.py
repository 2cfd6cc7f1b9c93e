"""Intervals from drawn paragraphs equal a literal bootstrap that puts the drawn paragraphs side by side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from support.intervals import interval

from xprobe.phases.bootstrap import ClusterBootstrap, Estimate

Floats = NDArray[np.float64]
NAN = float("nan")


def literal(
    bootstrap: ClusterBootstrap, clusters: NDArray, values: Floats, statistic: Callable[[Floats], float]
) -> tuple[float, float]:
    """95 % interval from samples put together cluster by cluster, each as often as it was drawn; see ``interval``.

    Only the mean is corrected for bias and skewness: a median has no smooth influence of each cluster.
    """
    names = sorted(set(clusters.tolist()))
    drawn = []
    for weights in bootstrap.weights:
        parts = [
            values[clusters == name] for name, times in zip(names, weights, strict=True) for _ in range(int(times))
        ]
        sample = np.concatenate(parts)
        sample = sample[~np.isnan(sample)]
        drawn.append(statistic(sample) if len(sample) else NAN)
    held = np.array([name for name in names if (~np.isnan(values[clusters == name])).any()])
    values, clusters = values[~np.isnan(values)], clusters[~np.isnan(values)]
    return interval(drawn, held, lambda some: statistic(values[np.isin(clusters, some)]), statistic is np.mean)


def study(seed: int, n_clusters: int = 7) -> tuple[NDArray, Floats]:
    """Clusters of unequal size in mixed order, and whole-numbered values with many ties and some gaps."""
    generator = np.random.default_rng(seed)
    clusters = np.repeat([f"p{at}" for at in range(n_clusters)], generator.integers(1, 7, size=n_clusters))
    clusters = generator.permutation(clusters)
    values = generator.integers(2, 9, size=len(clusters)).astype(float)
    values[generator.random(len(values)) < 0.2] = np.nan
    return clusters, values


# -- draws ----------------------------------------------------------------------------------------------------------


def test_every_draw_takes_as_many_clusters_as_there_are() -> None:
    weights = ClusterBootstrap(np.repeat(np.arange(9), 3), 500, 0).weights
    assert weights.shape == (500, 9)
    assert (weights.sum(1) == 9).all()
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.mean(0), 1.0, atol=0.2)


def test_the_same_seed_gives_the_same_intervals_and_another_gives_others() -> None:
    clusters, values = study(0)
    same = [ClusterBootstrap(clusters, 200, 5).mean(values[:, None]) for _ in range(2)]
    for first, second in zip(*same, strict=True):
        np.testing.assert_array_equal(first, second)
    other = ClusterBootstrap(clusters, 200, 6).mean(values[:, None])
    assert other[0] == same[0][0]
    assert (other[1], other[2]) != (same[0][1], same[0][2])


def test_every_figure_uses_the_same_draws() -> None:
    clusters, values = study(1)
    bootstrap = ClusterBootstrap(clusters, 200, 0)
    first = bootstrap.median(values)
    bootstrap.mean(np.stack([values, values], 1))
    assert bootstrap.median(values) == first


# -- value ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_value_is_the_plain_mean_or_median_without_nan(seed: int) -> None:
    clusters, values = study(seed)
    bootstrap = ClusterBootstrap(clusters, 100, seed)
    value, _, _, n = bootstrap.mean(np.stack([values, values**2], 1))
    np.testing.assert_allclose(value, [np.nanmean(values), np.nanmean(values**2)])
    assert n.tolist() == [np.sum(~np.isnan(values))] * 2
    assert bootstrap.median(values).value == np.nanmedian(values)


def test_nan_is_left_out_column_by_column() -> None:
    values = np.array([[1.0, NAN], [3.0, 4.0], [NAN, 8.0], [5.0, NAN]])
    value, _, _, n = ClusterBootstrap(np.arange(4), 50, 0).mean(values)
    np.testing.assert_allclose(value, [3.0, 6.0])
    assert n.tolist() == [3, 2]


def test_a_column_of_nan_has_no_value_and_changes_no_other_column() -> None:
    values = np.array([[1.0, NAN], [3.0, NAN], [4.0, NAN]])
    value, lo, hi, n = ClusterBootstrap(np.arange(3), 50, 0).mean(values)
    assert np.isnan([value[1], lo[1], hi[1]]).all()
    assert not np.isnan([value[0], lo[0], hi[0]]).any()
    assert n.tolist() == [3, 0]


def test_the_median_of_nan_alone_is_nan() -> None:
    estimate = ClusterBootstrap(np.arange(3), 50, 0).median(np.full(3, NAN))
    assert np.isnan([estimate.value, estimate.lo, estimate.hi]).all()


# -- interval -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_clusters", [2, 3, 7, 8])
@pytest.mark.parametrize("seed", range(5))
def test_the_interval_of_the_mean_is_that_of_concatenated_draws(seed: int, n_clusters: int) -> None:
    clusters, values = study(seed, n_clusters)
    values[np.flatnonzero(clusters == "p0")[0]] = 4.0  # at least two clusters with a value
    values[np.flatnonzero(clusters == "p1")[0]] = 7.0
    bootstrap = ClusterBootstrap(clusters, 120, seed)
    _, (lo,), (hi,), _ = bootstrap.mean(values[:, None])
    np.testing.assert_allclose((lo, hi), literal(bootstrap, clusters, values, np.mean), atol=1e-12)


@pytest.mark.parametrize("n_clusters", [2, 3, 7, 8])
@pytest.mark.parametrize("seed", range(5))
def test_the_interval_of_the_median_is_that_of_concatenated_draws(seed: int, n_clusters: int) -> None:
    clusters, values = study(seed, n_clusters)
    values[np.flatnonzero(clusters == "p0")[0]] = 4.0
    values[np.flatnonzero(clusters == "p1")[0]] = 7.0
    bootstrap = ClusterBootstrap(clusters, 120, seed)
    estimate = bootstrap.median(values)
    np.testing.assert_allclose((estimate.lo, estimate.hi), literal(bootstrap, clusters, values, np.median), atol=1e-12)


def test_the_median_of_an_even_sample_lies_between_its_middle_values() -> None:
    # two clusters of two: drawn twice each, 1 1 2 2 or 8 8 9 9 (medians 1.5 and 8.5), else 1 2 8 9 (median 5)
    bootstrap = ClusterBootstrap(np.array([0, 0, 1, 1]), 400, 0)
    estimate = bootstrap.median(np.array([1.0, 2.0, 8.0, 9.0]))
    assert estimate == Estimate(5.0, 1.5, 8.5)


def test_members_choose_the_examples() -> None:
    clusters, values = study(3)
    members = np.flatnonzero(np.random.default_rng(3).random(len(values)) < 0.6)
    bootstrap = ClusterBootstrap(clusters, 120, 0)
    only = np.full(len(values), NAN)
    only[members] = values[members]
    value, (lo,), (hi,), n = bootstrap.mean(values[members, None], members)
    assert value[0] == pytest.approx(np.nanmean(values[members]))
    assert n[0] == np.sum(~np.isnan(values[members]))
    np.testing.assert_allclose((lo, hi), literal(bootstrap, clusters, only, np.mean), atol=1e-12)
    assert bootstrap.median(values[members], members) == bootstrap.median(only)


def test_one_cluster_has_no_interval() -> None:
    bootstrap = ClusterBootstrap(np.zeros(6), 50, 0)
    values = np.arange(6.0)
    value, lo, hi, n = bootstrap.mean(values[:, None])
    assert (value[0], n[0]) == (2.5, 6)
    assert np.isnan([lo, hi]).all()
    estimate = bootstrap.median(values)
    assert estimate.value == 2.5
    assert np.isnan([estimate.lo, estimate.hi]).all()


def test_values_from_one_cluster_alone_have_no_interval_though_there_are_others() -> None:
    # an interval of width zero would claim certainty
    clusters = np.repeat(np.arange(5), 3)
    members = np.arange(3)
    bootstrap = ClusterBootstrap(clusters, 100, 0)
    values = np.array([2.0, 3.0, 7.0])
    _, lo, hi, _ = bootstrap.mean(values[:, None], members)
    estimate = bootstrap.median(values, members)
    assert np.isnan([lo[0], hi[0]]).all()
    assert np.isnan([estimate.lo, estimate.hi]).all()


def test_no_examples_give_no_figures() -> None:
    bootstrap = ClusterBootstrap(np.zeros(0), 20, 0)
    value, lo, hi, n = bootstrap.mean(np.zeros((0, 3)))
    assert np.isnan([value, lo, hi]).all()
    assert n.tolist() == [0, 0, 0]
    assert np.isnan(bootstrap.median(np.zeros(0)).value)


def coverage(of_examples: bool, median: bool = False, studies: int = 200) -> float:
    """How often the interval holds the truth (0), over studies of 24 paragraphs with 4 questions each."""
    generator = np.random.default_rng(12)
    paragraphs = np.repeat(np.arange(24), 4)
    held = 0
    for seed in range(studies):
        values = generator.normal(size=24)[paragraphs] + generator.normal(scale=0.7, size=96)
        bootstrap = ClusterBootstrap(np.arange(96) if of_examples else paragraphs, 300, seed)
        if median:
            estimate = bootstrap.median(values)
            lo, hi = estimate.lo, estimate.hi
        else:
            _, (lo,), (hi,), _ = bootstrap.mean(values[:, None])
        held += lo <= 0 <= hi
    return held / studies


@pytest.mark.parametrize("median", [False, True], ids=["mean", "median"])
def test_intervals_contain_the_true_value_about_as_often_as_stated(median: bool) -> None:
    assert 0.85 <= coverage(of_examples=False, median=median) <= 0.99


def test_intervals_from_drawn_examples_contain_the_true_value_too_rarely() -> None:
    assert coverage(of_examples=True) < 0.85


# -- estimate -------------------------------------------------------------------------------------------------------


def test_an_estimate_becomes_plain_values_with_none_for_nan() -> None:
    assert Estimate(0.5, NAN, NAN).to_dict() == {"value": 0.5, "lo": None, "hi": None}
    assert Estimate(0.5, 0.25, 0.75).to_dict() == {"value": 0.5, "lo": 0.25, "hi": 0.75}
