"""Phases under several lenses: shifts are paired, and the figures are those of a run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from xprobe.phases.lens_tables import (
    DEPTHS,
    LENS_COLUMNS,
    LENS_LAYER_COLUMNS,
    compare_lenses,
    depth_layers,
    latent_signals,
    script_shares,
)
from xprobe.phases.tables import example_table, layer_table, summaries

L = 12
QUESTIONS = [f"{paragraph}{number}" for paragraph in "pqrs" for number in range(3)]
FRAME = pd.DataFrame(
    [
        {"setting": setting, "language": language, "question_id": question, "paragraph": question[0]}
        for setting in ("x-x", "en-x")
        for question in QUESTIONS
        for language in ("en", "th")
    ]
)
ONSETS = np.random.default_rng(0).integers(5, 9, len(FRAME))


def steps(onsets: np.ndarray) -> np.ndarray:
    return np.where(np.arange(L + 1) < onsets[:, None], 0.25, 0.75)


def compared(shift: np.ndarray, more: dict[str, dict[str, np.ndarray]] | None = None):
    readings = {"logit": {"readiness": steps(ONSETS)}, "j": {"readiness": steps(ONSETS + shift)}}
    return compare_lenses(FRAME, readings, more or {}, own="logit", permutations=20, draws=200, seed=3)


def test_the_shift_is_paired_by_example() -> None:
    """Onsets differ much between questions and by the same amount between lenses: the shift has no spread."""
    found = compared(np.full(len(FRAME), -2)).summary.set_index(["setting", "lens", "language"])
    for setting in ("x-x", "en-x"):
        for language in ("all", "en", "th"):
            row = found.loc[(setting, "j", language)]
            assert [row["onset_shift"], row["onset_shift_lo"], row["onset_shift_hi"]] == [-2, -2, -2]
            assert row["onset_mean_lo"] < row["onset_mean"] < row["onset_mean_hi"]
            assert found.loc[(setting, "logit", language), "onset_shift"] == 0
            assert row["boundary"] == found.loc[(setting, "logit", language), "boundary"] - 2


def test_the_shift_has_an_interval_where_it_differs() -> None:
    shift = np.where(FRAME["paragraph"] == "p", -3, -1)
    row = compared(shift).summary.query("lens == 'j' and language == 'all' and setting == 'x-x'").iloc[0]
    assert row["onset_shift"] == pytest.approx(shift.mean())
    assert row["onset_shift_lo"] < row["onset_shift"] < row["onset_shift_hi"] <= -1


def test_figures_are_those_of_the_functions_of_a_run() -> None:
    found = compared(np.full(len(FRAME), 1))
    signals = {"readiness": steps(ONSETS + 1)}
    examples = example_table(FRAME, signals, 20, 3)
    wanted = summaries(examples, signals, L, 200, 3)
    for setting, figures in wanted.items():
        ours = found.settings[setting]["j"]
        assert {name: ours[name] for name in figures if name != "languages"} == {
            name: value for name, value in figures.items() if name != "languages"
        }
    rows = found.by_layer.query("lens == 'j'").drop(columns="lens").reset_index(drop=True)
    pd.testing.assert_frame_equal(rows, layer_table(examples, signals, 200, 3))
    assert tuple(found.summary.columns) == LENS_COLUMNS
    assert tuple(found.by_layer.columns) == LENS_LAYER_COLUMNS
    assert found.summary["setting"].drop_duplicates().tolist() == ["x-x", "en-x"]
    assert found.summary["stability"].notna().tolist() == (found.summary["language"] == "all").tolist()


def test_scripts_and_latent_language_are_shown_at_single_layers() -> None:
    layers = depth_layers(L)
    assert layers == dict(zip(DEPTHS, (3, 6, 9), strict=True))
    thai = FRAME["language"].to_numpy() == "th"
    scripts = [["latin" if layer < 6 or not own else "thai" for layer in range(L + 1)] for own in thai]
    values = np.log(np.tile([0.3, 0.1], (len(FRAME), L + 1, 1)))
    values[~thai | (FRAME["setting"] == "en-x").to_numpy()] = np.nan
    more = script_shares(scripts, ["latin", "thai"]) | latent_signals(values)
    found = compared(np.zeros(len(FRAME), dtype=int), {"logit": more, "j": more})
    rows = found.summary.query("lens == 'j' and setting == 'x-x'").set_index("language")
    assert [rows.loc["th", f"script_{depth}"] for depth in DEPTHS] == ["latin", "thai", "thai"]
    assert [rows.loc["all", f"script_share_{depth}"] for depth in DEPTHS] == [1.0, 0.5, 0.5]
    assert rows.loc["th", "latent_share_50"] == pytest.approx(0.25)
    assert np.isnan(rows.loc["en", "latent_share_50"])
    latent = found.by_layer[found.by_layer["signal"].str.startswith("latent")]
    assert set(latent["setting"]) == {"x-x"}
    assert set(latent["n"]) == {len(QUESTIONS)}


def test_a_signal_without_any_value_is_left_out() -> None:
    nothing = latent_signals(np.full((len(FRAME), L + 1, 2), np.nan))
    found = compared(np.zeros(len(FRAME), dtype=int), {"logit": nothing, "j": nothing})
    assert not found.by_layer["signal"].str.startswith("latent").any()
    assert found.settings["x-x"]["j"]["depths"]["50"]["latent_share"] is None


def test_a_share_survives_small_probabilities() -> None:
    assert latent_signals(np.array([[[-800.0, -801.0]]]))["latent_share"] == pytest.approx(1 / (1 + np.e))
