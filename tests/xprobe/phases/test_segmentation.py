"""The change point is the exhaustive one, and noise without phases is not called phased."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from xprobe.phases.segmentation import MIN_SEGMENT, change_points, segment

Floats = NDArray[np.float64]


def exhaustive(signal: Floats) -> tuple[float, float, float]:
    """(onset, sharpness, rise) by trying every split; the first of equal ones."""
    best, onset = np.inf, 0
    for split in range(MIN_SEGMENT, len(signal) - MIN_SEGMENT + 1):
        error = 0.0
        for part in (signal[:split], signal[split:]):
            for value in part:
                error += (value - part.mean()) ** 2
        if error < best:
            best, onset = error, split
    total = ((signal - signal.mean()) ** 2).sum()
    return onset, 1 - best / total, signal[onset:].mean() - signal[:onset].mean()


def exact_errors(values: list[int]) -> dict[int, Fraction]:
    """Squared error of every split, without rounding."""
    errors = {}
    for split in range(MIN_SEGMENT, len(values) - MIN_SEGMENT + 1):
        parts = (values[:split], values[split:])
        errors[split] = sum(
            (Fraction(sum((value - Fraction(sum(part), len(part))) ** 2 for value in part)) for part in parts),
            Fraction(0),
        )
    return errors


def step(layers: int, onset: int, low: float = 0.32, high: float = 0.73) -> Floats:
    return np.where(np.arange(layers) < onset, low, high)


STEPS = [(layers, onset) for layers in (4, 5, 13, 31) for onset in range(MIN_SEGMENT, layers - MIN_SEGMENT + 1)]


# -- the change point ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [4, 5, 8, 13, 31, 65])
def test_the_change_point_is_the_one_of_an_exhaustive_search(layers: int) -> None:
    signals = np.random.default_rng(layers).normal(size=(60, layers))
    expected = np.array([exhaustive(signal) for signal in signals]).T
    onset, sharpness, rise = change_points(signals)
    np.testing.assert_array_equal(onset, expected[0])
    np.testing.assert_allclose(sharpness, expected[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(rise, expected[2], rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(arrays(np.float64, st.integers(4, 24), elements=st.floats(-10, 10, width=32)))
def test_no_split_leaves_less_squared_error(signal: Floats) -> None:
    assume(np.ptp(signal) > 1e-6 * np.abs(signal).max())
    (onset,), (sharpness,), (rise,) = change_points(signal[None])
    _, least, _ = exhaustive(signal)
    assert MIN_SEGMENT <= onset <= len(signal) - MIN_SEGMENT
    assert sharpness == pytest.approx(least, abs=1e-8)
    below, above = signal[: int(onset)], signal[int(onset) :]
    assert rise == pytest.approx(above.mean() - below.mean(), abs=1e-9)
    between = (len(below) * len(above) / len(signal)) * rise**2
    assert sharpness == pytest.approx(between / ((signal - signal.mean()) ** 2).sum(), abs=1e-8)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.integers(-3, 3), min_size=4, max_size=11))
def test_the_lowest_of_equal_splits_wins(values: list[int]) -> None:
    errors = exact_errors(values)
    total = sum((value - Fraction(sum(values), len(values))) ** 2 for value in values)
    assume(min(errors.values()) < total)  # some split explains something
    onset, _, _ = change_points(np.array([values], dtype=np.float64))
    assert onset[0] == min(split for split, error in errors.items() if error == min(errors.values()))


@pytest.mark.parametrize(
    "signal",
    [
        [1.0, -1.0, 0.0, 0.0, 0.0, 1.0, -1.0],
        [3.0, 1.0, 2.0, 2.0, 2.0, 3.0, 1.0],
        [0.3, 0.1, 0.2, 0.2, 0.2, 0.3, 0.1],
        [0.7, 0.1, 0.4, 0.4, 0.4, 0.4, 0.1, 0.7],
        [1.72, -0.1, 0.81, 0.81, 0.81, 1.42, 0.2],
    ],
)
def test_the_lowest_split_is_taken_with_sharpness_zero_where_no_split_explains_anything(signal: list[float]) -> None:
    (onset,), (sharpness,), (rise,) = change_points(np.array([signal]))
    assert onset == MIN_SEGMENT
    assert sharpness == pytest.approx(0.0, abs=1e-12)
    assert rise == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("layers", "onset"), STEPS)
def test_an_exact_step_is_found_at_every_possible_layer(layers: int, onset: int) -> None:
    (split,), (sharpness,), (rise,) = change_points(step(layers, onset)[None])
    assert split == onset
    assert sharpness == pytest.approx(1.0, abs=1e-12)
    assert rise == pytest.approx(0.73 - 0.32, abs=1e-12)


def test_sharpness_lies_between_zero_and_one() -> None:
    signals = np.random.default_rng(1).normal(size=(2000, 9)) ** 3
    sharpness = change_points(signals)[1]
    assert (sharpness >= 0).all()
    assert (sharpness <= 1).all()


@pytest.mark.parametrize("level", [0.0, 0.1, 1 / 3, -7.7, 1e-9, 1e9])
@pytest.mark.parametrize("layers", [4, 7, 31])
def test_a_constant_signal_has_no_onset(level: float, layers: int) -> None:
    for values in change_points(np.full((3, layers), level)):
        assert np.isnan(values).all()


@pytest.mark.parametrize("hole", [0, 5, 11])
def test_a_signal_with_nan_has_no_onset_and_changes_no_other_signal(hole: int) -> None:
    signals = np.random.default_rng(2).normal(size=(3, 12))
    whole = change_points(signals)
    signals[1, hole] = np.nan
    for before, after in zip(whole, change_points(signals), strict=True):
        assert np.isnan(after[1])
        np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_signal_too_short_to_split_has_no_onset(layers: int) -> None:
    for values in change_points(np.arange(2.0 * layers).reshape(2, layers)):
        assert values.shape == (2,)
        assert np.isnan(values).all()


def test_no_signals_give_empty_results() -> None:
    for values in change_points(np.zeros((0, 13))):
        assert values.shape == (0,)
    assert segment(np.zeros((0, 13))).phased.shape == (0,)


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0.0), (1e4, 0.0), (1.0, 100.0), (1.0, -100.0), (0.01, 3.0)])
def test_scale_and_shift_change_only_the_rise(scale: float, shift: float) -> None:
    signals = np.random.default_rng(3).normal(size=(100, 20)).cumsum(axis=1)
    plain, moved = segment(signals, seed=5), segment(signals * scale + shift, seed=5)
    np.testing.assert_array_equal(moved.onset, plain.onset)
    np.testing.assert_allclose(moved.sharpness, plain.sharpness, rtol=1e-9)
    np.testing.assert_allclose(moved.rise, plain.rise * scale, rtol=1e-7, atol=1e-9 * scale)
    np.testing.assert_array_equal(moved.phased, plain.phased)


def test_a_signal_upside_down_has_the_same_onset_and_the_opposite_rise() -> None:
    signals = np.random.default_rng(4).normal(size=(100, 15))
    up, down = change_points(signals), change_points(-signals)
    np.testing.assert_array_equal(down[0], up[0])
    np.testing.assert_allclose(down[1], up[1])
    np.testing.assert_allclose(down[2], -up[2])


# -- phased ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [13, 31])
def test_a_step_up_is_phased_at_every_onset(layers: int) -> None:
    signals = np.stack([step(layers, onset) for onset in range(MIN_SEGMENT, layers - MIN_SEGMENT + 1)])
    assert segment(signals).phased.all()


@pytest.mark.parametrize("layers", [13, 31])
def test_a_falling_signal_is_never_phased(layers: int) -> None:
    falling = np.stack([step(layers, onset, 0.73, 0.32) for onset in range(MIN_SEGMENT, layers - MIN_SEGMENT + 1)])
    result = segment(falling)
    assert (result.rise < 0).all()
    assert not result.phased.any()


def test_a_signal_without_onset_is_not_phased() -> None:
    signals = np.stack([np.full(13, 0.4), np.full(13, np.nan), step(13, 6)])
    result = segment(signals)
    np.testing.assert_array_equal(np.isnan(result.onset), [True, True, False])
    np.testing.assert_array_equal(result.phased, [False, False, True])


def test_a_step_survives_moderate_noise() -> None:
    noise = np.random.default_rng(6).normal(scale=0.08, size=(200, 31))
    result = segment(step(31, 20) + noise)
    assert result.phased.mean() > 0.99
    assert (np.abs(result.onset - 20) <= 1).mean() > 0.95


@pytest.mark.parametrize("kind", ["normal", "shuffled steps", "shuffled ramps"])
def test_signals_without_order_are_phased_as_often_as_the_test_allows(kind: str) -> None:
    # 5 % expected of 2000, its standard deviation 0.5 %, and all have the same 200 permutations
    generator = np.random.default_rng(7)
    signals = generator.normal(size=(2000, 21))
    if kind == "shuffled steps":
        signals = generator.permuted(step(21, 12) + 0.05 * signals, axis=1)
    elif kind == "shuffled ramps":
        signals = generator.permuted(np.linspace(0, 1, 21) + 0.01 * signals, axis=1)
    fraction = segment(signals).phased.mean()
    assert fraction == pytest.approx(0.05, abs=0.02)


def test_noise_is_sharper_than_its_permutations_one_time_in_twenty() -> None:
    noise = np.random.default_rng(8).normal(size=(2000, 21))
    rising, falling = segment(noise, seed=1).phased, segment(-noise, seed=1).phased
    assert not (rising & falling).any()
    assert rising.mean() == pytest.approx(0.05, abs=0.02)  # four standard deviations
    assert falling.mean() == pytest.approx(0.05, abs=0.02)


def test_a_step_that_chance_repeats_too_often_is_not_phased() -> None:
    # one of the 15 ways to order two low and four high layers is a perfect rise: 6.7 % of permutations tie
    levels = np.sort(np.random.default_rng(9).uniform(size=(200, 2)), axis=1)
    signals = np.stack([step(6, 2, low, high) for low, high in levels])
    assert not segment(signals, permutations=1000).phased.any()


def test_the_same_seed_gives_the_same_results() -> None:
    signals = np.random.default_rng(10).normal(size=(300, 15)).cumsum(axis=1)
    first, second = segment(signals, seed=3), segment(signals, seed=3)
    for name in ("onset", "sharpness", "rise", "phased"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_size_of_chunks_changes_no_result(chunk: int) -> None:
    signals = np.random.default_rng(11).normal(size=(300, 14))
    signals[[3, 100]] = [[np.nan], [1.0]]
    expected = segment(signals, permutations=50, seed=2)
    assert 0 < expected.phased.sum() < 300
    np.testing.assert_array_equal(segment(signals, permutations=50, seed=2, chunk=chunk).phased, expected.phased)


def test_the_input_is_left_as_it_was() -> None:
    signals = np.random.default_rng(12).normal(size=(20, 10))
    before = signals.copy()
    segment(signals, permutations=20)
    np.testing.assert_array_equal(signals, before)
