"""Simulated studies: planted phases are found, and where nothing is planted nothing is."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import comb, log2

import krippendorff
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, cross_val_predict
from support.simulated import LANGUAGES, Design, frame_of, hidden_states, simulate, truth

from xprobe.phases.encoding import Retrieval, paragraph_encoding
from xprobe.phases.segmentation import encoding_depths, segment
from xprobe.phases.tables import ALL, example_table, layer_table, summaries
from xprobe.probes.registry import get_probe
from xprobe.probes.settings import ProbeSettings
from xprobe.probes.tasks import Task
from xprobe.probes.training import train_layer

NAN = float("nan")
EXACT, MODERATE = Design(), Design(noise=0.15)  # a third of the step from low to high
CHANCE = np.mean([1 - log2(rank) / 2 for rank in range(1, 5)])  # of encoding, four questions, no ties
SETTINGS = ProbeSettings(n_components=24)


def tables(design: Design, seed: int, draws: int = 200) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """Examples, pooled layers by (signal, layer), and summary of a simulated study."""
    study = simulate(design, seed)
    examples = example_table(study.frame.assign(planted=study.onset), study.signals, 100, seed)
    layers = layer_table(examples, study.signals, draws, seed)
    pooled = layers[layers["language"] == ALL].set_index(["signal", "layer"])
    return examples, pooled, summaries(examples, study.signals, design.n_layers - 1, draws, seed)["en-x"]


def encode(frame: pd.DataFrame, states: NDArray) -> Retrieval:
    """Encoding of all paragraphs of a frame."""
    shape = states.shape[:2]
    found = Retrieval(*(np.full(shape, NAN) for _ in range(4)))
    for rows in frame.groupby("paragraph").indices.values():
        part = frame.iloc[rows]
        one = paragraph_encoding(states[rows], part["question_id"].to_numpy(), part["language"].to_numpy())
        for name, values in vars(one).items():
            getattr(found, name)[rows] = values
    return found


PROBED = [get_probe(name) for name in ("alignment", "language", "correctness")]
ALIGNMENT, CLASSIFYING, CORRECTNESS = PROBED[:1], PROBED[1:], PROBED[2:]


def task_of(frame: pd.DataFrame, correct: NDArray[np.bool_]) -> Task:
    return Task.from_examples(frame.assign(first_token_correct=correct), PROBED, SETTINGS)


# -- planted phases -------------------------------------------------------------------------------------------------


def test_without_noise_every_onset_and_the_boundary_are_exact() -> None:
    examples, _, figures = tables(EXACT, 0)
    assert (examples["onset"] == examples["planted"]).all()
    assert examples["phased"].all()
    np.testing.assert_allclose(examples["sharpness"], 1, atol=1e-9)
    assert figures["boundary"]["value"] == np.median(examples["planted"])


def test_at_moderate_noise_onsets_are_within_a_layer_and_so_is_the_boundary() -> None:
    for seed in range(5):
        examples, _, figures = tables(MODERATE, seed)
        assert (abs(examples["onset"] - examples["planted"]) <= 1).mean() > 0.95
        assert examples["phased"].mean() > 0.99
        assert abs(figures["boundary"]["value"] - truth(MODERATE).boundary) <= 1


def test_the_figures_of_a_study_are_its_own_counts() -> None:
    """By hand, from the onsets that were drawn."""
    examples, pooled, figures = tables(EXACT, 1)
    ratings = examples.pivot(index="question_id", columns="language", values="planted").to_numpy()
    for at in range(EXACT.n_layers):
        same = [np.mean([(at >= x) == (at >= y) for x, y in combinations(row, 2)]) for row in ratings]
        assert pooled.loc[("stability", at), "value"] == pytest.approx(np.mean(same), abs=1e-12)
    wanted = krippendorff.alpha(reliability_data=ratings.T, level_of_measurement="interval")
    assert figures["alpha"]["value"] == pytest.approx(wanted, abs=1e-9)
    assert figures["spread"]["value"] == stats.median_abs_deviation(ratings, axis=None) / (EXACT.n_layers - 1)


def test_the_figures_of_a_large_study_are_the_closed_forms_within_their_intervals() -> None:
    """One study and many intervals: they are widened by half, so that one outside means more than bad luck."""
    design = Design(paragraphs=300, noise=0.03)
    true, (_, pooled, figures) = truth(design), tables(design, 2)

    def holds(found: pd.Series | dict, wanted: float) -> bool:
        half = max(found["hi"] - found["value"], found["value"] - found["lo"], 1e-3)
        return abs(found["value"] - wanted) <= 1.5 * half

    for at in range(design.n_layers):
        for name in ("stability", "readiness", "encoding"):
            assert holds(pooled.loc[(name, at)], getattr(true, name)[at]), (name, at)
    assert holds(figures["alpha"], true.alpha)
    assert figures["encoding_depth"] == {"value": 7.0, "lo": 7.0, "hi": 7.0}
    assert figures["phase_order"] == {"value": 1.0, "share": 1.0}
    assert abs(figures["boundary"]["value"] - true.boundary) <= 1


@pytest.mark.parametrize("count", range(7))
def test_languages_that_disagree_lower_stability_and_alpha_to_the_closed_form(count: int) -> None:
    """All onsets at 12, but for ``count`` of six languages at 15: from 12 to 14 the pairs across disagree."""
    design = Design(paragraphs=5, paragraph={0: 1.0}, question={0: 1.0}, disagree={count: 1.0})
    _, pooled, figures = tables(design, 0)
    agree = (comb(count, 2) + comb(6 - count, 2)) / comb(6, 2)
    wanted = [agree if 12 <= at < 15 else 1.0 for at in range(design.n_layers)]
    np.testing.assert_allclose(pooled.loc["stability", "value"], wanted, atol=1e-12)
    np.testing.assert_allclose(truth(design).stability, wanted, atol=1e-12)
    if count in (0, 6):
        assert figures["alpha"]["value"] is None
    else:  # 20 questions all alike: within them values differ by a little more than between any two of the 120
        expected = 2 * 20 * count * 20 * (6 - count) / (120 * 119)
        assert figures["alpha"]["value"] == pytest.approx(1 - (1 - agree) / expected, abs=1e-9)
        assert truth(design).alpha == pytest.approx(1 - (1 - agree) / (2 * count * (6 - count) / 36))


@pytest.mark.parametrize("start", [3, 6, 11])
def test_planted_question_directions_are_encoded_from_their_layer_on(start: int) -> None:
    frame = frame_of(Design(paragraphs=12))
    found = encode(frame, hidden_states(frame, 16, 24, seed=start, question_from=start, noise=0))
    tied = 1 - log2(2.5) / 2  # all four candidates at their middle rank
    wanted = np.where(np.arange(16) < start, tied, 1.0)
    np.testing.assert_allclose(found.encoding, np.broadcast_to(wanted, found.encoding.shape), atol=1e-12)
    assert encoding_depths(found.encoding.mean(0)[None])[0] == start
    found = encode(frame, hidden_states(frame, 16, 24, seed=start, question_from=start, noise=1.5))
    assert found.encoding[:, :start].mean() == pytest.approx(CHANCE, abs=0.04)
    assert found.encoding[:, start:].mean() > 0.8
    assert abs(encoding_depths(found.encoding.mean(0)[None])[0] - start) <= 1


# -- nothing planted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("permutations", [20, 200])
@pytest.mark.parametrize("design", [MODERATE, replace(MODERATE, high=MODERATE.low)], ids=["shuffled steps", "noise"])
def test_of_layer_permuted_readiness_one_in_twenty_is_taken_for_phased(design: Design, permutations: int) -> None:
    """Examples are independent, so that their number is binomial; 999 of 1000 lie within these bounds.

    A signal that is one of B + 1 alike is phased if it is among the highest floor(0.05 (B + 1)) of them.
    """
    readiness = simulate(replace(design, paragraphs=60), 5).signals["readiness"]
    shuffled = np.random.default_rng(6).permuted(readiness, axis=1)
    phased = int(segment(shuffled, permutations, seed=7).phased.sum())
    size = int(0.05 * (permutations + 1)) / (permutations + 1)
    low, high = stats.binom.ppf([0.0005, 0.9995], len(shuffled), size)
    assert low <= phased <= high


def test_layer_permuted_readiness_has_no_agreement_across_languages() -> None:
    study = simulate(MODERATE, 8)
    shuffled = np.random.default_rng(9).permuted(study.signals["readiness"], axis=1)
    examples = example_table(study.frame, {"readiness": shuffled}, 50, 0)
    alpha = summaries(examples, {"readiness": shuffled}, 24, 500, 0)["en-x"]["alpha"]
    assert abs(alpha["value"]) < 0.1
    assert alpha["lo"] < 0 < alpha["hi"]


def test_states_without_a_question_are_encoded_as_their_control_is() -> None:
    frame = frame_of(Design(paragraphs=60))
    found = encode(frame, hidden_states(frame, 6, 16, seed=10))
    by_paragraph = found.selectivity.reshape(60, -1).mean(1)
    assert abs(by_paragraph.mean()) < 4 * by_paragraph.std(ddof=1) / np.sqrt(60)
    np.testing.assert_allclose(found.control, CHANCE, atol=1e-12)  # without ties, whatever the states
    assert found.top1.mean() == pytest.approx(1 / 4, abs=0.03)
    assert found.margin.mean() == pytest.approx(0, abs=0.03)


def test_probes_of_permuted_labels_have_no_selectivity() -> None:
    """States that carry all there is; labels that were dealt out anew within every paragraph."""
    frame = frame_of(Design(paragraphs=40))
    states = hidden_states(frame, 1, 24, seed=11, question_from=0)[:, 0]
    states[:, :2] = np.random.default_rng(12).normal(size=(len(frame), 2))
    correct = states[:, 0] + states[:, 1] > 0
    gains: dict[str, dict[str, list[float]]] = {"real": {}, "permuted": {}}
    for seed in range(4):
        generator = np.random.default_rng(100 + seed)
        order = np.concatenate([generator.permutation(rows) for rows in frame.groupby("paragraph").indices.values()])
        pairs = frame.groupby(["paragraph", "language"]).indices.values()
        dealt = np.empty(len(frame), dtype=np.int64)
        for rows in pairs:
            dealt[rows] = generator.permutation(rows)
        real = task_of(frame, correct)
        for kind, (classes, aligned) in {
            "real": (real, real),
            "permuted": (
                task_of(frame.assign(language=frame["language"].to_numpy()[order]), correct[order]),
                task_of(frame.assign(question_id=frame["question_id"].to_numpy()[dealt]), correct),
            ),
        }.items():
            found = train_layer(states, classes, CLASSIFYING, SETTINGS).folds
            for name, folds in found.items():
                gains[kind].setdefault(name, []).append(np.mean([score - control for score, control, *_ in folds]))
            values = train_layer(states, aligned, ALIGNMENT, SETTINGS).aligned
            gains[kind].setdefault("alignment", []).append(np.mean(values[:, 0] - values[:, 1]))
    for name in ("alignment", "language", "correctness"):
        assert abs(np.mean(gains["permuted"][name])) < 0.05, name
        assert np.mean(gains["real"][name]) > 0.25, name


# -- leakage --------------------------------------------------------------------------------------------------------


def paragraph_code(frame: pd.DataFrame, seed: int, size: float = 5.0) -> NDArray[np.float32]:
    """States [N, 24] that say which paragraph it is, and nothing else."""
    generator = np.random.default_rng(seed)
    _, codes = np.unique(frame["paragraph"], return_inverse=True)
    code = size * generator.normal(size=(codes.max() + 1, 24))
    return (code[codes] + generator.normal(size=(len(frame), 24))).astype(np.float32)


def test_a_probe_that_remembers_paragraphs_wins_by_folds_of_examples_and_not_by_ours() -> None:
    """Whether the answer will be right is decided by paragraph: a probe can learn that by heart, and only by heart."""
    frame = frame_of(Design(paragraphs=20, questions=3))
    careless, ours = [], []
    for seed in range(12):
        states = paragraph_code(frame, seed)
        right = np.random.default_rng(seed).permutation(np.arange(20) % 2 == 0)
        correct = np.repeat(right, 3 * len(LANGUAGES))
        folds = KFold(5, shuffle=True, random_state=seed)
        model = LogisticRegression(max_iter=1000)
        chances = cross_val_predict(model, states, correct, cv=folds, method="predict_proba")[:, 1]
        careless.append(roc_auc_score(correct, chances))
        found = train_layer(states, task_of(frame, correct), CORRECTNESS, SETTINGS).folds["correctness"]
        ours.append(np.nanmean([score for score, *_ in found]))
    assert min(careless) > 0.95
    assert abs(np.mean(ours) - 0.5) < 4 * np.std(ours, ddof=1) / np.sqrt(len(ours))
    assert np.mean(ours) < 0.65


def test_a_paragraph_code_does_not_help_encoding() -> None:
    frame = frame_of(Design(paragraphs=30))
    plain = np.random.default_rng(13).normal(size=(len(frame), 1, 24))
    coded = plain + 20 * paragraph_code(frame, 14)[::24].repeat(24, 0)[:, None].astype(np.float64)
    found = encode(frame, coded)
    assert found.encoding.mean() == pytest.approx(CHANCE, abs=0.05)
    for name, values in vars(encode(frame, plain)).items():
        np.testing.assert_allclose(getattr(found, name), values, atol=1e-9)
    aligned = train_layer(
        coded[:, 0].astype(np.float32), task_of(frame, np.ones(len(frame), bool)), ALIGNMENT, SETTINGS
    )
    assert abs(np.mean(aligned.aligned[:, 0] - aligned.aligned[:, 1])) < 0.06


# -- unbalanced designs ---------------------------------------------------------------------------------------------


def test_missing_languages_and_skipped_examples_are_left_out_by_definition() -> None:
    study = simulate(Design(paragraphs=10, noise=0.03), 15)
    generator = np.random.default_rng(16)
    frame, readiness = study.frame.assign(planted=study.onset), study.signals["readiness"].copy()
    skipped = generator.random(len(frame)) < 0.15
    readiness[skipped, 3] = NAN  # one layer that is not known: the example has no onset
    alone = (frame["question_id"] == "p03q1") & (frame["language"] != "th")  # a question in one language
    english = (frame["language"] == "en") & (frame["paragraph"] == "p05")
    keep = np.flatnonzero(~alone & ~english & (generator.random(len(frame)) > 0.1))
    frame, readiness, skipped = frame.iloc[keep].reset_index(drop=True), readiness[keep], skipped[keep]
    examples = example_table(frame, {"readiness": readiness}, 50, 0)
    assert examples["onset"].isna().equals(pd.Series(skipped))
    assert not examples["phased"][skipped].any()

    known = frame[~skipped]
    by_question = {name: dict(zip(part["language"], part["planted"], strict=True))
                   for name, part in known.groupby("question_id")}  # fmt: skip
    several = [list(onsets.values()) for onsets in by_question.values() if len(onsets) >= 2]
    layers = layer_table(examples, {"readiness": readiness}, 50, 0).set_index(["signal", "language", "layer"])
    for at in range(25):
        same = [np.mean([(at >= x) == (at >= y) for x, y in combinations(onsets, 2)]) for onsets in several]
        found = layers.loc[("stability", ALL, at)]
        assert found["value"] == pytest.approx(np.mean(same), abs=1e-12)
        assert found["n"] == len(several)
        for language in LANGUAGES[1:]:
            both = [(o["en"], o[language]) for o in by_question.values() if "en" in o and language in o]
            found = layers.loc[("agreement_en", language, at)]
            assert found["n"] == len(both)
            assert found["value"] == pytest.approx(np.mean([(at >= x) == (at >= y) for x, y in both]), abs=1e-12)
    figures = summaries(examples, {"readiness": readiness}, 24, 50, 0)["en-x"]
    ratings = known.pivot(index="language", columns="question_id", values="planted").to_numpy()
    wanted = krippendorff.alpha(reliability_data=ratings, level_of_measurement="interval")
    assert figures["alpha"]["value"] == pytest.approx(wanted, abs=1e-9)
    assert figures["boundary"]["value"] == known["planted"].median()
    assert (figures["without_onset"], figures["n"]) == (skipped.sum(), len(frame))
    assert figures["phased_fraction"]["value"] == pytest.approx(examples["phased"].mean())


def test_encoding_leaves_out_what_has_nothing_to_choose_from() -> None:
    """p00: Thai has one question, q3 is there in Thai and German alone. p01: one question. p02: English alone."""
    frame = frame_of(Design(paragraphs=4, languages=("en", "de", "th")))
    name, language, paragraph = (frame[c] for c in ("question_id", "language", "paragraph"))
    drop = (paragraph == "p00") & (language == "th") & (name != "p00q3")
    drop |= (name == "p00q3") & (language == "en")
    drop |= (paragraph == "p01") & (name != "p01q2")
    drop |= (paragraph == "p02") & (language != "en")
    frame = frame[~drop].reset_index(drop=True)
    states = hidden_states(frame, 2, 8, seed=17, question_from=0)
    found = encode(frame, states)
    wanted = np.full((len(frame), 2), NAN)
    for paragraph, taking_part in (
        ("p00", {"en": [0, 1, 2], "de": [0, 1, 2, 3]}),
        ("p03", dict.fromkeys(["en", "de", "th"], range(4))),
    ):
        centred = {}
        for x, questions in taking_part.items():
            rows = {q: row_of(frame, f"{paragraph}q{q}", x) for q in questions}
            mean = np.mean([states[row].astype(float) for row in rows.values()], axis=0)
            centred |= {(q, x): states[row] - mean for q, row in rows.items()}
        for q, x in centred:
            others = {r: [v for (s, y), v in centred.items() if s == r and y != x] for r in range(4)}
            candidates = {r: np.mean(values, axis=0) for r, values in others.items() if values}
            if q not in candidates:
                continue  # German q3: no other language that takes part has it
            for layer in range(2):
                query = centred[q, x][layer]
                cosines = {
                    r: query @ c[layer] / np.linalg.norm(query) / np.linalg.norm(c[layer])
                    for r, c in candidates.items()
                }
                rank = 1 + sum(value > cosines[q] for value in cosines.values())
                wanted[row_of(frame, f"{paragraph}q{q}", x), layer] = 1 - log2(rank) / log2(len(candidates))
    assert np.isnan(wanted).all(1).sum() == 1 + 1 + 3 + 4  # Thai q3 and German q3 on p00, and all of p01 and p02
    np.testing.assert_allclose(found.encoding, wanted, atol=1e-9)
    for values in vars(found).values():
        assert (np.isnan(values) == np.isnan(wanted)).all()
    aligned = train_layer(states[:, 0], task_of(frame, np.ones(len(frame), bool)), ALIGNMENT, SETTINGS).aligned
    assert (np.isnan(aligned) == np.isnan(wanted[:, :1])).all()


def row_of(frame: pd.DataFrame, question: str, language: str) -> int:
    (row,) = np.flatnonzero((frame["question_id"] == question) & (frame["language"] == language))
    return int(row)
