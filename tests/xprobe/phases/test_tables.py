"""Tables of a small made-up study hold what a direct computation gives."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from support.intervals import interval

from xprobe.phases.alpha import krippendorff_alpha
from xprobe.phases.bootstrap import ClusterBootstrap
from xprobe.phases.segmentation import segment
from xprobe.phases.tables import ALL, example_table, layer_table, replace_signals, stability_table, summaries

Signals = dict[str, NDArray[np.float64]]
LAYERS = 13
MEANS = ("readiness", "log_probability", "entropy", "kl", "encoding", "encoding_selectivity")
SETTINGS, LANGUAGES = ("en-x", "x-x"), ("en", "de", "zh")
COLUMNS = ["setting", "layer", "language", "signal", "value", "lo", "hi", "n"]
SEED, DRAWS = 3, 80


def study(seed: int = 0) -> tuple[pd.DataFrame, Signals]:
    """4 paragraphs x 2 questions x 3 languages x 2 settings, settings interleaved; some examples have no onset."""
    generator = np.random.default_rng(seed)
    rows = [
        {"setting": setting, "language": language, "question_id": f"p{p}q{q}", "paragraph": f"p{p}"}
        for p in range(4)
        for setting in SETTINGS
        for q in range(2)
        for language in LANGUAGES
        if (setting, language, p, q) != ("x-x", "zh", 3, 1)
    ]
    onset = generator.integers(3, 10, size=len(rows))
    steps = np.where(np.arange(LAYERS) < onset[:, None], 0.3, 0.8)
    signals = {
        "readiness": steps + generator.normal(scale=0.05, size=steps.shape),
        "log_probability": -generator.exponential(size=steps.shape),
        "rank": np.rint(generator.exponential(50, size=steps.shape)) + 1,
        "entropy": generator.exponential(size=steps.shape),
        "kl": generator.exponential(size=steps.shape),
        "encoding": np.where(np.arange(LAYERS) < 2, 0.4, 0.7) + generator.normal(scale=0.02, size=steps.shape),
    }
    signals["encoding_selectivity"] = signals["encoding"] - 0.4
    signals["encoding"][11] = np.nan
    signals["readiness"][[4, 17]] = 0.5
    signals["rank"][5, 2] = signals["rank"][6] = np.nan
    signals["kl"][9, 0] = np.nan
    return pd.DataFrame(rows), signals


@pytest.fixture(scope="module")
def frame_and_signals() -> tuple[pd.DataFrame, Signals]:
    return study()


@pytest.fixture(scope="module")
def examples(frame_and_signals: tuple[pd.DataFrame, Signals]) -> pd.DataFrame:
    return example_table(*frame_and_signals, permutations=50, seed=SEED)


@pytest.fixture(scope="module")
def layers(examples: pd.DataFrame, frame_and_signals: tuple[pd.DataFrame, Signals]) -> pd.DataFrame:
    return layer_table(examples, frame_and_signals[1], DRAWS, SEED)


def cell(layers: pd.DataFrame, setting: str, layer: int, language: str, signal: str) -> pd.Series:
    (at,) = np.flatnonzero(
        (layers["setting"] == setting)
        & (layers["layer"] == layer)
        & (layers["language"] == language)
        & (layers["signal"] == signal)
    )
    return layers.iloc[at]


# -- one row per example --------------------------------------------------------------------------------------------


def test_the_example_table_adds_phases_and_last_layer_to_every_example(
    examples: pd.DataFrame, frame_and_signals: tuple[pd.DataFrame, Signals]
) -> None:
    frame, signals = frame_and_signals
    pd.testing.assert_frame_equal(examples[list(frame.columns)], frame)
    phases = segment(signals["readiness"], 50, SEED)
    for name in ("onset", "sharpness", "rise", "phased"):
        np.testing.assert_array_equal(examples[name], getattr(phases, name))
    for name, values in signals.items():
        np.testing.assert_array_equal(examples[f"{name}_last"], values[:, -1])
    assert examples["onset"].isna().sum() == 2
    assert not examples.loc[[4, 17], "phased"].any()


# -- one row per setting x layer x language x signal ----------------------------------------------------------------


def test_the_layer_table_has_its_columns_and_one_row_per_setting_layer_language_and_signal(
    layers: pd.DataFrame,
) -> None:
    assert list(layers.columns) == COLUMNS
    per_language = ("phase2", "rank", *MEANS)
    wanted = {(ALL, "stability"), ("de", "agreement_en"), ("zh", "agreement_en")}
    wanted |= {(language, signal) for language in (ALL, *LANGUAGES) for signal in per_language}
    keys = [(s, at, x, name) for s in SETTINGS for at in range(LAYERS) for x, name in wanted]
    assert sorted(zip(*(layers[c] for c in COLUMNS[:4]), strict=True)) == sorted(keys)


def test_settings_stand_one_after_the_other_and_layers_in_depth_order(layers: pd.DataFrame) -> None:
    assert list(dict.fromkeys(layers["setting"])) == list(SETTINGS)
    for _, part in layers.groupby("setting"):
        assert part.index.tolist() == list(range(part.index[0], part.index[0] + len(part)))
        assert part["layer"].is_monotonic_increasing
    assert layers.index.tolist() == list(range(len(layers)))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("language", [ALL, *LANGUAGES])
def test_means_and_median_rank_are_those_of_the_examples(
    setting: str,
    language: str,
    layers: pd.DataFrame,
    examples: pd.DataFrame,
    frame_and_signals: tuple[pd.DataFrame, Signals],
) -> None:
    signals = frame_and_signals[1]
    chosen = (examples["setting"] == setting) & ((examples["language"] == language) | (language == ALL))
    rows = np.flatnonzero(chosen)
    onset = examples["onset"].to_numpy()[rows]
    for layer in range(LAYERS):
        for signal in (*MEANS, "rank"):
            values = signals[signal][rows, layer]
            got = cell(layers, setting, layer, language, signal)
            expected = np.nanmedian(values) if signal == "rank" else np.nanmean(values)
            assert got["value"] == pytest.approx(expected, abs=1e-12)
            assert got["n"] == np.sum(~np.isnan(values))
            assert got["lo"] <= got["value"] <= got["hi"]
        got = cell(layers, setting, layer, language, "phase2")
        assert got["value"] == pytest.approx(np.mean(layer >= onset[~np.isnan(onset)]), abs=1e-12)
        assert got["n"] == np.sum(~np.isnan(onset))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("language", [ALL, *LANGUAGES])
def test_intervals_come_from_drawing_the_paragraphs_of_the_setting(
    setting: str,
    language: str,
    layers: pd.DataFrame,
    examples: pd.DataFrame,
    frame_and_signals: tuple[pd.DataFrame, Signals],
) -> None:
    part = examples[examples["setting"] == setting]
    weights = ClusterBootstrap(part["paragraph"].to_numpy(), DRAWS, SEED).weights
    members = part[(part["language"] == language) | (language == ALL)]
    readiness = frame_and_signals[1]["readiness"][members.index, 6]
    paragraphs = members["paragraph"].to_numpy()
    drawn = []
    for counts in weights.astype(int):
        rows = [np.flatnonzero(paragraphs == f"p{at}") for at, times in enumerate(counts) for _ in range(times)]
        drawn.append(readiness[np.concatenate(rows)].mean())
    got = cell(layers, setting, 6, language, "readiness")
    wanted = interval(drawn, np.unique(paragraphs), lambda some: readiness[np.isin(paragraphs, some)].mean())
    np.testing.assert_allclose((got["lo"], got["hi"]), wanted, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS)
def test_stability_and_agreement_with_english_are_those_of_the_onsets(
    setting: str, layers: pd.DataFrame, examples: pd.DataFrame
) -> None:
    part = examples[(examples["setting"] == setting) & examples["onset"].notna()]
    by_question = [dict(zip(g["language"], g["onset"], strict=True)) for _, g in part.groupby("question_id")]
    for layer in range(LAYERS):
        pairs = [list(combinations(onsets.values(), 2)) for onsets in by_question if len(onsets) > 1]
        agreeing = [np.mean([(layer >= a) == (layer >= b) for a, b in question]) for question in pairs]
        got = cell(layers, setting, layer, ALL, "stability")
        assert got["value"] == pytest.approx(np.mean(agreeing), abs=1e-12)
        assert got["n"] == len(agreeing)
        for language in ("de", "zh"):
            both = [onsets for onsets in by_question if {"en", language} <= set(onsets)]
            same = [(layer >= onsets["en"]) == (layer >= onsets[language]) for onsets in both]
            got = cell(layers, setting, layer, language, "agreement_en")
            assert got["value"] == pytest.approx(np.mean(same), abs=1e-12)
            assert got["n"] == len(both)


def test_the_table_of_a_setting_does_not_depend_on_the_others(
    layers: pd.DataFrame, examples: pd.DataFrame, frame_and_signals: tuple[pd.DataFrame, Signals]
) -> None:
    rows = np.flatnonzero(examples["setting"] == "x-x")
    alone = layer_table(
        examples.iloc[rows].reset_index(drop=True), {k: v[rows] for k, v in frame_and_signals[1].items()}, DRAWS, SEED
    )
    together = layers[layers["setting"] == "x-x"].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, together)


def test_the_same_seed_gives_the_same_table(
    layers: pd.DataFrame, examples: pd.DataFrame, frame_and_signals: tuple[pd.DataFrame, Signals]
) -> None:
    pd.testing.assert_frame_equal(layer_table(examples, frame_and_signals[1], DRAWS, SEED), layers)
    other = layer_table(examples, frame_and_signals[1], DRAWS, SEED + 1)
    pd.testing.assert_series_equal(other["value"], layers["value"])
    assert not other["lo"].equals(layers["lo"])


def test_a_single_paragraph_gives_values_without_intervals() -> None:
    frame, signals = study()
    rows = np.flatnonzero(frame["paragraph"] == "p0")
    part = example_table(frame.iloc[rows].reset_index(drop=True), {k: v[rows] for k, v in signals.items()}, 20, 0)
    table = layer_table(part, {k: v[rows] for k, v in signals.items()}, DRAWS, SEED)
    assert table.loc[table["signal"] == "readiness", "value"].notna().all()
    assert table[["lo", "hi"]].isna().all(axis=None)


# -- one entry per setting ------------------------------------------------------------------------------------------


def test_summaries_hold_what_the_examples_give(
    examples: pd.DataFrame, frame_and_signals: tuple[pd.DataFrame, Signals]
) -> None:
    result = summaries(examples, frame_and_signals[1], LAYERS - 1, DRAWS, SEED)
    assert list(result) == list(SETTINGS)
    for setting, entry in result.items():
        part = examples[examples["setting"] == setting]
        onset = part["onset"].dropna()
        alpha = krippendorff_alpha(part["onset"].to_numpy(), part["question_id"].to_numpy()).value
        assert entry["alpha"]["value"] == pytest.approx(alpha)
        assert entry["alpha"]["lo"] < entry["alpha"]["value"] < entry["alpha"]["hi"]
        assert entry["boundary"]["value"] == onset.median()
        assert entry["boundary"]["lo"] <= onset.median() <= entry["boundary"]["hi"]
        assert entry["relative_boundary"]["value"] == pytest.approx(onset.median() / (LAYERS - 1))
        assert entry["relative_boundary"]["lo"] == entry["boundary"]["lo"] / (LAYERS - 1)
        spread = (onset - onset.median()).abs().median() / (LAYERS - 1)
        assert entry["spread"]["value"] == pytest.approx(spread)
        assert entry["spread"]["lo"] <= spread <= entry["spread"]["hi"]
        assert entry["phased_fraction"]["value"] == pytest.approx(part["phased"].mean())
        assert entry["phased_fraction"]["lo"] <= part["phased"].mean() <= entry["phased_fraction"]["hi"]
        assert entry["without_onset"] == part["onset"].isna().sum()
        assert (entry["n"], entry["paragraphs"]) == (len(part), 4)
        assert list(entry["languages"]) == list(LANGUAGES)
        for language, values in entry["languages"].items():
            members = part[part["language"] == language]
            assert values["boundary"]["value"] == members["onset"].median()
            assert values["spread"]["value"] == pytest.approx(
                (members["onset"] - members["onset"].median()).abs().median() / (LAYERS - 1)
            )
            assert values["phased_fraction"]["value"] == pytest.approx(members["phased"].mean())
            assert values["without_onset"] == members["onset"].isna().sum()
            assert values["n"] == len(members)


def test_summaries_are_plain_values(examples: pd.DataFrame, frame_and_signals: tuple[pd.DataFrame, Signals]) -> None:
    result = summaries(examples, frame_and_signals[1], LAYERS - 1, DRAWS, SEED)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_study_without_any_onset_has_empty_figures_not_nan() -> None:
    frame, signals = study()
    signals["readiness"][:] = 0.5
    examples = example_table(frame, signals, 20, 0)
    entry = summaries(examples, signals, LAYERS - 1, DRAWS, SEED)["en-x"]
    nothing = {"value": None, "lo": None, "hi": None}
    assert (entry["alpha"], entry["boundary"]) == (nothing, nothing)
    assert entry["relative_boundary"] == nothing
    assert entry["spread"] == nothing
    assert entry["phased_fraction"]["value"] == 0
    assert entry["phase_order"] == {"value": None, "share": None}
    assert entry["without_onset"] == entry["n"]
    json.dumps(entry, allow_nan=False)
    table = stability_table(layer_table(examples, signals, 20, 0), "en-x")
    assert (table["phase"] == 1).all()
    assert table["stability"].isna().all()


def test_encoding_depth_is_that_of_the_mean_curve_and_lies_below_the_boundary() -> None:
    frame, signals = study()
    signals["encoding"] = np.where(np.arange(LAYERS) < 4, 0.5, 0.8) + 0 * signals["encoding"]
    signals["encoding"][:, 7] = 0.82
    signals["readiness"] = np.where(np.arange(LAYERS) < 6, 0.3, 0.8) + 0 * signals["readiness"]
    entry = summaries(example_table(frame, signals, 20, 0), signals, LAYERS - 1, DRAWS, SEED)["en-x"]
    for part in (entry, *entry["languages"].values()):
        assert part["encoding_depth"] == {"value": 4.0, "lo": 4.0, "hi": 4.0}
        assert part["encoding_peak"]["value"] == 7.0
        assert part["phase_order"] == {"value": 1.0, "share": 1.0}
    signals["readiness"] = np.where(np.arange(LAYERS) < 3, 0.3, 0.8) + 0 * signals["readiness"]
    entry = summaries(example_table(frame, signals, 20, 0), signals, LAYERS - 1, DRAWS, SEED)["en-x"]
    assert entry["phase_order"] == {"value": 0.0, "share": 0.0}


def test_replacing_signals_leaves_everything_else_as_it_is(
    layers: pd.DataFrame, examples: pd.DataFrame, frame_and_signals: tuple[pd.DataFrame, Signals]
) -> None:
    fresh = {"encoding": 1 - frame_and_signals[1]["encoding"], "new": frame_and_signals[1]["readiness"]}
    table, rows = replace_signals(layers, examples, fresh, DRAWS, SEED)
    wanted = layer_table(examples, {**frame_and_signals[1], **fresh}, DRAWS, SEED)
    keys = ["setting", "layer", "language", "signal"]
    pd.testing.assert_frame_equal(
        table.sort_values(keys, ignore_index=True), wanted.sort_values(keys, ignore_index=True)
    )
    assert rows["new_last"].tolist() == examples["readiness_last"].tolist()
    pd.testing.assert_frame_equal(rows[["onset", "kl_last"]], examples[["onset", "kl_last"]])


# -- one row per layer ----------------------------------------------------------------------------------------------


def test_the_stability_table_is_the_pooled_part_of_the_layer_table(layers: pd.DataFrame) -> None:
    for setting in SETTINGS:
        table = stability_table(layers, setting)
        signals = [
            "readiness",
            "encoding",
            "encoding_selectivity",
            "log_probability",
            "rank",
            "entropy",
            "kl",
            "phase2",
        ]
        assert list(table.columns) == ["phase", "stability", "stability_lo", "stability_hi", *signals]
        assert table.index.tolist() == list(range(LAYERS))
        for layer, row in table.iterrows():
            stability = cell(layers, setting, int(str(layer)), ALL, "stability")
            assert (
                row[["stability", "stability_lo", "stability_hi"]].tolist() == stability[["value", "lo", "hi"]].tolist()
            )
            for signal in signals:
                assert row[signal] == cell(layers, setting, int(str(layer)), ALL, signal)["value"]


def phases_of(onsets: list[float]) -> tuple[list[int], list[float]]:
    """(phase, share of examples in phase 2) per layer of a study with these onsets."""
    frame = pd.DataFrame({
        "setting": "en-x",
        "language": [f"l{at}" for at in range(len(onsets))],
        "question_id": "q",
        "paragraph": "p",
        "onset": onsets,
        "phased": True,
    })  # fmt: skip
    signals = {name: np.ones((len(onsets), LAYERS)) for name in (*MEANS, "rank")}
    table = stability_table(layer_table(frame, signals, 5, 0), "en-x")
    return table["phase"].tolist(), table["phase2"].tolist()


@pytest.mark.parametrize(
    "onsets",
    [
        [5.0],
        [3.0, 6.0, 9.0],
        [4.0, 4.0, 7.0, 7.0, 7.0],
        [4.0, 5.0, np.nan, 8.0],
        [6.0, 6.0],
        [4.0, 6.0, 6.0, 9.0],
        [4.0, 6.0],
        [4.0, 5.0],
        [3.0, 4.0, 9.0, 9.0],
    ],
    ids=str,
)
def test_a_layer_is_in_phase_two_exactly_where_more_than_half_of_the_examples_are(onsets: list[float]) -> None:
    phase, share = phases_of(onsets)
    assert phase == [2 if value > 0.5 else 1 for value in share]
