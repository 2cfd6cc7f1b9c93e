"""A bad record is reported with file and id and left out; the records around it survive."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xprobe.errors import DataError, UsageError
from xprobe.qa.parallel import load_data
from xprobe.qa.records import Problem, Record
from xprobe.qa.squad import read_squad


def ask(id_: str, question: str, text: str, start: int) -> dict[str, Any]:
    return {"id": id_, "question": question, "answers": [{"text": text, "answer_start": start}]}


CONTEXT = "Köln liegt am Rhein. Der Dom wurde 1880 vollendet und ist 157 Meter hoch."
QUESTIONS = [
    ask("q1", "Wo liegt Köln?", "am Rhein", 11),
    ask("q2", "Wann vollendet?", "1880", 35),
    ask("q3", "Wie hoch?", "157 Meter", 58),
]
PARAGRAPHS = [
    {"context": CONTEXT, "qas": QUESTIONS},
    {"context": "Bonn ist kleiner.", "qas": [ask("q4", "Was?", "kleiner", 9)]},
]
DOCUMENT: dict[str, Any] = {"version": "1.1", "data": [{"title": "Köln", "paragraphs": PARAGRAPHS}]}
NAME = "koeln.de.json"
MISSING = object()


def write(tmp_path: Path, document: Any, name: str = NAME) -> Path:
    path = tmp_path / name
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def spoiled(change: Callable[[dict[str, Any]], object], at: int = 1) -> dict[str, Any]:
    """The document with question ``at`` of its first paragraph changed."""
    document = copy.deepcopy(DOCUMENT)
    change(document["data"][0]["paragraphs"][0]["qas"][at])
    return document


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets or removes ``key`` of a question, or of its answer if it is an answer's key."""

    def change(question: dict[str, Any]) -> None:
        item = question["answers"][0] if key in ("text", "answer_start") else question
        if value is MISSING:
            del item[key]
        else:
            item[key] = value

    return change


# -- good files -----------------------------------------------------------------------------------------------------


def test_a_good_file_gives_every_record_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path, DOCUMENT)
    records, problems, checksum = read_squad(path, "de")
    assert list(records) == ["q1", "q2", "q3", "q4"]
    assert problems == []
    assert checksum == hashlib.sha256(path.read_bytes()).hexdigest()
    assert records["q2"] == Record("q2", "de", records["q1"].paragraph, CONTEXT, "Wann vollendet?", "1880", 35)
    for record in records.values():
        assert record.context[record.answer_start : record.answer_start + len(record.answer)] == record.answer


def test_questions_on_one_context_share_a_paragraph_and_others_do_not(tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["data"].append(copy.deepcopy(document["data"][0]))
    for question in [q for p in document["data"][1]["paragraphs"] for q in p["qas"]]:
        question["id"] = "second " + question["id"]
    records, _, _ = read_squad(write(tmp_path, document), "de")
    paragraphs = [record.paragraph for record in records.values()]
    assert paragraphs[0] == paragraphs[1] == paragraphs[2]
    assert paragraphs[4] == paragraphs[5] == paragraphs[6]
    assert len(set(paragraphs)) == 4


def test_the_first_of_several_answers_is_the_gold_one(tmp_path: Path) -> None:
    document = spoiled(lambda q: q["answers"].append({"text": "wurde 1880", "answer_start": 29}))
    records, problems, _ = read_squad(write(tmp_path, document), "de")
    assert (records["q2"].answer, problems) == ("1880", [])


def test_blanks_around_an_answer_are_cut_and_its_start_moves_along(tmp_path: Path) -> None:
    def widen(question: dict[str, Any]) -> None:
        question["answers"] = [{"text": " 1880 ", "answer_start": 34}]
        question["question"] = "  Wann vollendet?\n"

    records, problems, _ = read_squad(write(tmp_path, spoiled(widen)), "de")
    assert problems == []
    assert (records["q2"].answer, records["q2"].answer_start) == ("1880", 35)
    assert records["q2"].question == "Wann vollendet?"


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(DOCUMENT, ensure_ascii=False).encode())
    records, problems, _ = read_squad(path, "de")
    assert list(records) == ["q1", "q2", "q3", "q4"]
    assert problems == []


