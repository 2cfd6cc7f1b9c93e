"""A limited run spreads its questions over paragraphs, and two runs of any limits and languages can be compared."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xprobe.config import StudyConfig
from xprobe.errors import UsageError
from xprobe.qa.parallel import load_data
from xprobe.qa.records import Dataset, Record
from xprobe.qa.selection import RULE, Selection, choose_questions, order_paragraphs, order_questions
from xprobe.stages.questions import read_questions

Paragraphs = list[list[str]]

SIZES = st.lists(st.integers(1, 9), max_size=8)


def numbered(sizes: list[int]) -> Paragraphs:
    """Paragraphs ``a``, ``b``, ... of these sizes; the questions of ``a`` are ``a1``, ``a2``, ..."""
    return [[f"{chr(97 + p)}{q + 1}" for q in range(size)] for p, size in enumerate(sizes)]


def flat(paragraphs: Paragraphs) -> list[str]:
    return list(chain.from_iterable(paragraphs))


def per_paragraph(questions: list[str]) -> Counter[str]:
    return Counter(id_[0] for id_ in questions)


def dataset(sizes: list[int], lacking: dict[str, set[str]]) -> Dataset:
    """The questions of ``numbered(sizes)`` in every language of ``lacking``, without the ids that it lacks."""
    records = {
        language: {
            id_: Record(id_, language, f"p{p}", f"{language} text {p}", f"{id_}?", "text", 3)
            for p, ids in enumerate(numbered(sizes))
            for id_ in ids
            if id_ not in missing
        }
        for language, missing in lacking.items()
    }
    return Dataset("made", records)


def chosen(data: Dataset, languages: list[str] | None = None, **bounds: int | None) -> list[str]:
    """The ids of the questions asked in x-x."""
    examples, _ = data.select(["x-x"], languages, **bounds)
    return list(dict.fromkeys(example.question_id for example in examples))


# -- the rule, by hand ----------------------------------------------------------------------------------------------


def test_four_questions_per_paragraph_then_small_paragraphs_then_round_robin_then_paragraphs_of_one() -> None:
    order = order_questions(numbered([6, 1, 3, 5, 2, 1, 7]))
    assert order == [
        "a1", "a2", "a3", "a4", "d1", "d2", "d3", "d4", "g1", "g2", "g3", "g4",  # paragraphs of four or more
        "c1", "c2", "c3", "e1", "e2",  # of two or three
        "a5", "d5", "g5", "a6", "g6", "g7",  # round robin
        "b1", "f1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "counts"),
    [
        (1, [1]),
        (4, [4]),
        (8, [4, 4]),
        (10, [4, 4, 2]),
        (24, [4] * 6),
        (25, [5, *[4] * 5]),
        (29, [5] * 5 + [4]),
        (30, [5] * 6),
        (99, [5] * 6),
    ],
)
def test_a_limit_on_six_paragraphs_of_five_questions(limit: int, counts: list[int]) -> None:
    asked = choose_questions(numbered([5] * 6), flat(numbered([5] * 6)), limit=limit)
    assert list(per_paragraph(asked).values()) == counts


def test_paragraphs_and_questions_per_paragraph_are_taken_exactly() -> None:
    paragraphs = numbered([2, 6, 5, 1, 7])
    everything = flat(paragraphs)
    assert choose_questions(paragraphs, everything, n_paragraphs=2, questions_per_paragraph=6) == [
        *paragraphs[1], *paragraphs[4][:6],
    ]  # fmt: skip
    assert choose_questions(paragraphs, everything, n_paragraphs=2) == [*paragraphs[1], *paragraphs[2]]
    assert choose_questions(paragraphs, everything, n_paragraphs=3, questions_per_paragraph=1) == ["a1", "b1", "c1"]
    in_all = choose_questions(paragraphs, everything, questions_per_paragraph=2)
    assert per_paragraph(in_all) == {"a": 2, "b": 2, "c": 2, "d": 1, "e": 2}


def test_where_the_data_has_less_than_asked_for_all_of_it_is_taken() -> None:
    paragraphs = numbered([2, 6, 1])
    everything = flat(paragraphs)
    asked = choose_questions(paragraphs, everything, n_paragraphs=9, questions_per_paragraph=5)
    assert per_paragraph(asked) == {"b": 5, "a": 2, "c": 1}
    assert set(choose_questions(paragraphs, everything, limit=99)) == set(everything)
    assert choose_questions([], [], limit=3) == []


# -- the rule, whatever the paragraphs ------------------------------------------------------------------------------


@given(SIZES)
def test_the_order_holds_every_question_once(sizes: list[int]) -> None:
    paragraphs = numbered(sizes)
    assert sorted(order_questions(paragraphs)) == sorted(flat(paragraphs))


@given(SIZES)
def test_no_other_choice_of_as_many_questions_has_four_questions_on_more_paragraphs(sizes: list[int]) -> None:
    order = order_questions(numbered(sizes))
    large = sum(size >= 4 for size in sizes)
    for limit in range(len(order) + 1):
        counts = per_paragraph(order[:limit])
        assert sum(count >= 4 for count in counts.values()) == min(limit // 4, large)


@given(SIZES)
def test_at_most_one_paragraph_is_begun_and_not_filled(sizes: list[int]) -> None:
    """Only the paragraph that a limit has just reached may lack some of the four questions that it could have."""
    order = order_questions(numbered(sizes))
    size = {chr(97 + p): size for p, size in enumerate(sizes)}
    for limit in range(1, len(order) + 1):
        counts = per_paragraph(order[:limit])
        begun = [p for p, count in counts.items() if count < min(4, size[p])]
        assert len(begun) <= 1
        assert begun in ([], [order[limit - 1][0]])
        if any(size[p] == 1 for p in counts):
            assert limit > sum(s for s in sizes if s > 1)


@given(SIZES, st.integers(1, 8))
def test_a_limit_of_four_times_as_many_is_four_questions_on_each_paragraph(sizes: list[int], wanted: int) -> None:
    paragraphs = numbered(sizes)
    everything = flat(paragraphs)
    large = sum(size >= 4 for size in sizes)
    by_limit = choose_questions(paragraphs, everything, limit=4 * min(wanted, large))
    if by_limit:
        assert by_limit == choose_questions(
            paragraphs, everything, n_paragraphs=min(wanted, large), questions_per_paragraph=4
        )


@given(SIZES, st.integers(1, 9), st.integers(1, 9))
def test_paragraphs_that_hold_as_many_questions_as_asked_for_come_first(
    sizes: list[int], n_paragraphs: int, questions: int
) -> None:
    paragraphs = numbered(sizes)
    asked = choose_questions(paragraphs, flat(paragraphs), n_paragraphs=n_paragraphs, questions_per_paragraph=questions)
    counts = per_paragraph(asked)
    assert len(counts) == min(n_paragraphs, len(sizes))
    assert sum(count == questions for count in counts.values()) >= min(
        n_paragraphs, sum(size >= questions for size in sizes)
    )
    assert max(counts.values(), default=0) <= questions
    more = choose_questions(
        paragraphs, flat(paragraphs), n_paragraphs=n_paragraphs + 1, questions_per_paragraph=questions
    )
    assert more[: len(asked)] == asked
    assert sum(map(len, order_paragraphs(paragraphs, questions))) == sum(sizes)


# -- data with several languages ------------------------------------------------------------------------------------


@st.composite
def uneven_data(draw: st.DrawFn) -> Dataset:
    """Three languages, each of which lacks some questions."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    ids = [id_ for paragraph in numbered(sizes) for id_ in paragraph]
    return dataset(sizes, {language: draw(st.sets(st.sampled_from(ids))) for language in ("en", "de", "th")})


