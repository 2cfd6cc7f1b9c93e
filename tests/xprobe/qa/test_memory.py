"""Records in memory: the same as from files, whatever holds them; anything else gets one clear line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from xprobe.errors import DataError, UsageError
from xprobe.qa.parallel import load_data
from xprobe.qa.records import Dataset

TOWER, BOATS = "The tower was built in 1874.", "Ada sold 40 boats."
TURM, BOOTE = "Der Turm wurde 1874 gebaut.", "Ada verkaufte 40 Boote."


def flat(id_: str, context: str, question: str, *answers: str) -> dict[str, Any]:
    starts = [context.index(answer) for answer in answers]
    return {"id": id_, "context": context, "question": question,
            "answers": {"text": list(answers), "answer_start": starts}}  # fmt: skip


EN = [
    flat("q1", TOWER, "When?", "1874", "in 1874"),
    flat("q2", BOATS, "Who?", "Ada"),
    flat("q3", TOWER, "What?", "tower"),
]
DE = [flat("q1", TURM, "Wann?", "1874"), flat("q2", BOOTE, "Wer?", "Ada"), flat("q3", TURM, "Was?", "Turm")]
BY_LANGUAGE = {"de": DE, "en": EN}
ROWS = [{**record, "language": language} for pair in zip(EN, DE, strict=True)
        for language, record in zip(("en", "de"), pair, strict=True)]  # fmt: skip


class Held:
    """Stands for a data set of another package: all that is known of it is ``to_pandas``."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    def to_pandas(self) -> pd.DataFrame:
        frame = pd.DataFrame(self.rows)
        frame["answers"] = [
            {"text": np.array(a["text"], object), "answer_start": np.array(a["answer_start"], np.int32)}
            for a in frame["answers"]
        ]
        return frame


def columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: [row[key] for row in rows] for key in rows[0]}


def with_lang(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"lang" if key == "language" else key: value for key, value in row.items()} for row in rows]


HELD: dict[str, Any] = {
    "a dictionary of lists": BY_LANGUAGE,
    "a dictionary of tuples": {language: tuple(rows) for language, rows in BY_LANGUAGE.items()},
    "a dictionary of data frames": {language: pd.DataFrame(rows) for language, rows in BY_LANGUAGE.items()},
    "a dictionary of data sets": {language: Held(rows) for language, rows in BY_LANGUAGE.items()},
    "a dictionary of columns": {language: columns(rows) for language, rows in BY_LANGUAGE.items()},
    "a list with languages": ROWS,
    "a list with lang": with_lang(ROWS),
    "a data frame with languages": pd.DataFrame(ROWS),
    "a data frame with categories": pd.DataFrame(ROWS).astype({"language": "category", "id": "string"}),
    "a data frame with another index": pd.DataFrame(ROWS, index=list("uvwxyz")),
    "a data set with languages": Held(ROWS),
    "an Arrow table": pa.Table.from_pylist(ROWS),
    "columns with languages": columns(ROWS),
    "columns of arrays": {key: pd.Series(values) for key, values in columns(ROWS).items()},
    "records with numpy inside": [
        {**row, "answers": [{"text": np.str_(text), "answer_start": np.int64(start)} for text, start in zip(
            *row["answers"].values(), strict=True)]} for row in ROWS],
    "records with more columns": [{**row, "title": "T", "score": 0.5, "anything": object()} for row in ROWS],
}  # fmt: skip


@pytest.fixture
def from_files(tmp_path: Path) -> Dataset:
    for language, records in BY_LANGUAGE.items():
        (tmp_path / f"small.{language}.json").write_text(json.dumps(records), encoding="utf-8")
    return load_data(str(tmp_path))


@pytest.mark.parametrize("data", HELD.values(), ids=HELD)
def test_records_in_memory_are_those_of_files(data: Any, from_files: Dataset) -> None:
    found = load_data(data, strict=True)
    assert found.records == from_files.records
    assert found.languages == ("en", "de")
    assert list(found.records["de"]) == ["q1", "q2", "q3"]
    assert (found.name, found.files, found.problems) == ("records in memory", (), ())
    assert found.records["en"]["q1"].answers == ("1874", "in 1874")
    assert len(found.examples(["en-x"])) == 6


def test_an_article_in_memory_is_read_as_in_a_file() -> None:
    qas = [{key: record[key] for key in ("id", "question", "answers")} for record in (EN[0], EN[2])]
    article = {"title": "T", "paragraphs": [{"context": TOWER, "qas": qas}]}
    for records in ([article], {"version": "1.1", "data": [article]}):
        assert load_data({"en": records}, strict=True).ids == ("q1", "q3")