def test_escaped_pairs_of_surrogates_are_characters_like_others(tmp_path: Path) -> None:
    document = spoiled(put("question", "Wann vollendet? 🏛"))
    path = write(tmp_path, document)
    assert b"\\ud83c\\udfdb" in path.read_bytes()
    records, problems, _ = read_squad(path, "de")
    assert (records["q2"].question, problems) == ("Wann vollendet? 🏛", [])


# -- bad records ----------------------------------------------------------------------------------------------------

BAD_RECORDS = {
    "no question": (put("question", MISSING), 'missing "question"', ""),
    "null question": (put("question", None), 'missing "question"', ""),
    "empty question": (put("question", ""), 'empty "question"', ""),
    "blank question": (put("question", " \t\n"), 'empty "question"', ""),
    "question a number": (put("question", 7), "wrong type", '"question" must be text, got int'),
    "question a list": (put("question", ["Wann?"]), "wrong type", '"question" must be text, got list'),
    "question a bool": (put("question", True), "wrong type", '"question" must be text, got bool'),
    "no answers": (put("answers", MISSING), 'missing "answers"', ""),
    "null answers": (put("answers", None), 'missing "answers"', ""),
    "empty answers": (put("answers", []), "no answer", "unanswerable"),
    "answers an object": (put("answers", {"text": "1880"}), "wrong type", "list of objects"),
    "answers of strings": (put("answers", ["1880"]), "wrong type", "list of objects"),
    "answers a string": (put("answers", "1880"), "wrong type", "list of objects"),
    "no text": (put("text", MISSING), 'missing "text"', ""),
    "empty text": (put("text", ""), 'empty "text"', ""),
    "blank text": (put("text", " "), 'empty "text"', ""),
    "text a number": (put("text", 1880), "wrong type", '"text" must be text, got int'),
    "no start": (put("answer_start", MISSING), 'missing "answer_start"', ""),
    "null start": (put("answer_start", None), 'missing "answer_start"', ""),
    "start a bool": (put("answer_start", True), "wrong type", "must be a whole number, got True"),
    "start false": (put("answer_start", False), "wrong type", "must be a whole number, got False"),
    "start a float": (put("answer_start", 35.0), "wrong type", "must be a whole number, got 35.0"),
    "start a string": (put("answer_start", "35"), "wrong type", "must be a whole number, got '35'"),
    "start off by one": (
        put("answer_start", 36),
        "answer is not at answer_start",
        "'1880' is not at 36; its text is at 35",
    ),
    "start negative": (put("answer_start", -38), "answer is not at answer_start", "its text is at 35"),
    "start past the end": (put("answer_start", 10**6), "answer is not at answer_start", "its text is at 35"),
    "answer not there": (put("text", "1881"), "answer is not at answer_start", "the context does not hold it"),
    "half a surrogate pair in the question": (put("question", "Wann \ud83c?"), "bad UTF-8", 'in "question"'),
    "half a surrogate pair in the answer": (put("text", "18\udc8080"), "bad UTF-8", 'in "text"'),
}


