"""Pairs of questions: balanced, the same every time, and only where two answers differ."""

from __future__ import annotations

from collections import Counter

import pytest

from xprobe.phases.patch_settings import PatchSettings
from xprobe.qa.prompts import Prompt
from xprobe.qa.records import Example
from xprobe.stages.pairs import choose_pairs

LANGUAGES = ["en", "de", "ru", "zh"]


def prompt(language: str, paragraph: int, question: int, answer: tuple[int, ...], setting: str = "en-x") -> Prompt:
    context_language = "en" if setting == "en-x" else language
    name = f"p{paragraph}q{question}"
    example = Example(setting, language, name, f"p{paragraph}", context_language, "Ada sold 40", name, "40", 9)
    return Prompt(example, (1, 2, 3, *answer), 3, {"question": (1, 2)})


def study(paragraphs: int = 12, questions: int = 3, setting: str = "en-x") -> list[Prompt]:
    return [
        prompt(language, paragraph, question, (10 + question,), setting)
        for paragraph in range(paragraphs)
        for language in LANGUAGES
        for question in range(questions)
    ]


def test_each_question_is_once_the_own_one_and_other_languages_take_turns() -> None:
    pairs = choose_pairs(study(), PatchSettings(), 0)
    same = [pair for pair in pairs if pair.pairs == "same"]
    assert Counter(pair.own.example.id for pair in same) == Counter({one.example.id: 1 for one in study()})
    assert all(pair.own.example.language == pair.other.example.language for pair in same)
    assert all(pair.own.example.question_id != pair.other.example.question_id for pair in pairs)
    assert all(pair.own.example.paragraph == pair.other.example.paragraph for pair in pairs)
    cross = Counter((p.own.example.language, p.other.example.language) for p in pairs if p.pairs == "cross")
    assert cross == Counter({(one, other): 4 for one in LANGUAGES for other in LANGUAGES if one != other})


def test_controls_stand_with_the_first_pairs() -> None:
    pairs = choose_pairs(study(), PatchSettings(controls=2), 0)
    with_controls = [pair for pair in pairs if pair.controls]
    assert Counter((p.own.example.paragraph, p.own.example.language) for p in with_controls) == Counter(
        {(f"p{i}", language): 2 for i in range(12) for language in LANGUAGES}
    )
    for pair in with_controls:
        own = pair.own.example
        again, elsewhere = pair.controls["same_question"], pair.controls["other_paragraph"]
        assert isinstance(again, Prompt)
        assert isinstance(elsewhere, Prompt)
        assert again.example.question_id == own.question_id
        assert again.example.language != own.language
        assert elsewhere.example.paragraph != own.paragraph
        assert elsewhere.example.language == own.language
    seeds = [pair.controls["random"] for pair in with_controls]
    assert len(set(map(str, seeds))) == len(seeds)


def test_the_choice_depends_on_the_seed_alone() -> None:
    first, again, other = ([pair.key for pair in choose_pairs(study(), PatchSettings(), seed)] for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(("pairs", "cross"), [(1, 0), (2, 2), (9, 5)])
def test_bounds_are_kept(pairs: int, cross: int) -> None:
    found = choose_pairs(study(), PatchSettings(pairs=pairs, cross=cross), 0)
    count = Counter((p.pairs, p.own.example.paragraph, p.own.example.language) for p in found)
    assert {n for (kind, *_), n in count.items() if kind == "same"} == {min(pairs, 3)}
    assert {n for (kind, *_), n in count.items() if kind == "cross"} == ({min(cross, 9)} if cross else set())
    assert len({pair.key for pair in found}) == len(found)


def test_shared_beginnings_are_given_and_equal_answers_are_no_pair() -> None:
    answers = [(5, 6, 7), (5, 6, 8), (5, 6), (5, 6, 7)]
    prompts = [prompt("en", 0, question, answer) for question, answer in enumerate(answers)]
    pairs = choose_pairs(prompts, PatchSettings(), 0)
    assert {pair.given for pair in pairs} == {(5, 6)}
    assert {frozenset(pair.answers) for pair in pairs} == {frozenset({7, 8})}
    assert "p0q2" not in {name for pair in pairs for (_, _, name) in pair.key}  # it ends before the others differ
    assert {frozenset((p.own.example.question_id, p.other.example.question_id)) for p in pairs} <= {
        frozenset({"p0q0", "p0q1"}), frozenset({"p0q1", "p0q3"}),
    }  # fmt: skip


def test_other_languages_have_other_contexts_in_x_x() -> None:
    pairs = choose_pairs(study(setting="x-x"), PatchSettings(), 0)
    assert {pair.pairs for pair in pairs} == {"same"}
    assert all("same_question" not in pair.controls for pair in pairs)
