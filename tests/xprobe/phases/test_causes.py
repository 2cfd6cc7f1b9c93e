"""Curves and boundaries of patches from numbers made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from xprobe.phases.causes import PatchedPairs, boundary, moved, patching_curves, summarise_patching


def frame(whole: list[float], paragraphs: list[str] | None = None, **columns: object) -> pd.DataFrame:
    """Pairs whose preference moves by ``whole`` nats in all, half of it by each answer."""
    ways = np.array(whole)
    return pd.DataFrame(
        {
            "paragraph": paragraphs or [f"p{i}" for i in range(len(whole))], "own_before": -1.0, "other_before": -5.0,
            "own_outright": -1.0 - ways / 2, "other_outright": -5.0 + ways / 2, **columns,
        }
    )  # fmt: skip


def patched(whole: list[float], curves: list[list[float]]) -> np.ndarray:
    ways = np.array(whole)[:, None] * np.array(curves) / 2
    return np.stack([-1.0 - ways, -5.0 + ways], -1)


def test_a_curve_is_a_ratio_of_sums_over_the_pairs_told_apart() -> None:
    whole = [4.0, 12.0, -100.0]
    values = patched(whole, [[0, 1, 1], [0, 0, 1], [0, 5, 1]])
    own = PatchedPairs(frame(whole), values, 100, 0)
    assert (own.n, own.told_apart) == (2, pytest.approx(2 / 3))
    assert own.contrast.value == pytest.approx(-28.0)
    for measure in ("effect", "gain", "loss"):
        assert own.curve(measure)[0].tolist() == pytest.approx([0, 0.25, 1])
    assert np.isnan(own.boundary().value)  # over all pairs, the questions do not lie apart


def test_gain_and_loss_are_the_two_halves_of_the_effect() -> None:
    before, outright = np.array([[-1.0, -5.0]]), np.array([[-5.0, -1.0]])
    only_lost = np.array([[[-1.0, -5.0], [-5.0, -5.0], [-5.0, -1.0]]])  # the own answer goes, the other does not come
    found = {}
    for measure in ("effect", "gain", "loss"):
        by_patch, by_question = moved(only_lost, before, outright, measure)
        found[measure] = (by_patch / by_question[:, None])[0].tolist()
    assert found == {"effect": [0, 0.5, 1], "gain": [0, 0, 1], "loss": [0, 1, 1]}


@pytest.mark.parametrize(
    ("curve", "rising", "wanted"),
    [
        ([0, 0.49, 0.5, 0.9], True, 2),
        ([0.5, 0.6, 0.7, 0.8], True, 0),
        ([0, 0.9, 0.1, 0.9], True, 3),
        ([0, 0.9, 0.9, 0.4], True, np.nan),
        ([0, np.nan, 0.9, 0.9], True, np.nan),
        ([1, 0.5, 0.49, 0.0], False, 2),
        ([1, 0.2, 0.7, 0.6], False, np.nan),
        ([np.nan] * 4, False, np.nan),
    ],
)
def test_boundaries(curve: list[float], rising: bool, wanted: float) -> None:
    assert boundary(np.array(curve), rising=rising) == pytest.approx(wanted, nan_ok=True)


def test_the_interval_of_a_boundary_covers_the_layers_at_which_pairs_cross() -> None:
    whole = [8.0] * 40
    curves = [[0, 0, 1, 1, 1]] * 10 + [[0, 0, 0, 1, 1]] * 20 + [[0, 0, 0, 0, 1]] * 10
    own = PatchedPairs(frame(whole), patched(whole, curves), 400, 0)
    found = own.boundary()
    assert found.value == 3
    assert (found.lo, found.hi) == (3, 3)
    few = PatchedPairs(frame(whole[:4]), patched(whole[:4], [curves[0], curves[10], curves[11], curves[-1]]), 400, 0)
    assert few.boundary().lo < 3 <= few.boundary().hi


def test_tables_and_summaries_name_languages_and_pairs_of_languages() -> None:
    whole = [8.0] * 8
    values = patched(whole, [[0, 1, 1]] * 4 + [[0, 0, 1]] * 4)
    described = frame(
        whole, setting="en-x", kind="answer", pairs=["same"] * 4 + ["cross"] * 4, language=["de", "en"] * 4,
        other_language=["de", "en", "de", "en", "en", "de", "en", "de"],
    )  # fmt: skip
    table = patching_curves(described, values, ("effect",), 50, 0)
    names = set(zip(table["pairs"], table["language"], table["other_language"], strict=True))
    assert names == {
        ("same", "all", "all"), ("same", "de", "all"), ("same", "en", "all"), ("cross", "all", "all"),
        ("cross", "de", "all"), ("cross", "en", "all"), ("cross", "de", "en"), ("cross", "en", "de"),
    }  # fmt: skip
    found = summarise_patching(described, values, 50, 0)["en-x"]
    assert found["same"]["answer_boundary"]["value"] == 1
    assert found["cross"]["language_pairs"]["de>en"]["answer_boundary"]["value"] == 2
    assert found["cross"]["languages"]["en"]["n"] == 2
    assert "question_boundary" not in found["same"]
