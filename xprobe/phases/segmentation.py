"""Retrieval onset: the exact single change point of the least-squares two-segment fit (phase definition 1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PHASE_DEFINITION = 1
MIN_SEGMENT = 2  # layers
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Two phases of N examples.

    Attributes
    ----------
    onset : float array [N]
        tau: first layer of phase 2; NaN where the signal is constant, incomplete or too short to split.
    sharpness : float array [N]
        Share of the signal's variance over layers that the split explains, 0 to 1; NaN with onset.
    rise : float array [N]
        Mean of phase 2 minus mean of phase 1.
    phased : bool array [N]
        The signal rises, and its sharpness beats the 95th percentile of the same fit on layer-permuted signals.
    """

    onset: Floats
    sharpness: Floats
    rise: Floats
    phased: NDArray[np.bool_]


def change_points(signals: Floats) -> tuple[Floats, Floats, Floats]:
    """Onset, sharpness and rise of every row of ``signals`` [N, K], by the split that leaves least squared error.

    Splits leave at least two layers on either side; of equal ones the lowest wins.
    """
    n, layers = signals.shape
    if layers < 2 * MIN_SEGMENT or n == 0:
        return np.full(n, np.nan), np.full(n, np.nan), np.full(n, np.nan)
    centred = signals - signals.mean(1, keepdims=True)
    total = np.square(centred).sum(1)
    splits = np.arange(MIN_SEGMENT, layers - MIN_SEGMENT + 1)
    below = np.cumsum(centred, axis=1)[:, splits - 1]
    # between-segment sum of squares of a centred signal: both segment sums are +-below
    explained = np.square(below) * (1 / splits + 1 / (layers - splits))
    # a constant signal has only rounding left after centring: it has no split
    usable = total > layers * np.square(1e-12 * np.abs(signals).max(1, initial=0.0)) + 1e-300
    best = np.where(np.isnan(explained), -1.0, explained)
    # splits that differ by rounding alone are equal: take the lowest
    close = best >= best.max(1, keepdims=True) * (1 - 1e-9) - 1e-12 * total[:, None]
    at = close.argmax(1)
    pick = np.arange(n), at
    onset = splits[at].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        sharpness = np.minimum(explained[pick] / total, 1.0)
    rise = -below[pick] * (1 / splits[at] + 1 / (layers - splits[at]))
    for values in (onset, sharpness, rise):
        values[~usable] = np.nan
    return onset, sharpness, rise


def segment(signals: Floats, permutations: int = 200, seed: int = 0, chunk: int = 256) -> Segmentation:
    """Onsets of ``signals`` [N, K], and the test against ``permutations`` layer-permuted copies of each row.

    All rows meet the same permutations, so a row's verdict depends on its own values and the seed alone.
    """
    onset, sharpness, rise = change_points(signals)
    generator = np.random.default_rng(seed)
    orders = np.array([generator.permutation(signals.shape[1]) for _ in range(permutations)])
    threshold = np.full(len(signals), np.inf)
    usable = np.flatnonzero(~np.isnan(onset))
    for start in range(0, len(usable), chunk):
        rows = usable[start : start + chunk]
        shuffled = signals[rows][:, orders].reshape(-1, signals.shape[1])
        null = change_points(shuffled)[1].reshape(len(rows), permutations)
        threshold[rows] = np.percentile(null, 95, axis=1)
    with np.errstate(invalid="ignore"):
        phased = (rise > 0) & (sharpness > threshold + 1e-9)  # a permutation that repeats the signal does not beat it
    return Segmentation(onset, sharpness, rise, phased)
