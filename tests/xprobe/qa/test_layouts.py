"""The same questions in every layout give the same records; what is damaged or something else gets one clear line."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xprobe.errors import DataError, UsageError
from xprobe.qa.layouts import read_file
from xprobe.qa.parallel import find_files, load_data
from xprobe.qa.records import Record

DOM, BONN = "Köln liegt am Rhein. Der Dom wurde 1880 vollendet.", "Bonn ist kleiner.\u2028Es hat keinen Dom."
# (id, context, question, answer, start)
ROWS = [
    ("q1", DOM, "Wo liegt Köln?", "am Rhein", 11),
    ("q2", BONN, "Was ist Bonn?", "kleiner", 9),
    ("q3", DOM, "Wann vollendet?", "1880", 35),
]


def flat(id_: str, context: str, question: str, answer: str, start: int) -> dict[str, Any]:
    answers = {"text": [answer], "answer_start": [start]}
    return {"id": id_, "title": "T", "context": context, "question": question, "answers": answers}


def with_list(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its answers as SQuAD has them."""
    parallel = record["answers"]
    pairs = zip(parallel["text"], parallel["answer_start"], strict=True)
    return {**record, "answers": [{"text": text, "answer_start": start} for text, start in pairs]}


def article(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One article with a paragraph for each context, its questions in the order of the records."""
    contexts = dict.fromkeys(record["context"] for record in records)
    paragraphs = [{"context": c, "qas": [record for record in records if record["context"] == c]} for c in contexts]
    return {"title": "T", "paragraphs": paragraphs}


FLAT = [flat(*row) for row in ROWS]
NESTED = {"version": "1.1", "data": [article([with_list(record) for record in FLAT])]}
TABLE = {key: [record[key] for record in FLAT] for key in FLAT[0]}
IN_TWO = [{k: v for k, v in r.items() if k != "answers"} | {f"answers.{k}": v for k, v in r["answers"].items()}
          for r in FLAT]  # fmt: skip


def lines(values: list[Any]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


DOCUMENTS = {
    "SQuAD": json.dumps(NESTED),
    "SQuAD with answers in two lists": json.dumps({"data": [article(FLAT)]}),
    "a list of articles": json.dumps([article(FLAT)]),
    "data with flat records": json.dumps({"version": 1, "data": FLAT}, indent=1, ensure_ascii=False),
    "a list of flat records": json.dumps(FLAT),
    "flat records with lists of answers": json.dumps([with_list(record) for record in FLAT]),
    "flat records with answers in two columns": json.dumps(IN_TWO),
    "columns": json.dumps(TABLE),
    "columns of answers": json.dumps({key: [record[key] for record in IN_TWO] for key in IN_TWO[0]}),
    "a data frame's columns": pd.DataFrame(FLAT).to_json(),
    "a data frame's table": pd.DataFrame(FLAT).to_json(orient="table", index=False),
    "lines": lines(FLAT),
    "lines with blank ones and returns": "\r\n" + lines(FLAT).replace("\n", "\r\n \r\n"),
    "lines without the last return": lines(FLAT).rstrip("\n"),
    "an article on a line": lines([article(FLAT)]),
    "two articles on lines": lines([article([FLAT[0], FLAT[2]]), article([FLAT[1]])]),
}
NAMES = ["dom.de.json", "dom.de.jsonl", "dom.de.json.gz", "dom.de.jsonl.gz"]


def write(folder: Path, content: str | bytes, name: str = "dom.de.json") -> Path:
    path = folder / name
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", DOCUMENTS.values(), ids=DOCUMENTS)
def test_every_layout_gives_the_same_records(content: str, name: str, tmp_path: Path) -> None:
    path = write(tmp_path, content, name)
    data = load_data(str(path), strict=True)
    assert data.languages == ("de",)
    assert set(data.ids) == {"q1", "q2", "q3"}
    records = data.records["de"]
    for id_, context, question, answer, start in ROWS:
        assert records[id_] == Record(id_, "de", records[id_].paragraph, context, question, answer, start)
    assert records["q1"].paragraph == records["q3"].paragraph != records["q2"].paragraph
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.source_sha256 == hashlib.sha256(f"de {checksum}\n".encode()).hexdigest()


def test_the_fingerprint_is_of_the_records_and_not_of_the_layout(tmp_path: Path) -> None:
    in_order = [text for name, text in DOCUMENTS.items() if "SQuAD" not in name and "article" not in name]
    found = {load_data(str(write(tmp_path, text))).fingerprint for text in in_order}
    assert len(found) == 1
    spoiled = DOCUMENTS["lines"].replace("q3", "q4")
    assert load_data(str(write(tmp_path, spoiled))).fingerprint not in found
    assert load_data({"de": FLAT}).fingerprint in found


def test_flat_records_keep_their_order(tmp_path: Path) -> None:
    assert load_data(str(write(tmp_path, lines(FLAT)))).ids == ("q1", "q2", "q3")


def test_one_flat_record_is_a_document_and_a_line(tmp_path: Path) -> None:
    for name in NAMES:
        assert load_data(str(write(tmp_path, json.dumps(FLAT[0]), name)), strict=True).ids == ("q1",)
        assert load_data(str(write(tmp_path, json.dumps(FLAT[0], indent=2), name)), strict=True).ids == ("q1",)


@given(
    st.lists(st.tuples(st.text(min_size=1).filter(str.strip), st.sampled_from("ABC")), min_size=1, max_size=8),
    st.sampled_from(["list", "lines", "table"]),
)
def test_any_text_survives_and_equal_contexts_are_one_paragraph(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[str, str]], layout: str
) -> None:
    rows = [flat(f"q{i}", f"{context} {text} {text}", text, text, 2) for i, (text, context) in enumerate(items)]
    table = {key: [row[key] for row in rows] for key in rows[0]}
    content = {"list": json.dumps(rows), "lines": lines(rows), "table": json.dumps(table)}[layout]
    records = load_data(str(write(tmp_path_factory.mktemp("any"), content)), strict=True).records["de"]
    for row in rows:
        record = records[row["id"]]
        text = row["question"].strip()
        assert (record.context, record.question, record.answer) == (row["context"], text, text)
        assert record.context[record.answer_start :].startswith(text)
    pairs = {(record.paragraph, record.context) for record in records.values()}
    assert len({p for p, _ in pairs}) == len({c for _, c in pairs}) == len(pairs)


def test_languages_of_different_layouts_line_up(tmp_path: Path) -> None:
    write(tmp_path, json.dumps(NESTED), "dom.en.json")
    write(tmp_path, lines(FLAT[::-1]), "dom.de.jsonl")
    write(tmp_path, json.dumps(TABLE), "dom.fr.json.gz")
    data = load_data(str(tmp_path), strict=True)
    assert [Path(file).name for file in data.files] == ["dom.en.json", "dom.de.jsonl", "dom.fr.json.gz"]
    for id_ in data.ids:
        assert len({data.records[language][id_].paragraph for language in data.languages}) == 1


def test_contexts_that_differ_in_one_language_alone_keep_their_own_paragraphs(tmp_path: Path) -> None:
    """A blank more in one German context: a shard holds one context, so the two cannot share a key."""
    write(tmp_path, lines(FLAT), "dom.en.jsonl")
    write(tmp_path, lines([*FLAT[:2], {**FLAT[2], "context": DOM + " "}]), "dom.de.jsonl")
    data = load_data(str(tmp_path), strict=True)
    english, german = data.records["en"], data.records["de"]
    assert english["q1"].paragraph == english["q3"].paragraph == german["q1"].paragraph
    assert len({record.paragraph for record in german.values()}) == 3
    contexts: dict[str, set[str]] = {}
    for example in data.examples(["en-x", "x-x"]):
        contexts.setdefault(example.group, set()).add(example.context)
    assert all(len(found) == 1 for found in contexts.values())


# -- bad records ----------------------------------------------------------------------------------------------------

BAD = {
    "answers of unequal number": ({"text": ["1880", "x"], "answer_start": [35]}, "answers of unequal number"),
    "no starts": ({"text": ["1880"]}, 'missing "answer_start"'),
    "no texts": ({"answer_start": [35]}, "wrong type"),
    "no answer": ({"text": [], "answer_start": []}, "no answer"),
    "a moved answer": ({"text": ["1880"], "answer_start": [36]}, "answer is not at answer_start"),
    "a start that is text": ({"text": ["1880"], "answer_start": ["35"]}, "wrong type"),
}


@pytest.mark.parametrize(("answers", "reason"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("layout", [json.dumps, lines], ids=["list", "lines"])
def test_a_bad_flat_record_is_reported_and_the_rest_goes_on(
    layout: Callable[[Any], str], answers: Any, reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path, layout([FLAT[0], FLAT[1], {**FLAT[2], "answers": answers}]))
    found = read_file(path, "de")
    assert list(found.records) == ["q1", "q2"]
    (problem,) = found.problems
    where = "line 3, id q3" if layout is lines else "id q3"
    assert (problem.file, problem.where, problem.reason, problem.id) == ("dom.de.json", where, reason, "q3")


def test_a_flat_record_without_id_or_context_is_named_by_its_place(tmp_path: Path) -> None:
    nameless, bare = ({k: v for k, v in FLAT[1].items() if k != key} for key in ("id", "context"))
    found = read_file(write(tmp_path, json.dumps([FLAT[0], nameless, bare, 7, FLAT[0]])), "de")
    assert [str(problem) for problem in found.problems] == [
        'dom.de.json: record 2: missing "id"',
        'dom.de.json: id q2: missing "context"',
        "dom.de.json: record 4: wrong type (a record must be an object, got int)",
        "dom.de.json: id q1: duplicate id (the first one is kept)",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_line_is_reported_by_number_and_the_rest_goes_on(name: str, tmp_path: Path) -> None:
    content = lines(FLAT[:1]) + '{"id": "x",\n[1]\n\n' + lines(FLAT[1:]).rstrip()[:-9]
    data = load_data(str(write(tmp_path, content, name)))
    assert data.ids == ("q1", "q2")
    assert [(p.file, p.where, p.reason) for p in data.problems] == [
        (name, "line 2", "not valid JSON"),
        (name, "line 3", "wrong type"),
        (name, "line 6", "not valid JSON"),
    ]
    assert "the line ends early" in data.problems[2].detail


def test_bytes_that_are_not_utf8_spoil_their_own_line_alone(tmp_path: Path) -> None:
    raw = lines(FLAT).encode().replace(b"Wann", b"W\xe4nn")
    found = read_file(write(tmp_path, raw, "dom.de.jsonl"), "de")
    assert list(found.records) == ["q1", "q2"]
    assert [(p.where, p.reason, p.detail) for p in found.problems] == [("line 3, id q3", "bad UTF-8", 'in "question"')]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"n": ' + "1" * 5000 + "}"], ids=["deep", "a long number"])
def test_a_line_that_python_cannot_read_is_reported_as_others(line: str, tmp_path: Path) -> None:
    found = read_file(write(tmp_path, lines(FLAT) + line + "\n", "dom.de.jsonl"), "de")
    assert len(found.records) == 3
    assert [(p.where, p.reason) for p in found.problems] == [("line 4", "not valid JSON")]


def test_a_record_left_out_is_not_reported_as_missing_from_its_file_as_well(tmp_path: Path) -> None:
    write(tmp_path, lines(FLAT), "dom.en.jsonl")
    write(tmp_path, lines([*FLAT[:2], {**FLAT[2], "question": ""}]), "dom.de.jsonl")
    assert [str(p) for p in load_data(str(tmp_path)).problems] == ['dom.de.jsonl: line 3, id q3: empty "question"']


@pytest.mark.parametrize("answers", [[], [{"text": "1880", "answer_start": 35}]])
def test_a_question_marked_as_impossible_has_no_answer(answers: list[Any], tmp_path: Path) -> None:
    records = [*FLAT[:2], {**FLAT[2], "is_impossible": True, "answers": answers}]
    found = read_file(write(tmp_path, json.dumps({"data": [article(records)]})), "de")
    assert [(p.where, p.reason) for p in found.problems] == [("id q3", "no answer")]


# -- files that are nothing at all ----------------------------------------------------------------------------------

SQUAD = json.dumps(NESTED).encode()
OTHER = "is not in SQuAD v1.1 format: expected"
NOTHING: dict[str, tuple[str, bytes, str]] = {
    "an empty file": ("x.de.json", b"", "the file is empty"),
    "an empty file of lines": ("x.de.jsonl", b" \n\n", "the file is empty"),
    "an empty gzip file": ("x.de.json.gz", b"", "is empty"),
    "nothing inside gzip": ("x.de.json.gz", gzip.compress(b""), "the file is empty"),
    "no gzip file": ("x.de.json.gz", SQUAD, "is not a gzip file, although its name says so"),
    "a cut gzip file": ("x.de.json.gz", gzip.compress(SQUAD)[:-20], "the gzip file ends early"),
    "a gzip header alone": ("x.de.jsonl.gz", gzip.compress(SQUAD)[:5], "the gzip file ends early"),
    "a damaged gzip file": ("x.de.json.gz", gzip.compress(SQUAD)[:-8] + b"\0" * 8, "the gzip file is damaged"),
    "a gzip file with a bad block": ("x.de.json.gz", gzip.compress(SQUAD)[:10] + b"\xff" * 50, "is damaged"),
    "UTF-16": ("x.de.json", json.dumps(NESTED).encode("utf-16"), "is UTF-16: save it as UTF-8"),
    "UTF-16 without a mark": ("x.de.jsonl", lines(FLAT).encode("utf-16-le"), "is UTF-16: save it as UTF-8"),
    "UTF-16 inside gzip": ("x.de.json.gz", gzip.compress(SQUAD.decode().encode("utf-16-be")), "is UTF-16"),
    "UTF-32": ("x.de.json", json.dumps(NESTED).encode("utf-32"), "is UTF-32: save it as UTF-8"),
    "no JSON": ("x.de.json", b"id,context\n1,2\n", "is not valid JSON"),
    "lines of no JSON": ("x.de.jsonl", b"id,context\n1,2\n", "2 left out, the first: x.de.jsonl: line 1"),
    "other objects": ("x.de.json", b'[{"a": 1}]', OTHER),
    "other lines": ("x.de.jsonl", b'{"a": 1}\n{"a": 2}\n', OTHER),
    "lines of numbers": ("x.de.jsonl", b"1\n2\n", OTHER),
    "a list of text": ("x.de.json", b'["a"]', OTHER),
    "one other object": ("x.de.jsonl", b'{"a": 1}', OTHER),
    "uneven columns": ("x.de.json", json.dumps({**TABLE, "id": ["q1"]}).encode(), "differ in length (id 1, context 3"),
    "columns of other rows": (
        "x.de.json",
        b'{"context": {"0": "a"}, "question": {"1": "b"}}',
        "columns differ in the names of their rows",
    ),
    "an article cut in lines": ("x.de.json", lines(FLAT).encode()[:50], "the file ends early"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "raw", "message"), NOTHING.values(), ids=NOTHING)
def test_a_file_of_something_else_gets_one_clear_line(name: str, raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        load_data(str(path))
    text = str(caught.value)
    assert message in text
    assert str(path) in text
    assert "\n" not in text


def test_a_gzip_file_without_the_ending_is_unpacked_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.de.json"
    path.write_bytes(gzip.compress(SQUAD))
    assert len(load_data(str(path)).ids) == 3


# -- which files ----------------------------------------------------------------------------------------------------


def test_a_language_in_two_files_is_refused_and_both_are_named(tmp_path: Path) -> None:
    for name in ("dom.en.json", "dom.en.jsonl", "dom.de.json"):
        write(tmp_path, json.dumps(NESTED), name)
    with pytest.raises(UsageError, match=r"holds 'en' twice: keep dom\.en\.json or dom\.en\.jsonl"):
        find_files(str(tmp_path))
    assert load_data(str(tmp_path / "dom.en.jsonl")).languages == ("en",)


@pytest.mark.parametrize("ending", ["jsonl", "json.gz", "jsonl.gz"])
def test_a_misnamed_file_beside_the_set_is_reported(ending: str, tmp_path: Path) -> None:
    write(tmp_path, json.dumps(NESTED), "dom.en.json")
    write(tmp_path, json.dumps(NESTED), f"dom.DE.{ending}")
    data = load_data(str(tmp_path))
    assert data.languages == ("en",)
    assert [str(p) for p in data.problems] == [f"dom.DE.{ending}: file: name is not dom.<language>.json"]


def test_xquad_may_lie_there_as_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, lines(FLAT), "xquad.en.jsonl.gz")
    monkeypatch.setenv("XPROBE_XQUAD_DIR", str(tmp_path))
    assert load_data("xquad", strict=True).languages == ("en",)


def test_a_home_folder_of_nobody_is_no_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data at '~nobody-by-this-name/x'"):
        load_data("~nobody-by-this-name/x")


@pytest.mark.parametrize("spec", ["", json.dumps(FLAT * 20), "a\0b"], ids=["empty", "records as text", "no path"])
def test_text_that_is_no_path_is_no_data(spec: str) -> None:
    with pytest.raises(UsageError, match=r"no data at .*not one of builtin, xquad") as caught:
        load_data(spec)
    assert len(str(caught.value)) < 300


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UsageError, match=rf"cannot read the folder {tmp_path}: Permission denied"):
        load_data(str(tmp_path))
