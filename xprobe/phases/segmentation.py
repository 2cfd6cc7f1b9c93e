"""Retrieval onset: the exact single change point of the least-squares two-segment fit (phase definition 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

PHASE_DEFINITION = 1
MIN_SEGMENT = 2  # layers
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """Two phases of N examples.

    Attributes
    ----------
    onset : float array [N]
        tau, the first layer of phase 2; NaN where the signal is constant, incomplete or too short to split.
    sharpness : float array [N]
        Share of the signal's variance over layers that the split explains, 0 to 1; NaN with onset.
    rise : float array [N]
        Mean of phase 2 minus mean of phase 1.
    phased : bool array [N]
        Whether the signal rises, and its sharpness is above the 95th percentile of the same fit on layer-permuted
        signals. Permuted signals that fall count as 0 there.
    """

    onset: Floats
    sharpness: Floats
    rise: Floats
    phased: NDArray[np.bool_]


def change_points(signals: Floats, layers: NDArray[np.int64] | None = None) -> tuple[Floats, Floats, Floats]:
    """Onset, sharpness and rise of every signal, by the split that leaves the least squared error.

    Splits leave at least two layers on either side; of equal ones the lowest wins.

    Parameters
    ----------
    signals : array [N, K]
    layers : int array [N], optional
        How many layers of each row count, from the first on; all of them if None.

    Returns
    -------
    onset, sharpness, rise : arrays [N]
        As in ``Segmentation``.

    Examples
    --------
    >>> onset, sharpness, rise = change_points(np.array([[0.25, 0.25, 0.25, 0.75, 0.75]]))
    >>> onset.tolist(), sharpness.tolist(), rise.tolist()
    ([3.0], [1.0], [0.5])
    """
    n, width = signals.shape
    if width < 2 * MIN_SEGMENT or n == 0:
        return np.full(n, np.nan), np.full(n, np.nan), np.full(n, np.nan)
    size: NDArray[np.int64] = np.full(n, width) if layers is None else layers
    counted = np.less(np.arange(width)[None], size[:, None])
    centred = np.where(counted, signals - _row_means(signals, counted), 0.0)
    total = np.square(centred).sum(1)
    splits = np.arange(MIN_SEGMENT, width - MIN_SEGMENT + 1)
    below = np.cumsum(centred, axis=1)[:, splits - 1]
    allowed = np.less_equal(splits[None], size[:, None] - MIN_SEGMENT)
    # between-segment sum of squares of a centred signal: the two segment sums are below and -below
    inverse = 1 / splits + 1 / np.where(allowed, size[:, None] - splits, 1)
    explained = np.where(allowed, np.square(below) * inverse, -1.0)
    # a constant signal has only rounding left after centring: it has no split
    largest = np.where(counted, np.abs(signals), 0.0).max(1, initial=0.0)
    usable = allowed.any(1) & (total > size * np.square(1e-12 * largest) + 1e-300)
    best = np.where(np.isnan(explained), -1.0, explained)
    # splits that differ by rounding alone are equal: take the lowest
    close = best >= best.max(1, keepdims=True) * (1 - 1e-9) - 1e-12 * total[:, None]
    chosen = np.arange(n), close.argmax(1)
    onset = splits[chosen[1]].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        sharpness = np.minimum(explained[chosen] / total, 1.0)
    rise = -below[chosen] * inverse[chosen]
    for values in (onset, sharpness, rise):
        values[~usable] = np.nan
    return onset, sharpness, rise


def _row_means(signals: Floats, counted: NDArray[np.bool_]) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counted, signals, 0.0).sum(1, keepdims=True) / counted.sum(1, keepdims=True)


def encoding_depths(curves: Floats) -> tuple[Floats, Floats]:
    """Encoding depth kappa, and the layer of the maximum, of mean encoding by layer.

    Kappa is the change point of the curve from layer 1 to the layer after its maximum. The layer after it counts,
    because a segment has two layers, and a curve that rises at once is at its maximum in the first of them. Of equal
    maxima the lowest layer counts. Layer 0 is left out: the last token of a prompt is the same whatever the question,
    so nothing can be encoded there.

    Parameters
    ----------
    curves : array [N, K]

    Returns
    -------
    depth : array [N]
        NaN where the curve has fewer than four such layers, does not rise or is not known everywhere.
    peak : array [N]
        NaN where the curve is not known everywhere.

    Examples
    --------
    >>> encoding_depths(np.array([[0.4, 0.5, 0.5, 0.9, 1.0, 0.8, 0.7]]))
    (array([3.]), array([4.]))
    """
    after = curves[:, 1:]
    known: NDArray[np.bool_] = np.isnan(after).sum(1) == 0
    if not after.shape[1]:
        return np.full(len(curves), np.nan), np.full(len(curves), np.nan)
    after = np.where(known[:, None], after, 0.0)
    peak = (after >= after.max(1, keepdims=True) - 1e-9).argmax(1)  # layers that differ by rounding are equal
    onset, _, rise = change_points(after, np.minimum(peak + 2, after.shape[1]))
    with np.errstate(invalid="ignore"):
        depth = np.where(known & (rise > 0), onset + 1, np.nan)
    return depth, np.where(known, peak + 1.0, np.nan)


def segment(
    signals: Floats, permutations: int = 200, seed: int = 0, level: float = 0.05, chunk: int = 256
) -> Segmentation:
    """Onsets of signals, and the test of each against layer-permuted copies of itself.

    A copy counts with its sharpness if it rises, and with 0 if it falls. The threshold is the sharpness of one of the
    copies, not a value between two: at most the share ``level`` of signals without phases is taken for phased. All
    rows get the same permutations: the result of a row depends on its own values and the seed alone.

    Parameters
    ----------
    signals : array [N, K]
    permutations : int
        Copies of each row.
    seed : int
        Of the permutations.
    level : float
        Share of signals without phases that the test may take for phased.
    chunk : int
        Rows tested at a time; changes no result.

    Returns
    -------
    Segmentation

    Examples
    --------
    >>> step, zigzag = np.repeat([0.25, 0.75], 8), np.tile([0.25, 0.75], 8)
    >>> phases = segment(np.stack([step, zigzag]))
    >>> phases.onset[0], phases.phased.tolist()
    (np.float64(8.0), [True, False])
    """
    onset, sharpness, rise = change_points(signals)
    generator = np.random.default_rng(seed)
    orders = np.array([generator.permutation(signals.shape[1]) for _ in range(permutations)])
    threshold = np.full(len(signals), np.inf)
    usable = np.flatnonzero(~np.isnan(onset))
    for start in range(0, len(usable), chunk):
        rows = usable[start : start + chunk]
        permuted = signals[rows][:, orders].reshape(-1, signals.shape[1])
        _, null, null_rise = change_points(permuted)
        null = np.where(null_rise > 0, null, 0.0).reshape(len(rows), permutations)
        threshold[rows] = np.percentile(null, 100 * (1 - level), axis=1, method="higher")
    with np.errstate(invalid="ignore"):
        # a copy that equals the signal is as sharp as the signal, up to rounding
        phased = (rise > 0) & (sharpness > threshold + 1e-9)
    return Segmentation(onset, sharpness, rise, phased)


class PhaseSegmenter(TransformerMixin, BaseEstimator):
    """``segment`` as a scikit-learn transformer: readiness curves in, phases out (phase definition 1).

    Parameters
    ----------
    permutations : int
        Layer-permuted copies behind the test.
    level : float
        Share of signals without phases that the test takes for phased.
    random_state : int
        Seed of the permutations.

    Attributes
    ----------
    onset_, sharpness_, rise_ : float array [n]
    phased_ : bool array [n]
        Of the curves given to ``fit``; see ``Segmentation``.

    Examples
    --------
    >>> curves = np.repeat([[0.25, 0.75]], 8, axis=1)
    >>> PhaseSegmenter().fit_transform(curves).tolist()
    [[8.0, 1.0, 0.5, 1.0]]
    """

    def __init__(self, permutations: int = 200, level: float = 0.05, random_state: int = 0) -> None:
        self.permutations = permutations
        self.level = level
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Segments the curves X [n, K], one row per example; a row with a NaN gets no onset.

        Raises
        ------
        ValueError
            ``permutations`` or ``level`` is out of its range.
        """
        if not isinstance(self.permutations, int) or self.permutations < 20:
            raise ValueError(f"permutations must be a whole number of at least 20, got {self.permutations!r}")
        if not 0 < self.level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {self.level!r}")
        X = validate_data(self, X, dtype=np.float64, ensure_all_finite="allow-nan")
        phases = self._segment(X)
        self.onset_, self.sharpness_, self.rise_ = phases.onset, phases.sharpness, phases.rise
        self.phased_ = phases.phased
        return self

    def transform(self, X: Any) -> Floats:
        """Columns onset, sharpness, rise, phased (0 or 1) of the curves X [n, K]; nothing from ``fit`` is used."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, ensure_all_finite="allow-nan", reset=False)
        phases = self._segment(X)
        return np.stack([phases.onset, phases.sharpness, phases.rise, phases.phased.astype(np.float64)], 1)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray:
        """Names of the columns."""
        return np.array(["onset", "sharpness", "rise", "phased"], dtype=object)

    def _segment(self, X: Floats) -> Segmentation:
        return segment(X, self.permutations, self.random_state, self.level)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags
