"""Stability of a layer is the chance that two languages of a question put it in the same phase."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.intervals import interval

from xprobe.phases.bootstrap import ClusterBootstrap
from xprobe.phases.stability import agreement_with, in_phase_two, layer_stability, pairwise_agreement

Floats = NDArray[np.float64]
NAN = float("nan")
LAYERS = 9


def counted(onsets: list[float], layers: int) -> list[float]:
    """Per layer, the share of pairs of onsets that put it in the same phase."""
    pairs = list(combinations([onset for onset in onsets if not np.isnan(onset)], 2))
    return [sum((layer >= a) == (layer >= b) for a, b in pairs) / len(pairs) for layer in range(layers)]


def agreement(questions: dict[str, list[float]], layers: int = LAYERS) -> Floats:
    """A_g(l) of questions given as lists of onsets."""
    onset = np.array([value for values in questions.values() for value in values])
    names = np.array([name for name, values in questions.items() for _ in values])
    return pairwise_agreement(in_phase_two(onset, layers), names)[0]


# -- phase of a layer -----------------------------------------------------------------------------------------------


def test_phase_two_starts_at_the_onset() -> None:
    np.testing.assert_array_equal(in_phase_two(np.array([2.0]), 5), [[0, 0, 1, 1, 1]])


def test_an_example_without_onset_has_no_phase_at_any_layer() -> None:
    phase = in_phase_two(np.array([NAN, 3.0]), 4)
    assert np.isnan(phase[0]).all()
    np.testing.assert_array_equal(phase[1], [0, 0, 0, 1])


# -- agreement within a question ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(st.lists(st.one_of(st.integers(2, LAYERS - 2).map(float), st.just(NAN)), max_size=8), max_size=6))
def test_pairwise_agreement_is_the_share_of_agreeing_pairs(questions: list[list[float]]) -> None:
    named = {f"q{at}": onsets for at, onsets in enumerate(questions)}
    expected = [counted(onsets, LAYERS) for onsets in questions if np.sum(~np.isnan(onsets)) >= 2]
    got = agreement(named)
    assert got.shape == (len(expected), LAYERS)
    np.testing.assert_allclose(got, np.reshape(expected, (-1, LAYERS)), atol=1e-12)


def test_agreement_is_one_where_all_languages_share_the_phase() -> None:
    np.testing.assert_array_equal(agreement({"q": [5.0, 5.0, 5.0]}), np.ones((1, LAYERS)))


@pytest.mark.parametrize("n", [2, 4, 6, 12])
def test_languages_split_in_half_agree_as_two_random_halves_do(n: int) -> None:
    (values,) = agreement({"q": [3.0] * (n // 2) + [6.0] * (n // 2)})
    np.testing.assert_allclose(values[3:6], 1 - n / (2 * (n - 1)), atol=1e-12)
    np.testing.assert_allclose(values[[0, 1, 2, 6, 7, 8]], 1.0)


def test_one_of_n_languages_in_the_other_phase_lowers_agreement_by_two_in_n() -> None:
    (values,) = agreement({"q": [2.0, 2.0, 2.0, 2.0, 4.0]})
    np.testing.assert_allclose(values, [1, 1, 0.6, 0.6, 1, 1, 1, 1, 1])


def test_two_languages_agree_or_they_do_not() -> None:
    (values,) = agreement({"q": [3.0, 5.0]})
    np.testing.assert_allclose(values, [1, 1, 1, 0, 0, 1, 1, 1, 1])


def test_a_language_without_onset_does_not_count() -> None:
    np.testing.assert_allclose(agreement({"q": [3.0, NAN, 5.0, 5.0]}), agreement({"q": [3.0, 5.0, 5.0]}))


@pytest.mark.parametrize("onsets", [[4.0], [4.0, NAN], [NAN, NAN, NAN]])
def test_a_question_with_fewer_than_two_onsets_is_left_out(onsets: list[float]) -> None:
    assert len(agreement({"alone": onsets, "pair": [4.0, 4.0]})) == 1
    assert agreement({"alone": onsets}).shape == (0, LAYERS)


def test_the_named_example_belongs_to_its_question() -> None:
    questions = np.array(["b", "a", "b", "c", "a", "c", "d"])
    onset = np.array([2.0, 3.0, 2.0, 4.0, 5.0, 4.0, 6.0])
    values, first = pairwise_agreement(in_phase_two(onset, LAYERS), questions)
    assert questions[first].tolist() == ["a", "b", "c"]
    np.testing.assert_allclose(values[0], [1, 1, 1, 0, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(values[1:], 1.0)


# -- mean over questions --------------------------------------------------------------------------------------------


def random_study(seed: int, languages: int = 4) -> tuple[Floats, NDArray, NDArray, NDArray]:
    """Onsets with gaps of 30 shuffled questions on 10 paragraphs, not all asked in every language."""
    generator = np.random.default_rng(seed)
    names = np.array(["en", "de", "zh", "th", "ar"])[:languages]
    question, language = (part.ravel() for part in np.meshgrid(np.arange(30), np.arange(languages), indexing="ij"))
    keep = generator.permutation(np.flatnonzero(generator.random(len(question)) < 0.85))
    question, language = question[keep], language[keep]
    onset = generator.integers(2, LAYERS - 1, size=len(keep)).astype(float)
    onset[generator.random(len(keep)) < 0.15] = np.nan
    return onset, np.char.add("q", question.astype(str)), question // 3, names[language]


@pytest.mark.parametrize("seed", range(5))
def test_layer_stability_is_the_mean_over_questions(seed: int) -> None:
    onset, questions, paragraphs, _ = random_study(seed)
    value, lo, hi, n = layer_stability(onset, questions, LAYERS, ClusterBootstrap(paragraphs, 300, 0))
    groups = [onset[questions == name] for name in np.unique(questions)]
    usable = [counted(group.tolist(), LAYERS) for group in groups if np.sum(~np.isnan(group)) >= 2]
    np.testing.assert_allclose(value, np.mean(usable, axis=0), atol=1e-12)
    assert n.tolist() == [len(usable)] * LAYERS
    assert (lo <= value + 1e-12).all()
    assert (value <= hi + 1e-12).all()
    assert lo[4] < value[4] < hi[4]


def test_every_question_counts_alike_however_many_languages_it_has() -> None:
    onset = np.array([3.0, 5.0, *[4.0] * 10])
    questions = np.array(["few", "few", *["many"] * 10])
    value, _, _, n = layer_stability(onset, questions, LAYERS, ClusterBootstrap(questions, 100, 0))
    np.testing.assert_allclose(value, [1, 1, 1, 0.5, 0.5, 1, 1, 1, 1])
    assert n.tolist() == [2] * LAYERS


def test_intervals_of_stability_come_from_drawn_paragraphs() -> None:
    onset, questions, paragraphs, _ = random_study(9)
    bootstrap = ClusterBootstrap(paragraphs, 200, 4)
    _, lo, hi, _ = layer_stability(onset, questions, LAYERS, bootstrap)
    groups = {name: onset[questions == name] for name in np.unique(questions)}
    rows = {name: counted(v.tolist(), LAYERS) for name, v in groups.items() if np.sum(~np.isnan(v)) >= 2}
    home = dict(zip(questions.tolist(), paragraphs.tolist(), strict=True))
    drawn = []
    for weights in bootstrap.weights:
        sample = [row for name, row in rows.items() for _ in range(int(weights[home[name]]))]
        drawn.append(np.mean(sample, axis=0))
    held = np.array(sorted({home[name] for name in rows}))
    for layer, column in enumerate(np.transpose(drawn)):
        if np.ptp(column) == 0:
            assert lo[layer] == hi[layer] == column[0]
            continue
        known = [(home[name], row[layer]) for name, row in rows.items()]
        wanted = interval(column, held, lambda some, known=known: np.mean([value for p, value in known if p in some]))
        np.testing.assert_allclose((lo[layer], hi[layer]), wanted, atol=1e-12)


def test_no_question_with_two_onsets_gives_no_stability() -> None:
    onset, questions = np.array([3.0, NAN, 4.0]), np.array(["a", "a", "b"])
    value, lo, hi, n = layer_stability(onset, questions, LAYERS, ClusterBootstrap(questions, 50, 0))
    assert np.isnan([value, lo, hi]).all()
    assert n.tolist() == [0] * LAYERS


# -- agreement with one language ------------------------------------------------------------------------------------


def test_agreement_with_english_by_hand() -> None:
    table = [
        ("q1", "en", 3.0), ("q1", "de", 3.0), ("q1", "zh", 5.0),
        ("q2", "en", 4.0), ("q2", "de", 5.0), ("q2", "zh", NAN),
        ("q3", "en", NAN), ("q3", "de", 4.0), ("q3", "zh", 4.0),
        ("q4", "de", 2.0), ("q4", "zh", 2.0),
    ]  # fmt: skip
    questions, languages, onset = (np.array(column) for column in zip(*table, strict=True))
    result = agreement_with("en", onset, questions, languages, 7, ClusterBootstrap(questions, 100, 0))
    assert list(result) == ["de", "zh"]
    value, _, _, n = result["de"]  # q1 and q2; q3 has no English onset, q4 no English at all
    np.testing.assert_allclose(value, [1, 1, 1, 1, 0.5, 1, 1])
    assert n.tolist() == [2] * 7
    value, _, _, n = result["zh"]  # q1 alone
    np.testing.assert_allclose(value, [1, 1, 1, 0, 0, 1, 1])
    assert n.tolist() == [1] * 7


@pytest.mark.parametrize("seed", range(3))
def test_agreement_with_english_is_the_share_of_shared_questions_in_the_same_phase(seed: int) -> None:
    onset, questions, paragraphs, languages = random_study(seed, languages=5)
    result = agreement_with("en", onset, questions, languages, LAYERS, ClusterBootstrap(paragraphs, 100, 0))
    assert set(result) == {"de", "zh", "th", "ar"}
    onsets = {(q, x): o for q, x, o in zip(questions, languages, onset, strict=True) if not np.isnan(o)}
    for language, (value, _, _, n) in result.items():
        shared = [q for q in np.unique(questions) if (q, "en") in onsets and (q, language) in onsets]
        same = [[(l >= onsets[q, "en"]) == (l >= onsets[q, language]) for l in range(LAYERS)] for q in shared]  # noqa: E741
        np.testing.assert_allclose(value, np.mean(same, axis=0), atol=1e-12)
        assert n.tolist() == [len(shared)] * LAYERS


def test_without_the_reference_language_there_is_nothing_to_agree_with() -> None:
    onset, questions, languages = np.array([3.0, 4.0]), np.array(["q", "q"]), np.array(["de", "zh"])
    assert agreement_with("en", onset, questions, languages, 7, ClusterBootstrap(questions, 10, 0)) == {}


def test_a_language_that_shares_no_question_with_english_is_left_out() -> None:
    onset, questions = np.array([3.0, 4.0, 4.0]), np.array(["a", "a", "b"])
    languages = np.array(["en", "de", "zh"])
    assert list(agreement_with("en", onset, questions, languages, 7, ClusterBootstrap(questions, 10, 0))) == ["de"]