@given(uneven_data(), st.lists(st.sampled_from(["en", "de", "th"]), min_size=1, unique=True))
def test_a_larger_limit_contains_the_questions_of_a_smaller_one(data: Dataset, languages: list[str]) -> None:
    available = len(chosen(data, languages))
    previous: set[str] = set()
    for limit in range(1, available + 2):
        asked = set(chosen(data, languages, limit=limit))
        assert previous <= asked
        assert len(asked) == min(limit, available)
        previous = asked


@given(uneven_data(), st.lists(st.sampled_from(["en", "de", "th"]), min_size=1, unique=True))
def test_the_order_is_the_same_whatever_languages_are_asked_in(data: Dataset, languages: list[str]) -> None:
    """Each step of the limit adds one question: in any languages, the next one of all that they can ask."""

    def added(asked_in: list[str]) -> list[str]:
        steps = [set(chosen(data, asked_in, limit=n)) for n in range(1, len(chosen(data, asked_in)) + 1)]
        return [next(iter(step - before)) for before, step in zip([set[str](), *steps], steps, strict=False)]

    in_all = added(["en", "de", "th"])
    can_ask = {id_ for language in languages for id_ in data.records[language]}
    assert added(languages) == added(languages[::-1]) == [id_ for id_ in in_all if id_ in can_ask]


@given(uneven_data())
def test_reading_fewer_languages_changes_no_order_while_the_reference_is_read(data: Dataset) -> None:
    for language in ("de", "th"):
        read = replace(data, records={name: data.records[name] for name in ("en", language)})
        for limit in range(1, len(data.records[language]) + 1):
            assert set(chosen(read, [language], limit=limit)) == set(chosen(data, [language], limit=limit))