# -- fingerprint ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_records_and_not_what_holds_them(from_files: Dataset) -> None:
    assert from_files.fingerprint == load_data(BY_LANGUAGE).fingerprint
    first = load_data(BY_LANGUAGE).fingerprint
    for name, data in HELD.items():
        assert load_data(data).fingerprint == first, name
    assert len(first) == 64
    other = [{**record, "question": record["question"] + "?"} for record in DE]
    assert load_data({"de": other, "en": EN}).fingerprint != first
    assert load_data({"de": DE[::-1], "en": EN}).fingerprint != first
    assert load_data(BY_LANGUAGE, ["de"]).fingerprint != first
    assert load_data(BY_LANGUAGE, ["de"]).fingerprint == load_data({"de": DE}).fingerprint


def test_the_checksum_is_that_of_sorted_json() -> None:
    text = (
        '[{"answers":{"answer_start":[0],"text":["Ada"]},"context":"Ada sold 40 boats.","id":"q2","question":"Who?"}]'
    )
    own = hashlib.sha256(text.encode()).hexdigest()
    assert load_data({"en": EN[1:2]}).source_sha256 == hashlib.sha256(f"en {own}\n".encode()).hexdigest()


# -- languages ------------------------------------------------------------------------------------------------------


def test_only_the_languages_asked_for_and_needed_are_kept() -> None:
    assert load_data(ROWS, ["de"]).languages == ("de",)
    assert load_data(ROWS, ["de"], needed=["en"]).languages == ("en", "de")
    with pytest.raises(UsageError, match=r"language 'fr' is not in records in memory; available: en, de"):
        load_data(ROWS, ["fr"])


def test_a_dataset_is_taken_as_it_is(from_files: Dataset) -> None:
    assert load_data(from_files) is from_files
    assert load_data(from_files, ["de"], needed=["en"], strict=True) is from_files
    with pytest.raises(UsageError, match=r"language 'fr' is not in .*; available: en, de"):
        load_data(from_files, ["fr"])
    with pytest.raises(DataError, match="id q3: id is missing in a parallel file"):
        load_data(load_data({"en": EN, "de": DE[:2]}), strict=True)


def test_a_path_is_taken_like_its_name(tmp_path: Path, from_files: Dataset) -> None:
    assert load_data(tmp_path).fingerprint == from_files.fingerprint


# -- bad records ----------------------------------------------------------------------------------------------------


def test_a_bad_record_is_reported_by_id_or_place_and_the_rest_goes_on() -> None:
    nameless = {key: value for key, value in ROWS[2].items() if key != "id"}
    moved = {**ROWS[4], "answers": {"text": ["tower"], "answer_start": [np.int64(5)]}}
    found = load_data([*ROWS[:2], nameless, ROWS[3], moved, ROWS[5], None])
    assert [str(problem) for problem in found.problems] == [
        "data: record 7: wrong type (a record must be a dictionary, got NoneType)",
        'data: record 3: missing "id"',
        "data: id q3: answer is not at answer_start ('tower' is not at 5; its text is at 4)",
        "data['en']: id q2: id is missing in a parallel file",
    ]
    assert (list(found.records["en"]), list(found.records["de"])) == (["q1"], ["q1", "q2", "q3"])
    with pytest.raises(DataError, match=r"record 7: wrong type .*3 more"):
        load_data([*ROWS[:2], nameless, ROWS[3], moved, ROWS[5], None], strict=True)


def test_problems_of_a_dictionary_name_the_language() -> None:
    found = load_data({"en": EN, "de": [DE[0], {**DE[1], "question": " "}]})
    assert [str(problem) for problem in found.problems] == [
        "data['de']: id q2: empty \"question\"",
        "data['de']: id q3: id is missing in a parallel file",
    ]


@pytest.mark.parametrize("gap", [None, np.nan, float("nan"), pd.NA, pd.NaT])
@pytest.mark.parametrize("key", ["id", "context", "question", "answers", "language"])
def test_a_gap_is_a_missing_value(key: str, gap: Any) -> None:
    rows = [*ROWS[:5], {**ROWS[5], key: gap}]
    for data in (rows, pd.DataFrame(rows)):
        found = load_data(data)
        assert f'missing "{key}"' in {problem.reason for problem in found.problems}
        assert list(found.records["de"]) == ["q1", "q2"]