@pytest.mark.parametrize(("change", "reason", "detail"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_bad_record_is_reported_with_file_and_id_and_the_rest_goes_on(
    change: Callable[[dict[str, Any]], None], reason: str, detail: str, tmp_path: Path
) -> None:
    records, problems, _ = read_squad(write(tmp_path, spoiled(change)), "de")
    assert list(records) == ["q1", "q3", "q4"]
    (problem,) = problems
    assert (problem.file, problem.where, problem.reason) == (NAME, "id q2", reason)
    assert detail in problem.detail
    assert str(problem).startswith(f"{NAME}: id q2: {reason}")


BAD_IDS = {
    "missing": (MISSING, 'missing "id"', ""),
    "null": (None, 'missing "id"', ""),
    "a number": (17, "wrong type", '"id" must be text, got int'),
    "empty": ("", 'empty "id"', ""),
    "blank": ("  ", 'empty "id"', ""),
    "half a surrogate pair": ("q\ud800", "bad UTF-8", 'in "id"'),
}


@pytest.mark.parametrize(("value", "reason", "detail"), BAD_IDS.values(), ids=BAD_IDS)
def test_a_record_without_a_usable_id_is_named_by_its_place(
    value: Any, reason: str, detail: str, tmp_path: Path
) -> None:
    records, problems, _ = read_squad(write(tmp_path, spoiled(put("id", value))), "de")
    assert list(records) == ["q1", "q3", "q4"]
    assert [(p.file, p.reason) for p in problems] == [(NAME, reason)]
    assert problems[0].where == "article 1, paragraph 1, question 2"
    assert detail in problems[0].detail


@pytest.mark.parametrize("value", [None, "q2", 7, ["q2"]])
def test_a_question_that_is_no_object_is_named_by_its_place(value: Any, tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["data"][0]["paragraphs"][0]["qas"][1] = value
    records, problems, _ = read_squad(write(tmp_path, document), "de")
    assert list(records) == ["q1", "q3", "q4"]
    assert [(p.where, p.reason) for p in problems] == [("article 1, paragraph 1, question 2", "wrong type")]


@pytest.mark.parametrize("where", [0, 1], ids=["same paragraph", "other paragraph"])
def test_of_two_records_with_one_id_the_first_is_kept(where: int, tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENT)
    paragraph = document["data"][0]["paragraphs"][where]
    paragraph["qas"].append({**paragraph["qas"][0], "id": "q2", "question": "Noch einmal?"})
    records, problems, _ = read_squad(write(tmp_path, document), "de")
    assert list(records) == ["q1", "q2", "q3", "q4"]
    assert records["q2"].question == "Wann vollendet?"
    assert [(p.where, p.reason) for p in problems] == [("id q2", "duplicate id")]


PARAGRAPH = "article 1, paragraph 1"
BAD_PARAGRAPHS = {
    "no context": ({"qas": []}, PARAGRAPH, 'no text under "context"'),
    "context a list": ({"context": ["Köln"], "qas": []}, PARAGRAPH, 'no text under "context"'),
    "context null": ({"context": None, "qas": []}, PARAGRAPH, 'no text under "context"'),
    "not an object": ("Köln", PARAGRAPH, 'no text under "context"'),
    "no qas": ({"context": "Köln"}, PARAGRAPH, 'no list under "qas"'),
    "qas an object": ({"context": "Köln", "qas": {}}, PARAGRAPH, 'no list under "qas"'),
    "half a surrogate pair": ({"context": "K\udcf6ln", "qas": []}, PARAGRAPH, "bad UTF-8"),
}


@pytest.mark.parametrize(("item", "where", "reason"), BAD_PARAGRAPHS.values(), ids=BAD_PARAGRAPHS)
def test_a_bad_paragraph_is_reported_by_place_and_the_next_one_read(
    item: Any, where: str, reason: str, tmp_path: Path
) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["data"][0]["paragraphs"][0] = item
    records, problems, _ = read_squad(write(tmp_path, document), "de")
    assert list(records) == ["q4"]
    assert [(p.file, p.where, p.reason) for p in problems] == [(NAME, where, reason)]


@pytest.mark.parametrize("article", ["Köln", None, {}, {"title": "T"}, {"paragraphs": {}}, {"paragraphs": None}])
def test_a_bad_article_is_reported_by_place_and_the_next_one_read(article: Any, tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["data"].insert(0, article)
    records, problems, _ = read_squad(write(tmp_path, document), "de")
    assert list(records) == ["q1", "q2", "q3", "q4"]
    assert [(p.file, p.where, p.reason) for p in problems] == [(NAME, "article 1", 'no list under "paragraphs"')]


def test_a_bad_record_moves_no_other_to_another_paragraph(tmp_path: Path) -> None:
    whole, _, _ = read_squad(write(tmp_path, DOCUMENT, "whole.de.json"), "de")
    document = spoiled(put("question", ""), at=0)
    document["data"][0]["paragraphs"].insert(0, None)
    del document["data"][0]["paragraphs"][0]
    document["data"][0]["paragraphs"][0]["qas"].insert(0, None)
    records, _, _ = read_squad(write(tmp_path, document), "de")
    assert {id_: record.paragraph for id_, record in records.items()} == {
        id_: whole[id_].paragraph for id_ in ("q2", "q3", "q4")
    }


@pytest.mark.parametrize("broken", [b"\xff\xfe", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xc0\xaf"])
@pytest.mark.parametrize(("field", "reason"), [("question", 'in "question"'), ("text", 'in "text"')])
def test_bytes_that_are_not_utf8_spoil_their_own_record_alone(
    broken: bytes, field: str, reason: str, tmp_path: Path
) -> None:
    raw = json.dumps(spoiled(put(field, "BROKEN 18")), ensure_ascii=False).encode()
    path = tmp_path / NAME
    path.write_bytes(raw.replace(b"BROKEN", b"a" + broken + b"b"))
    records, problems, checksum = read_squad(path, "de")
    assert list(records) == ["q1", "q3", "q4"]
    assert records["q1"].context == CONTEXT
    assert problems == [Problem(NAME, "id q2", "bad UTF-8", reason)]
    assert checksum == hashlib.sha256(path.read_bytes()).hexdigest()


def test_bytes_that_are_not_utf8_in_a_context_spoil_its_paragraph_alone(tmp_path: Path) -> None:
    raw = json.dumps(DOCUMENT, ensure_ascii=False).encode()
    path = tmp_path / NAME
    path.write_bytes(raw.replace("Köln liegt".encode(), "Köln liegt".encode("latin-1")))
    records, problems, _ = read_squad(path, "de")
    assert list(records) == ["q4"]
    assert problems == [Problem(NAME, PARAGRAPH, "bad UTF-8", 'in "context"')]


def test_problems_can_be_printed_whatever_the_bytes_were(tmp_path: Path) -> None:
    path = tmp_path / NAME
    changes = (put("id", "BROKEN"), put("answer_start", "BROKEN"), put("question", "BROKEN"))
    for at, change in enumerate(changes):
        raw = json.dumps(spoiled(change, at), ensure_ascii=False).encode()
        path.write_bytes(raw.replace(b"BROKEN", b"\xff"))
        _, problems, _ = read_squad(path, "de")
        assert len(problems) == 1
        str(problems[0]).encode("utf-8")


def test_every_bad_record_is_counted(tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENT)
    first = document["data"][0]["paragraphs"][0]["qas"]
    first[0]["question"] = ""
    first[1]["answers"] = []
    first[2]["answers"][0]["answer_start"] = 3
    first += [{**first[1], "id": "q5"}, None]
    records, problems, _ = read_squad(write(tmp_path, document), "de")
    assert list(records) == ["q4"]
    assert [p.reason for p in problems] == [
        'empty "question"', "no answer", "answer is not at answer_start", "no answer", "wrong type",
    ]  # fmt: skip


def test_strict_makes_the_first_bad_record_fatal_and_names_it(tmp_path: Path) -> None:
    document = spoiled(put("answer_start", 36))
    document["data"][0]["paragraphs"][0]["qas"][2]["question"] = ""
    path = write(tmp_path, document)
    assert len(load_data(str(path)).problems) == 2
    with pytest.raises(DataError, match=rf"{NAME}: id q2: answer is not at answer_start .*its text is at 35.*1 more"):
        load_data(str(path), strict=True)


def test_strict_passes_a_good_file(tmp_path: Path) -> None:
    assert load_data(str(write(tmp_path, DOCUMENT)), strict=True).ids == ("q1", "q2", "q3", "q4")


# -- files that are nothing at all ----------------------------------------------------------------------------------


def test_a_missing_file_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.de\.json.*No such file"):
        read_squad(tmp_path / "none.de.json", "de")


def test_a_folder_in_place_of_a_file_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*directory"):
        read_squad(tmp_path, "de")


@pytest.mark.parametrize("content", [b"", b"  \n"])
def test_an_empty_file_is_a_data_error_that_says_so(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{NAME} is not valid JSON: the file is empty"):
        read_squad(path, "de")


def test_broken_json_is_a_data_error_with_file_and_position(tmp_path: Path) -> None:
    text = json.dumps(DOCUMENT, indent=1).replace('"title"', "'title'")
    line = next(at for at, content in enumerate(text.splitlines(), start=1) if "'title'" in content)
    column = text.splitlines()[line - 1].index("'") + 1
    with pytest.raises(DataError, match=rf"{NAME} is not valid JSON: .* at line {line}, column {column}") as caught:
        read_squad(write(tmp_path, text), "de")
    assert "ends early" not in str(caught.value)


# where a broken download may stop, as the text after which the file ends
CUTS = {
    "after an opening bracket": '"qas": [',
    "after a comma": '"Wo liegt Köln?",',
    "after a colon": '"context":',
    "after a number": '"answer_start": 11',
    "after a closed string": '"Wo liegt Köln?"',
    "inside a key": '"answer_st',
    "inside a context": "Der Dom wurde",
    "after a backslash": "\\",
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("after", CUTS.values(), ids=CUTS)
def test_a_file_that_ends_early_is_a_data_error_that_says_so(after: str, mark: bytes, tmp_path: Path) -> None:
    text = json.dumps(spoiled(put("question", 'Wann "vollendet"?')), ensure_ascii=False)
    path = tmp_path / NAME
    path.write_bytes(mark + text[: text.index(after) + len(after)].encode())
    with pytest.raises(DataError, match=rf"{NAME} is not valid JSON: .* at line 1, column \d+") as caught:
        read_squad(path, "de")
    assert "the file ends early" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "3", '"data"', "{}", '{"data": null}', '{"data": {}}', '{"data": "x"}', '{"rows": []}', "NaN"],
)
def test_json_that_is_not_squad_is_a_data_error_that_says_so(content: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{NAME} is not in SQuAD v1\.1 format: expected"):
        read_squad(write(tmp_path, content), "de")


def test_json_nested_beyond_reason_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{NAME} is not in SQuAD v1\.1 format"):
        read_squad(write(tmp_path, "[" * 200_000), "de")


def test_a_number_of_thousands_of_digits_is_a_data_error(tmp_path: Path) -> None:
    text = json.dumps(DOCUMENT).replace('"answer_start": 35', '"answer_start": ' + "1" * 5000)
    with pytest.raises(DataError, match=NAME):
        read_squad(write(tmp_path, text), "de")


def test_another_encoding_is_a_data_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(json.dumps(DOCUMENT).encode("utf-16"))
    with pytest.raises(DataError, match=rf"{NAME} is UTF-16: save it as UTF-8"):
        read_squad(path, "de")


@pytest.mark.parametrize("content", ['{"data": []}', '{"data": [{"paragraphs": []}]}'])
def test_squad_without_a_question_is_a_data_error_when_loaded(content: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    assert read_squad(path, "de")[:2] == ({}, [])
    with pytest.raises(DataError, match=rf"{NAME} holds no usable question"):
        load_data(str(path))


def test_a_file_of_bad_records_alone_is_a_data_error_with_the_first_of_them(tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENT)
    for paragraph in document["data"][0]["paragraphs"]:
        for question in paragraph["qas"]:
            question["answers"] = []
    path = write(tmp_path, document)
    with pytest.raises(
        DataError, match=rf"{NAME} holds no usable question: 4 left out, the first: {NAME}: id q1: no answer"
    ):
        load_data(str(path))