def test_a_question_that_the_reference_lacks_comes_last_by_id() -> None:
    data = dataset([4, 2], {"en": {"a2", "b1"}, "de": set(), "th": {"a1"}})
    assert chosen(data, limit=4) == ["a1", "a3", "a4", "b2"]
    assert set(chosen(data, limit=5)) == {"a1", "a3", "a4", "b2", "a2"}
    assert set(chosen(data, ["th"], limit=3)) == {"a3", "a4", "b2"}
    assert set(chosen(data, ["th"], limit=4)) == {"a3", "a4", "b2", "a2"}


def test_examples_stay_in_the_order_of_the_data() -> None:
    data = dataset([1, 5, 2], {"en": set(), "de": set()})
    examples, _ = data.select(["x-x", "en-x"], ["de", "en"], limit=7)
    assert [example.id for example in examples] == [
        f"{setting}/{language}/{id_}"
        for setting in ("x-x", "en-x")
        for id_ in ("b1", "b2", "b3", "b4", "b5", "c1", "c2")
        for language in ("de", "en")
    ]
    assert [example.id for example in data.select(["x-x"], limit=8)[0]] == [e.id for e in data.examples(["x-x"])]


# -- what is recorded -----------------------------------------------------------------------------------------------


def test_the_record_says_what_was_asked_for_and_what_was_taken() -> None:
    data = dataset([1, 5, 2], {"en": set(), "de": {"c1"}})
    _, selection = data.select(["en-x", "x-x"], limit=6)
    assert selection == Selection(6, None, None, 2, 6, 3, 8, RULE)
    _, selection = data.select(["en-x"], ["de"], paragraphs=9, questions_per_paragraph=3)
    assert selection == Selection(None, 9, 3, 3, 5, 3, 7, RULE)
    _, selection = data.select(["en-x"])
    assert selection.to_dict() == {
        "limit": None, "paragraphs": None, "questions_per_paragraph": None, "paragraphs_taken": 3, "questions_taken": 8,
        "paragraphs_in_data": 3, "questions_in_data": 8, "rule": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"limit": 0}, "limit must be a whole number of at least 1, got 0"),
        ({"paragraphs": -1}, "paragraphs must be a whole number of at least 1, got -1"),
        ({"limit": 3, "questions_per_paragraph": 2}, "leave out limit, or leave out questions_per_paragraph"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(bounds: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        dataset([3], {"en": set()}).select(["en-x"], **bounds)


def test_a_bound_may_be_a_whole_number_of_numpy() -> None:
    assert len(chosen(dataset([3], {"en": set()}), limit=np.int64(2))) == 2


# -- real data ------------------------------------------------------------------------------------------------------


def test_a_limited_run_reads_the_reference_language_for_its_order() -> None:
    limited = StudyConfig(settings=("x-x",), languages=("th",), paragraphs=2, questions_per_paragraph=2)
    found = read_questions(limited)
    data, examples, selection = found.data, found.examples, found.selection
    assert data.languages == ("en", "th")
    assert {example.language for example in examples} == {"th"}
    assert (selection.paragraphs, selection.paragraphs_taken, selection.questions_taken) == (2, 2, 4)
    found = read_questions(StudyConfig(settings=("x-x",), languages=("th",)))
    data, examples, selection = found.data, found.examples, found.selection
    assert data.languages == ("th",)
    assert len(examples) == selection.questions_taken == selection.questions_in_data == 36


def test_the_built_in_set_has_three_questions_on_every_paragraph_of_a_limited_run() -> None:
    data = load_data("builtin", ["en"])
    for limit in range(3, 37, 3):
        _, selection = data.select(["en-x"], limit=limit)
        assert selection.paragraphs_taken == limit // 3


def test_a_limited_run_on_xquad_lies_on_many_paragraphs(xquad_folder: Path) -> None:
    data = load_data(xquad_folder)
    sizes = Counter(record.paragraph for record in data.records["en"].values())
    large = sum(size >= 4 for size in sizes.values())
    for limit in (24, 48, 177, 240):
        examples, selection = data.select(["en-x"], ["en"], limit=limit)
        counts = Counter(example.paragraph for example in examples)
        assert selection.paragraphs_taken == len(counts) == math.ceil(limit / 4) <= large
        assert sorted(counts.values())[1:] == [4] * (len(counts) - 1)
        others, _ = data.select(["x-x"], ["th", "zh"], limit=limit)
        assert {e.question_id for e in others} == {e.question_id for e in examples}
    twelve, _ = data.select(["en-x"], ["en"], paragraphs=12, questions_per_paragraph=4)
    assert twelve == data.examples(["en-x"], ["en"], limit=48)
