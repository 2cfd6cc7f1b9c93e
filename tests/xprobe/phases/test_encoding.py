"""Encoding: ranks among the questions of a paragraph, by hand and vectorised; what is not defined is NaN."""

from __future__ import annotations

import numpy as np
import pytest

from xprobe.phases.encoding import paragraph_encoding, retrieve
from xprobe.phases.segmentation import encoding_depths


def by_hand(states, questions, languages, i):
    """Encoding, top-1, margin and control of example i of one layer [N, D], with loops and nothing else."""

    def members(language):
        return [j for j in range(len(states)) if languages[j] == language]

    def centred(j):
        own = members(languages[j])
        return states[j] - np.mean([states[k] for k in own], 0)

    usable = [j for j in range(len(states)) if len(members(languages[j])) > 1]
    candidates = {}
    for question in sorted(set(questions)):
        others = [centred(j) for j in usable if questions[j] == question and languages[j] != languages[i]]
        if others:
            candidates[question] = np.mean(others, 0)
    if i not in usable or questions[i] not in candidates or len(candidates) < 2:
        return np.full(4, np.nan)

    def cosine(a, b):
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    found = {q: cosine(centred(i), c) for q, c in candidates.items()}
    m = len(found)

    def encoding(q):
        rank = 1 + sum(v > found[q] + 1e-9 for k, v in found.items() if k != q)
        return 1 - np.log2(rank) / np.log2(m)

    right = found[questions[i]]
    margin = right - np.mean([v for k, v in found.items() if k != questions[i]])
    return np.array([encoding(questions[i]), float(right == max(found.values())), margin,
                     np.mean([encoding(q) for q in found])])  # fmt: skip


@pytest.fixture
def unbalanced():
    """5 questions in 4 languages, some missing; th has one question only; q4 is in one language only."""
    pairs = [(f"q{q}", x) for q in range(4) for x in ("en", "de", "zh") if (q, x) not in ((1, "de"), (3, "zh"))]
    pairs += [("q0", "th"), ("q4", "en")]
    generator = np.random.default_rng(7)
    generator.shuffle(pairs)
    questions, languages = np.array(pairs).T
    directions = {q: generator.normal(size=(3, 6)) for q in sorted(set(questions))}
    states = np.stack([directions[q] for q in questions]) + generator.normal(scale=1.0, size=(len(pairs), 3, 6))
    return states, questions, languages


def test_every_value_is_what_loops_give(unbalanced):
    states, questions, languages = unbalanced
    found = paragraph_encoding(states, questions, languages)
    for i in range(len(states)):
        for layer in range(states.shape[1]):
            wanted = by_hand(states[:, layer], questions, languages, i)
            values = [getattr(found, name)[i, layer] for name in ("encoding", "top1", "margin", "control")]
            assert values == pytest.approx(wanted, abs=1e-12, nan_ok=True)
    th, alone = languages == "th", questions == "q4"
    assert np.isnan(found.encoding[th | alone]).all()
    assert np.isfinite(found.encoding[~(th | alone)]).all()


def test_states_that_are_all_the_same_tie_in_the_middle():
    """As the last prompt token at layer 0: no question can be told apart, and the control says the same."""
    questions, languages = np.repeat(["a", "b", "c", "d"], 3), np.tile(["en", "de", "zh"], 4)
    states = np.tile(np.random.default_rng(0).normal(size=8).astype(np.float32), (12, 1, 1))
    found = paragraph_encoding(states, questions, languages)
    assert np.allclose(found.encoding, 1 - np.log2(2.5) / 2)
    assert np.allclose(found.control, found.encoding)
    assert np.allclose(found.top1, 0.25)
    assert np.allclose(found.margin, 0)


def test_a_question_direction_that_languages_share_is_found_through_offsets_of_language_and_paragraph():
    generator = np.random.default_rng(1)
    questions, languages = np.repeat(["a", "b", "c", "d"], 3), np.tile(["en", "de", "zh"], 4)
    direction = {q: generator.normal(size=32) for q in "abcd"}
    offset = {x: 100 * generator.normal(size=32) for x in ("en", "de", "zh")}
    states = np.stack([direction[q] + offset[x] for q, x in zip(questions, languages, strict=True)])[:, None]
    found = paragraph_encoding(states, questions, languages)
    assert (found.encoding == 1).all()
    assert (found.top1 == 1).all()
    assert np.allclose(found.control, np.mean(1 - np.log2([1, 2, 3, 4]) / 2))


def test_chance_is_the_control_not_zero():
    generator = np.random.default_rng(2)
    questions, languages = np.repeat([f"q{i}" for i in range(4)], 6), np.tile(list("abcdef"), 4)
    found = [paragraph_encoding(generator.normal(size=(24, 2, 16)), questions, languages) for _ in range(150)]
    encoding = np.mean([f.encoding.mean() for f in found])
    assert encoding == pytest.approx(np.mean(1 - np.log2([1, 2, 3, 4]) / 2), abs=0.02)
    assert np.mean([f.selectivity.mean() for f in found]) == pytest.approx(0, abs=0.02)
    assert np.mean([f.margin.mean() for f in found]) == pytest.approx(0, abs=0.02)


def test_ties_between_some_candidates_share_their_ranks():
    candidates = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[:, None]
    found = retrieve(np.array([[[1.0, 0.1]]]), candidates, np.array([1]))
    assert found.encoding[0, 0] == pytest.approx(1 - np.log2(1.5) / np.log2(3))
    assert found.top1[0, 0] == 0.5


@pytest.mark.parametrize("languages", [["en"] * 4, ["en", "de"] * 2])
def test_one_language_or_one_question_has_no_value(languages):
    questions = np.array(list("abcd")) if len(set(languages)) == 1 else np.array(["a"] * 4)
    if len(set(languages)) > 1:
        languages = languages[:2]
        questions = questions[:2]
    states = np.random.default_rng(0).normal(size=(len(questions), 2, 5))
    found = paragraph_encoding(states, questions, np.array(languages))
    assert np.isnan(found.encoding).all()
    assert np.isnan(found.control).all()


def test_encoding_depth_is_where_the_curve_rises_before_its_maximum():
    curve = np.array([0.1, 0.5, 0.52, 0.5, 0.51, 0.8, 0.83, 0.81, 0.7, 0.3])
    noise = np.random.default_rng(0).normal(scale=1e-3, size=(20, 10))
    depth, peak = encoding_depths(curve + noise)
    assert (depth == 5).all()
    assert set(peak) <= {5.0, 6.0, 7.0}
    depth, peak = encoding_depths(np.array([[0.9, 0.5, 0.6, 0.4, 0.3, 0.2], [0.0] * 6, [0.1, np.nan, 1, 1, 1, 1]]))
    assert np.isnan(depth).all()  # too short before the maximum; flat; not known
    assert peak[0] == 2
    assert np.isnan(peak[2])
