"""Of several gold answers the first that can be used is, and all others are kept beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xprobe.qa.squad import read_squad

NAME = "koeln.de.json"
CONTEXT = "Köln liegt am Rhein. Der Dom wurde 1880 vollendet."


def document(answers: Any) -> dict[str, Any]:
    """Two questions; the second one's answers are given."""
    first = {"id": "q1", "question": "Wo?", "answers": [{"text": "am Rhein", "answer_start": 11}]}
    second = {"id": "q2", "question": "Wann?", "answers": answers}
    return {"data": [{"paragraphs": [{"context": CONTEXT, "qas": [first, second]}]}]}


def write(tmp_path: Path, content: dict[str, Any]) -> Path:
    path = tmp_path / NAME
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


GOLD = {"text": "1880", "answer_start": 35}
LONG = {"text": "wurde 1880", "answer_start": 29}
SEVERAL_ANSWERS = {
    "the first one moved": ([{**LONG, "answer_start": 28}, GOLD], ("1880", "wurde 1880")),
    "the first one without a start": ([{"text": "wurde 1880"}, GOLD], ("1880", "wurde 1880")),
    "the first one not in the context": ([{"text": "1881", "answer_start": 35}, LONG], ("wurde 1880", "1881")),
    "two moved": ([{**LONG, "answer_start": -1}, {**GOLD, "answer_start": 0}, GOLD], ("1880", "wurde 1880")),
    "the first one empty": ([{"text": " ", "answer_start": 35}, GOLD], ("1880",)),
    "the first one no text": ([{"text": 1880, "answer_start": 35}, GOLD], ("1880",)),
    "the first one bad UTF-8": ([{"text": "18\udc80", "answer_start": 35}, GOLD], ("1880",)),
    "the first one no object": (["1880", GOLD], ("1880",)),
    "a later one unusable": ([GOLD, None, {"text": ""}, {"text": "\ud83c"}, {}, LONG], ("1880", "wurde 1880")),
    "a later one moved": ([GOLD, {**LONG, "answer_start": 0}], ("1880", "wurde 1880")),
    "equal ones": ([GOLD, LONG, GOLD, {"text": " 1880 ", "answer_start": 34}], ("1880", "wurde 1880")),
}


@pytest.mark.parametrize(("given", "answers"), SEVERAL_ANSWERS.values(), ids=SEVERAL_ANSWERS)
def test_of_several_answers_the_first_that_stands_where_it_should_is_used(
    given: list[Any], answers: tuple[str, ...], tmp_path: Path
) -> None:
    records, problems, _ = read_squad(write(tmp_path, document(given)), "de")
    assert problems == []
    record = records["q2"]
    assert (record.answer, record.answers) == (answers[0], answers)
    assert record.context[record.answer_start :].startswith(record.answer)


def test_without_a_usable_answer_the_fault_of_the_first_is_named(tmp_path: Path) -> None:
    content = document([{**GOLD, "answer_start": 36}, {"text": ""}, 7])
    records, problems, _ = read_squad(write(tmp_path, content), "de")
    assert list(records) == ["q1"]
    assert [str(problem) for problem in problems] == [
        f"{NAME}: id q2: answer is not at answer_start "
        "('1880' is not at 36; its text is at 35; none of the 3 answers can be used)"
    ]
    _, problems, _ = read_squad(write(tmp_path, document([{"text": ""}, GOLD | {"text": "x"}])), "de")
    assert str(problems[0]) == f'{NAME}: id q2: empty "text" (none of the 2 answers can be used)'
