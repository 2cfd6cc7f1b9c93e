"""What patched states do to the answer: curves over layers, and the layers where they cross 1/2.

A run on a question g prefers its own answer y; one on g' prefers y'. After a patch, the preference
``log p(y') - log p(y)`` has moved from that of g towards that of g'. Curves are of the pairs that the model tells
apart: those where asking g' instead of g moves the preference towards y'. They are ratios of sums over pairs, so a pair
counts by how far the two questions lie apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from xprobe.phases.bootstrap import ClusterBootstrap, Estimate

Floats = NDArray[np.float64]
ALL = "all"
HALF = 0.5
# measure -> weights of (log p(own answer), log p(other answer)) in the quantity that moves
_WEIGHTS = {"effect": (-1.0, 1.0), "gain": (0.0, 1.0), "loss": (-1.0, 0.0)}


def moved(patched: Floats, before: Floats, outright: Floats, measure: str = "effect") -> tuple[Floats, Floats]:
    """How far patches move the answer, and how far asking the other question outright does.

    Parameters
    ----------
    patched : array [N, L + 1, 2]
        log p of own and other answer with the patch at each layer, nats.
    before, outright : array [N, 2]
        The same without a patch, for the question itself and for the other one.
    measure : str
        One of ``xprobe.phases.patch_settings.MEASURES``.

    Returns
    -------
    by_patch : array [N, L + 1]
    by_question : array [N]
        The effect of a patch is the first divided by the second.

    Examples
    --------
    >>> patched = np.array([[[-1.0, -5.0], [-3.0, -3.0], [-5.0, -1.0]]])
    >>> by_patch, by_question = moved(patched, np.array([[-1.0, -5.0]]), np.array([[-5.0, -1.0]]))
    >>> (by_patch / by_question[:, None]).tolist()
    [[0.0, 0.5, 1.0]]
    """
    weights = np.array(_WEIGHTS[measure])
    start = before @ weights
    return patched @ weights - start[:, None], outright @ weights - start


def boundary(curves: Floats, *, rising: bool = True) -> Floats:
    """The first layer from which on a curve stays on the other side of 1/2.

    Parameters
    ----------
    curves : array [..., L + 1]
    rising : bool
        Whether the other side is that of at least 1/2 (True), or that below 1/2.

    Returns
    -------
    array [...]
        Layers; NaN where the curve does not end there, or holds NaN.

    Examples
    --------
    >>> boundary(np.array([[0.0, 0.6, 0.4, 0.5, 1.0], [0.0, 0.1, 0.2, 0.3, 0.4]])).tolist()
    [3.0, nan]
    >>> boundary(np.array([1.0, 0.8, 0.2, 0.1]), rising=False).tolist()
    2.0
    """
    reached = curves >= HALF - 1e-12 if rising else curves < HALF - 1e-12
    from_here_on = np.logical_and.accumulate(reached[..., ::-1], axis=-1)[..., ::-1]
    known = from_here_on[..., -1] & ~np.isnan(curves).any(-1)
    return np.where(known, from_here_on.argmax(-1), np.nan).astype(np.float64)


class PatchedPairs:
    """The patches of one kind, with the bootstrap over their paragraphs.

    Parameters
    ----------
    frame : DataFrame, N rows
        paragraph, and own_before, other_before, own_outright, other_outright.
    patched : array [N, L + 1, 2]
    draws, seed : int

    Attributes
    ----------
    contrast : Estimate
        Mean over all pairs of the whole way from one question to the other, in nats. Above 0 if the model uses the
        question at all.
    n : int
        Pairs that the model tells apart.
    told_apart : float
        Their share of all pairs; about 1/2 for a model that does not use the question.

    Examples
    --------
    >>> frame = pd.DataFrame({"paragraph": list("pq"), "own_before": -1.0, "other_before": -5.0,
    ...                       "own_outright": [-5.0, -1.0], "other_outright": [-1.0, -6.0]})
    >>> patched = np.array([[[-1.0, -5.0], [-5.0, -1.0]]] * 2)
    >>> pairs = PatchedPairs(frame, patched, draws=20, seed=0)
    >>> pairs.n, pairs.told_apart, pairs.curve("effect")[0].tolist()
    (1, 0.5, [0.0, 1.0])
    """

    def __init__(self, frame: pd.DataFrame, patched: Floats, draws: int, seed: int) -> None:
        before = frame[["own_before", "other_before"]].to_numpy(np.float64)
        outright = frame[["own_outright", "other_outright"]].to_numpy(np.float64)
        paragraphs = frame["paragraph"].to_numpy()
        _, whole = moved(patched, before, outright)
        value, lo, hi, _ = ClusterBootstrap(paragraphs, draws, seed).mean(whole[:, None])
        self.contrast = Estimate(float(value[0]), float(lo[0]), float(hi[0]))
        apart = whole > 0
        self.n, self.told_apart = int(apart.sum()), float(apart.mean())
        self._patched, self._before, self._outright = patched[apart], before[apart], outright[apart]
        self._bootstrap = ClusterBootstrap(paragraphs[apart], draws, seed)

    def curve(self, measure: str) -> tuple[Floats, Floats, Floats]:
        """Ratio of sums over pairs by layer, with its interval: three arrays [L + 1]."""
        value, drawn = self._drawn(measure)
        lo, hi = self._bootstrap.interval(drawn, np.full(len(value), self._bootstrap.n_clusters))
        return value, lo, hi

    def boundary(self, measure: str = "effect", *, rising: bool = True) -> Estimate:
        """Where the curve crosses 1/2. NaN if it does not, or if the interval of ``contrast`` holds 0.

        With one paragraph there is no interval; then the contrast itself must be above 0.
        """
        known = self.contrast.value if np.isnan(self.contrast.lo) else self.contrast.lo
        if not known > 0:
            return Estimate(float("nan"), float("nan"), float("nan"))
        value, drawn = self._drawn(measure)
        lo, hi = self._bootstrap.interval(
            boundary(drawn, rising=rising)[:, None], np.array([self._bootstrap.n_clusters])
        )
        return Estimate(float(boundary(value, rising=rising)), float(lo[0]), float(hi[0]))

    def _drawn(self, measure: str) -> tuple[Floats, Floats]:
        """The curve of all pairs [L + 1], and of every draw [draws, L + 1]."""
        by_patch, by_question = moved(self._patched, self._before, self._outright, measure)
        steps, drawn_steps, _ = self._bootstrap.drawn_means(by_patch)
        whole, drawn_whole, _ = self._bootstrap.drawn_means(by_question[:, None])
        with np.errstate(invalid="ignore", divide="ignore"):
            value, drawn = steps / whole, drawn_steps / drawn_whole
        return np.where(np.isfinite(value), value, np.nan), np.where(np.isfinite(drawn), drawn, np.nan)


def patching_curves(
    frame: pd.DataFrame, patched: Floats, measures: tuple[str, ...], draws: int, seed: int
) -> pd.DataFrame:
    """Curves of every kind of patch, by setting, language and pair of languages.

    Parameters
    ----------
    frame : DataFrame, N rows
        setting, pairs, language, other_language, kind, paragraph, and the four log-probabilities without a patch.
    patched : array [N, L + 1, 2]
    measures : tuple of str
    draws, seed : int

    Returns
    -------
    DataFrame
        Columns ``PATCHING_LAYER_COLUMNS``. ``all`` stands for all languages.

    Examples
    --------
    >>> frame = pd.DataFrame({
    ...     "setting": "en-x", "pairs": "same", "language": "de", "other_language": "de", "kind": "answer",
    ...     "paragraph": list("pq"), "own_before": -1.0, "other_before": -5.0, "own_outright": -5.0,
    ...     "other_outright": -1.0})
    >>> patched = np.array([[[-1.0, -5.0], [-2.0, -4.0], [-5.0, -1.0]]] * 2)
    >>> table = patching_curves(frame, patched, ("effect",), draws=20, seed=0)
    >>> table.query("language == 'all'")["value"].tolist()
    [0.0, 0.25, 1.0]
    """
    tables = []
    for names, members in _groups(frame):
        own = PatchedPairs(frame.iloc[members], patched[members], draws, seed)
        for measure in measures:
            value, lo, hi = own.curve(measure)
            tables.append(
                pd.DataFrame(
                    {**names, "measure": measure, "layer": np.arange(len(value)), "value": value, "lo": lo, "hi": hi,
                     "n": own.n}
                )
            )  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def summarise_patching(frame: pd.DataFrame, patched: Floats, draws: int, seed: int) -> dict[str, Any]:
    """Causal boundaries, by setting: of all pairs in one language, of each language, and of pairs of languages.

    Returns
    -------
    dict
        By setting: ``same`` and ``cross`` (where there are such pairs), each with ``pairs``, ``n`` (those that the
        model tells apart), ``told_apart`` (their share), ``contrast`` (of all pairs, nats), ``answer_boundary`` (where
        the effect of the kind "answer" rises to 1/2), ``gain_boundary`` (where its gain does), ``question_boundary``
        (where the effect of the kind "question" falls below 1/2), and ``languages``; ``cross`` also has
        ``language_pairs``, by "de>en": the states of an English question in a German run.

    Examples
    --------
    >>> frame = pd.DataFrame({
    ...     "setting": "en-x", "pairs": "same", "language": "de", "other_language": "de", "kind": "answer",
    ...     "paragraph": list("pq"), "own_before": -1.0, "other_before": -5.0, "own_outright": -5.0,
    ...     "other_outright": -1.0})
    >>> patched = np.array([[[-1.0, -5.0], [-2.0, -4.0], [-5.0, -1.0]]] * 2)
    >>> found = summarise_patching(frame, patched, draws=20, seed=0)["en-x"]["same"]
    >>> found["n"], found["contrast"]["value"], found["answer_boundary"]["value"]
    (2, 8.0, 2.0)
    """
    found: dict[str, Any] = {}
    for names, members in _groups(frame):
        if names["kind"] not in ("answer", "question"):
            continue
        own = PatchedPairs(frame.iloc[members], patched[members], draws, seed)
        if names["kind"] == "answer":
            figures = {
                "n": own.n,
                "pairs": len(members),
                "told_apart": own.told_apart,
                "contrast": own.contrast.to_dict(),
                "answer_boundary": own.boundary().to_dict(),
                "gain_boundary": own.boundary("gain").to_dict(),
            }
        else:
            figures = {"question_boundary": own.boundary(rising=False).to_dict()}
        place = found.setdefault(names["setting"], {}).setdefault(names["pairs"], {})
        if names["language"] != ALL:
            place = place.setdefault("languages", {})
            key = names["language"]
            if names["other_language"] != ALL:
                place = found[names["setting"]][names["pairs"]].setdefault("language_pairs", {})
                key = f"{names['language']}>{names['other_language']}"
            place = place.setdefault(key, {})
        place.update(figures)
    return found


def _groups(frame: pd.DataFrame) -> Iterator[tuple[dict[str, str], NDArray[np.int64]]]:
    """Rows that are shown together: each kind for all languages, for each language, and for each pair of languages."""
    frame = frame.reset_index(drop=True)
    for (setting, pairs, kind), rows in frame.groupby(["setting", "pairs", "kind"], sort=False):
        shared = {"setting": str(setting), "pairs": str(pairs), "kind": str(kind)}
        yield {**shared, "language": ALL, "other_language": ALL}, rows.index.to_numpy()
        for language, own in rows.groupby("language", sort=False):
            yield {**shared, "language": str(language), "other_language": ALL}, own.index.to_numpy()
            if pairs == "cross":
                for other, both in own.groupby("other_language", sort=False):
                    names = {"language": str(language), "other_language": str(other)}
                    yield {**shared, **names}, both.index.to_numpy()
