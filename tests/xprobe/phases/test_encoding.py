"""Encoding: ranks among the questions of a paragraph, by hand and vectorised; what is not defined is NaN."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory import PeakMemory

from xprobe.phases import encoding
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

    cosines = {q: cosine(centred(i), c) for q, c in candidates.items()}
    m = len(cosines)

    def encoding(q):
        rank = 1 + sum(v > cosines[q] + 1e-9 for k, v in cosines.items() if k != q)
        return 1 - np.log2(rank) / np.log2(m)

    right = cosines[questions[i]]
    margin = right - np.mean([v for k, v in cosines.items() if k != questions[i]])
    return np.array([encoding(questions[i]), float(right == max(cosines.values())), margin,
                     np.mean([encoding(q) for q in cosines])])  # fmt: skip


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


def test_every_value_is_the_one_that_plain_loops_give(unbalanced):
    states, questions, languages = unbalanced
    retrieval = paragraph_encoding(states, questions, languages)
    for i in range(len(states)):
        for layer in range(states.shape[1]):
            wanted = by_hand(states[:, layer], questions, languages, i)
            values = [getattr(retrieval, name)[i, layer] for name in ("encoding", "top1", "margin", "control")]
            assert values == pytest.approx(wanted, abs=1e-12, nan_ok=True)
    th, alone = languages == "th", questions == "q4"
    assert np.isnan(retrieval.encoding[th | alone]).all()
    assert np.isfinite(retrieval.encoding[~(th | alone)]).all()


def test_states_that_are_all_the_same_tie_in_the_middle():
    """As the last prompt token at layer 0: no question can be told apart, and the control says the same."""
    questions, languages = np.repeat(["a", "b", "c", "d"], 3), np.tile(["en", "de", "zh"], 4)
    states = np.tile(np.random.default_rng(0).normal(size=8).astype(np.float32), (12, 1, 1))
    retrieval = paragraph_encoding(states, questions, languages)
    assert np.allclose(retrieval.encoding, 1 - np.log2(2.5) / 2)
    assert np.allclose(retrieval.control, retrieval.encoding)
    assert np.allclose(retrieval.top1, 0.25)
    assert np.allclose(retrieval.margin, 0)


def test_a_question_direction_that_languages_share_is_found_through_offsets_of_language_and_paragraph():
    generator = np.random.default_rng(1)
    questions, languages = np.repeat(["a", "b", "c", "d"], 3), np.tile(["en", "de", "zh"], 4)
    direction = {q: generator.normal(size=32) for q in "abcd"}
    offset = {x: 100 * generator.normal(size=32) for x in ("en", "de", "zh")}
    states = np.stack([direction[q] + offset[x] for q, x in zip(questions, languages, strict=True)])[:, None]
    retrieval = paragraph_encoding(states, questions, languages)
    assert (retrieval.encoding == 1).all()
    assert (retrieval.top1 == 1).all()
    assert np.allclose(retrieval.control, np.mean(1 - np.log2([1, 2, 3, 4]) / 2))


def test_chance_is_the_control_not_zero():
    generator = np.random.default_rng(2)
    questions, languages = np.repeat([f"q{i}" for i in range(4)], 6), np.tile(list("abcdef"), 4)
    retrieval = [paragraph_encoding(generator.normal(size=(24, 2, 16)), questions, languages) for _ in range(150)]
    encoding = np.mean([f.encoding.mean() for f in retrieval])
    assert encoding == pytest.approx(np.mean(1 - np.log2([1, 2, 3, 4]) / 2), abs=0.02)
    assert np.mean([f.selectivity.mean() for f in retrieval]) == pytest.approx(0, abs=0.02)
    assert np.mean([f.margin.mean() for f in retrieval]) == pytest.approx(0, abs=0.02)


def test_ties_between_some_candidates_share_their_ranks():
    candidates = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[:, None]
    retrieval = retrieve(np.array([[[1.0, 0.1]]]), candidates, np.array([1]))
    assert retrieval.encoding[0, 0] == pytest.approx(1 - np.log2(1.5) / np.log2(3))
    assert retrieval.top1[0, 0] == 0.5


def pair_by_pair(cosines, right):
    """Encoding, control, top-1 and margin of one query: every candidate against every other."""
    m = len(cosines)
    ahead = [sum(other - own > 1e-9 for other in cosines) for own in cosines]
    equal = [sum(abs(other - own) <= 1e-9 for other in cosines) - 1 for own in cosines]
    values = [1 - np.log2(1 + a + e / 2) / np.log2(m) for a, e in zip(ahead, equal, strict=True)]
    top1 = 1 / (1 + equal[right]) if ahead[right] == 0 else 0.0
    return values[right], np.mean(values), top1, cosines[right] - np.mean(np.delete(cosines, right))


def by_cosine(cosines):
    """Candidates [M, 1, 2] whose cosines with the query (1, 0) are these."""
    cosines = np.asarray(cosines, float)
    return np.stack([cosines, np.sqrt(1 - cosines**2)], axis=-1)[:, None]


QUERY = np.array([[[1.0, 0.0]]])


@settings(deadline=None)
@given(
    # a few coarse values that many share, with steps around the size of a tie beside them
    st.lists(st.tuples(st.sampled_from([-0.5, 0.0, 0.25]), st.integers(-6, 6)), min_size=2, max_size=40),
    st.data(),
)
def test_ranks_and_ties_are_those_of_all_pairs(parts, data):
    cosines = [coarse + 0.45e-9 * fine for coarse, fine in parts]
    right = data.draw(st.integers(0, len(parts) - 1))
    retrieval = retrieve(QUERY, by_cosine(cosines), np.array([right]))
    wanted = pair_by_pair(cosines, right)
    values = [getattr(retrieval, name)[0, 0] for name in ("encoding", "control", "top1", "margin")]
    assert values == pytest.approx(wanted, abs=1e-12)


def test_the_ends_of_a_chain_of_ties_do_not_tie():
    cosines = [0.0, 0.8e-9, 1.6e-9]  # ranks 2.5, 2, 1.5: each end ties with the middle alone
    retrieval = [retrieve(QUERY, by_cosine(cosines), np.array([right])) for right in range(3)]
    assert [f.encoding[0, 0] for f in retrieval] == pytest.approx(1 - np.log2([2.5, 2, 1.5]) / np.log2(3))
    assert [f.top1[0, 0] for f in retrieval] == [0, 1 / 3, 1 / 2]
    assert retrieval[0].control[0, 0] == pytest.approx(np.mean(1 - np.log2([2.5, 2, 1.5]) / np.log2(3)))


def test_a_cosine_that_is_not_a_number_gives_no_value():
    queries = np.array([[[1.0, 0.0]], [[np.nan, 0.0]]])
    retrieval = retrieve(queries, by_cosine([0.1, 0.2, 0.3]), np.array([2, 2]))
    for values in vars(retrieval).values():
        assert np.isfinite(values[0]).all()
        assert np.isnan(values[1]).all()


@pytest.mark.parametrize("size", [1, 3000, 20_000])
def test_blocks_change_no_value(unbalanced, monkeypatch, size):
    whole = paragraph_encoding(*unbalanced)
    monkeypatch.setattr(encoding, "BLOCK_BYTES", size)
    for name, values in vars(paragraph_encoding(*unbalanced)).items():
        assert values == pytest.approx(getattr(whole, name), abs=1e-12, nan_ok=True)


def test_a_book_with_800_questions_on_one_text_takes_little_memory():
    """All pairs of candidates would be 4 layers x 800 x 800 x 800 numbers of 8 bytes: 16 GB and more."""
    m, generator = 800, np.random.default_rng(0)
    direction = generator.normal(size=(m, 1, 4, 32))
    states = (direction + 0.1 * generator.normal(size=(m, 2, 4, 32))).astype(np.float32)
    states[:, :, 0] = 1  # as the last prompt token at layer 0: all tie
    with PeakMemory() as peak:
        retrieval = paragraph_encoding(
            states.reshape(2 * m, 4, 32), np.repeat(np.arange(m), 2), np.tile(["en", "de"], m)
        )
    assert peak.growth < 2 * encoding.BLOCK_BYTES
    assert np.allclose(retrieval.encoding[:, 0], 1 - np.log2((m + 1) / 2) / np.log2(m))
    assert (retrieval.encoding[:, 1:] == 1).all()
    assert np.allclose(retrieval.control[:, 1:], np.mean(1 - np.log2(np.arange(1, m + 1)) / np.log2(m)))


def test_many_layers_are_centred_a_few_at_a_time():
    """4 questions in 12 languages, 200 layers, 512 wide: the states alone are 39 MB in fp64, 20 MB as given."""
    states = np.random.default_rng(0).normal(size=(48, 200, 512)).astype(np.float32)
    questions, languages = np.repeat(list("abcd"), 12), np.tile([f"l{i}" for i in range(12)], 4)
    with PeakMemory() as peak:
        retrieval = paragraph_encoding(states, questions, languages)
    assert peak.growth < states.size * 8
    last = paragraph_encoding(states[:, -1:], questions, languages)
    assert np.array_equal(retrieval.encoding[:, -1:], last.encoding)


@pytest.mark.parametrize("languages", [["en"] * 4, ["en", "de"] * 2])
def test_one_language_or_one_question_has_no_value(languages):
    questions = np.array(list("abcd")) if len(set(languages)) == 1 else np.array(["a"] * 4)
    if len(set(languages)) > 1:
        languages = languages[:2]
        questions = questions[:2]
    states = np.random.default_rng(0).normal(size=(len(questions), 2, 5))
    retrieval = paragraph_encoding(states, questions, np.array(languages))
    assert np.isnan(retrieval.encoding).all()
    assert np.isnan(retrieval.control).all()


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