@pytest.mark.parametrize(
    ("language", "reason"),
    [("German", 'bad "language"'), ("all", 'bad "language"'), (7, 'bad "language"'), ("", 'bad "language"'),
     ("../x", 'bad "language"'), ("de\n", 'bad "language"'), (None, 'missing "language"')],
)  # fmt: skip
def test_a_record_in_no_language_is_left_out(language: Any, reason: str) -> None:
    found = load_data([*ROWS, {**DE[0], "id": "q4", "language": language}])
    assert [(p.file, p.where, p.reason) for p in found.problems] == [("data", "id q4", reason)]
    assert set(found.languages) == {"en", "de"}


def test_an_answer_start_that_a_data_frame_made_a_float_is_refused_as_in_a_file() -> None:
    row = {**EN[0], "answers": {"text": ["1874"], "answer_start": np.array([23.0])}}
    with pytest.raises(DataError, match=r'"answer_start" must be a whole number, got 23\.0'):
        load_data({"en": [row]})


# -- what is no data ------------------------------------------------------------------------------------------------


class Broken:
    def to_pandas(self) -> pd.DataFrame:
        raise ValueError("out of\norder")


class Odd:
    def to_pandas(self) -> list[int]:
        return [1]


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)

NO_DATA: dict[str, tuple[Any, str]] = {
    "a number": (7, "data must be the name of a set, .* or a dictionary .*; got int 7"),
    "nothing": (None, "data must be .*; got NoneType None"),
    "bytes": (b"builtin", "data must be .*; got bytes b'builtin'"),
    "a set": ({1}, "data must be .*; got a set"),
    "a generator": ((row for row in ROWS), "data must be .*; got a generator"),
    "a function": (len, "data must be .*; got a builtin_function_or_method"),
    "a series": (pd.Series(["a"]), "data must be .*; got a Series"),
    "an array": (np.zeros(3), "data must be .*; got a ndarray"),
    "an empty list": ([], "data is empty"),
    "an empty dictionary": ({}, "data is empty"),
    "an empty data frame": (pd.DataFrame(), "data is empty"),
    "a list of text": (["a", "b"], "data must hold dictionaries, .* first entry is str 'a'"),
    "a list of lists": ([[1]], "data must hold dictionaries, .* first entry is a list"),
    "a list in itself": (CIRCLE, "data must hold dictionaries"),
    "records without languages": (EN, 'data holds no record with a language: data: id q1: missing "language"'),
    "a data frame with other columns": (
        pd.DataFrame(ROWS).rename(columns={"context": "passage"}).drop(columns="id"),
        "data has no column 'id' and no column 'context'; it has 'passage', 'question', 'answers', 'language': rename",
    ),
    "a data frame without languages": (pd.DataFrame(EN), 'no record with a language: .*missing "language"'),
    "a dictionary with text": ({"en": "EN"}, r"data\['en'\] must be a list of records or a data frame; got str 'EN'"),
    "a dictionary with a number": ({"en": EN, "de": 3}, r"data\['de'\] must be .*; got int 3"),
    "a dictionary with nothing": ({"en": None}, r"data\['en'\] must be .*; got NoneType None"),
    "a dictionary with a list of text": ({"en": ["a"]}, r"data\['en'\] must hold dictionaries"),
    "a dictionary of splits": ({"train": EN}, "its keys must be language codes .*; got 'train'"),
    "a dictionary of numbers": ({1: EN}, "its keys must be language codes .*; got 1"),
    "all as a language": ({"all": EN}, "its keys must be language codes .*; got 'all'"),
    "one record": (ROWS[0], "data is a single record, with the keys 'id', 'context', 'question', .*: give a list"),
    "uneven columns": ({**columns(ROWS), "id": ["q1"]}, "data cannot be read as a table: .*differ in length"),
    "two columns of one name": (pd.DataFrame([["a", "b"]], columns=["id", "id"]), "two columns named 'id'"),
    "a broken to_pandas": (Broken(), r"data is a Broken, and its to_pandas\(\) failed: out of order"),
    "an odd to_pandas": (Odd(), "data must hold dictionaries"),
}


@pytest.mark.parametrize(("data", "message"), NO_DATA.values(), ids=NO_DATA)
def test_what_is_no_data_is_refused_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_data(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [{"en": EN, "de": []}, {"en": EN, "de": pd.DataFrame()}])
def test_a_language_without_records_is_refused(data: Any) -> None:
    with pytest.raises(DataError, match=r"data\['de'\] holds no usable question$"):
        load_data(data)


def test_values_that_hold_themselves_are_bad_records() -> None:
    answers: dict[str, Any] = {}
    answers["text"] = [answers]
    answers["answer_start"] = [3]
    with pytest.raises(DataError, match="holds no usable question: 1 left out"):
        load_data({"en": [{**EN[0], "answers": answers}]})
