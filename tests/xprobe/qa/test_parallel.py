"""Parallel sets line up by question id; the built-in one is whole; XQuAD reads without a single problem."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from xprobe.errors import DataError, UsageError
from xprobe.qa.parallel import BUILTIN_DIR, XQUAD_LANGUAGES, find_files, load_data
from xprobe.qa.records import Dataset, Example

MakeSet = Callable[..., Path]

EN = [
    ("The tower was built in 1874.", [("q1", "When?", "1874"), ("q2", "What?", "tower")]),
    ("Ada sold 40 boats.", [("q3", "Who?", "Ada"), ("q4", "How many?", "40")]),
]
DE = [
    ("Der Turm wurde 1874 gebaut.", [("q1", "Wann?", "1874"), ("q2", "Was?", "Turm")]),
    ("Ada verkaufte 40 Boote.", [("q3", "Wer?", "Ada"), ("q4", "Wie viele?", "40")]),
]
ZH = [
    ("塔建于1874年。", [("q1", "何时？", "1874年"), ("q2", "什么？", "塔")]),
    ("艾达卖了40条船。", [("q3", "谁？", "艾达"), ("q4", "几条？", "40条")]),
]


@pytest.fixture
def three(make_set: MakeSet) -> Dataset:
    return load_data(str(make_set({"zh": ZH, "en": EN, "de": DE})))


# -- which files ----------------------------------------------------------------------------------------------------


def test_a_folder_holds_one_language_per_file_english_first(make_set: MakeSet) -> None:
    folder = make_set({"zh": ZH, "en": EN, "de": DE})
    (folder / "README.md").write_text("not data")
    (folder / "notes.json").write_text("{}")
    assert list(find_files(str(folder))) == ["en", "de", "zh"]
    data = load_data(str(folder))
    assert data.languages == ("en", "de", "zh")
    assert [Path(name).name for name in data.files] == ["small.en.json", "small.de.json", "small.zh.json"]
    assert data.problems == ()
    assert {record.language for record in data.records["zh"].values()} == {"zh"}


def test_language_names_may_carry_a_script_or_region(make_set: MakeSet) -> None:
    assert load_data(str(make_set({"zh-Hant": ZH, "pt_BR": DE, "ast": EN}))).languages == ("ast", "pt_BR", "zh-Hant")


def test_one_file_with_a_language_in_its_name_is_a_set_of_one_language(make_set: MakeSet) -> None:
    data = load_data(str(make_set({"en": EN, "de": DE}) / "small.de.json"))
    assert data.languages == ("de",)
    assert data.ids == ("q1", "q2", "q3", "q4")
    assert data.problems == ()


@pytest.mark.parametrize("name", ["questions.json", "small.DE.json", "small.german.json", "small.de.txt"])
def test_one_file_without_a_language_in_its_name_is_refused_with_the_pattern(
    name: str, make_set: MakeSet, tmp_path: Path
) -> None:
    path = make_set({"de": DE}) / "small.de.json"
    path.rename(tmp_path / name)
    with pytest.raises(UsageError, match=rf"language of .*{name}.*NAME\.<language>\.json"):
        load_data(str(tmp_path / name))


def test_a_folder_with_several_sets_is_refused_and_names_them(make_set: MakeSet) -> None:
    make_set({"en": EN})
    folder = make_set({"en": EN, "de": DE}, name="other")
    with pytest.raises(UsageError, match=r"several sets \(other, small\)"):
        load_data(str(folder))


def test_a_folder_without_data_is_refused_with_the_pattern(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(UsageError, match=r"no data in .*NAME\.<language>\.json"):
        load_data(str(tmp_path))


def test_nothing_at_the_given_place_is_refused_with_the_sets_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no data at .*nowhere.*builtin, xquad"):
        load_data(str(tmp_path / "nowhere"))


def test_xquad_that_is_not_here_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XPROBE_XQUAD_DIR", raising=False)
    monkeypatch.setenv("XPROBE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"XQuAD is not here .*xprobe data fetch xquad"):
        load_data("xquad")
    monkeypatch.setenv("XPROBE_XQUAD_DIR", str(tmp_path / "gone"))
    with pytest.raises(UsageError, match=r"\$XPROBE_XQUAD_DIR is .*gone.*--data"):
        load_data("xquad")


def test_xquad_is_read_from_the_named_folder(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPROBE_XQUAD_DIR", str(make_set({"en": EN, "de": DE}, name="xquad")))
    assert load_data("xquad").languages == ("en", "de")


# -- which languages ------------------------------------------------------------------------------------------------


def test_only_the_languages_asked_for_and_needed_are_read(make_set: MakeSet) -> None:
    folder = make_set({"en": EN, "de": DE, "zh": ZH})
    (folder / "small.zh.json").write_text("broken")
    assert load_data(str(folder), ["de"]).languages == ("de",)
    assert load_data(str(folder), ["de"], needed=["en"]).languages == ("en", "de")
    assert load_data(str(folder), ["de"], needed=["fr"]).languages == ("de",)
    with pytest.raises(DataError, match=r"small\.zh\.json is not valid JSON"):
        load_data(str(folder))


def test_an_unknown_language_is_refused_with_those_there_are(make_set: MakeSet) -> None:
    folder = make_set({"en": EN, "de": DE})
    with pytest.raises(UsageError, match=r"language 'fr' is not in .*available: en, de"):
        load_data(str(folder), ["de", "fr"])


# -- lining up ------------------------------------------------------------------------------------------------------


def test_an_id_that_a_parallel_file_lacks_is_reported_and_the_rest_goes_on(make_set: MakeSet) -> None:
    without = [(DE[0][0], DE[0][1][:1]), DE[1]]
    data = load_data(str(make_set({"en": EN, "de": without, "zh": ZH})))
    assert [str(problem) for problem in data.problems] == ["small.de.json: id q2: id is missing in a parallel file"]
    assert list(data.records["de"]) == ["q1", "q3", "q4"]
    assert data.ids == ("q1", "q2", "q3", "q4")


def test_an_id_that_only_one_file_has_is_reported_for_every_other(make_set: MakeSet) -> None:
    more = [DE[0], (DE[1][0], [*DE[1][1], ("q5", "Was?", "Boote")])]
    data = load_data(str(make_set({"en": EN, "de": more, "zh": ZH})))
    assert [(p.file, p.where) for p in data.problems] == [("small.en.json", "id q5"), ("small.zh.json", "id q5")]
    assert {p.reason for p in data.problems} == {"id is missing in a parallel file"}


def test_strict_makes_a_missing_id_fatal(make_set: MakeSet) -> None:
    folder = str(make_set({"en": EN, "de": DE[:1]}))
    with pytest.raises(DataError, match=r"small\.de\.json: id q3: id is missing in a parallel file \(and 1 more\)"):
        load_data(folder, strict=True)


def test_a_paragraph_has_the_same_key_in_every_language(three: Dataset) -> None:
    for id_ in three.ids:
        assert len({three.records[language][id_].paragraph for language in three.languages}) == 1
    assert len({record.paragraph for record in three.records["en"].values()}) == 2


def test_a_file_that_lacks_a_paragraph_still_lines_up(make_set: MakeSet) -> None:
    data = load_data(str(make_set({"en": EN, "de": DE[1:]})))
    for id_ in ("q3", "q4"):
        assert data.records["de"][id_].paragraph == data.records["en"][id_].paragraph


@pytest.mark.parametrize(
    "languages",
    [
        {"en": EN, "de": [(DE[0][0], DE[0][1][:1]), (DE[0][0] + " ", DE[0][1][1:]), DE[1]]},
        {"en": EN, "de": DE[1:]},
        {"en": EN[:1], "de": DE[1:]},
        {"en": EN, "de": [*DE[1:], ("Bonn ist klein.", [("q5", "Wer?", "Bonn")])]},
        {"en": [EN[0], (EN[1][0], EN[1][1][:1])], "de": DE[1:]},
    ],
    ids=[
        "one splits a paragraph",
        "one lacks a paragraph",
        "nothing shared",
        "one lacks the first, the other the last",
        "one lacks a question too",
    ],
)
def test_a_group_has_one_context_and_a_context_one_group(languages: dict[str, Any], make_set: MakeSet) -> None:
    data = load_data(str(make_set(languages)))
    for language, records in data.records.items():
        pairs = {(record.paragraph, record.context) for record in records.values()}
        assert len({paragraph for paragraph, _ in pairs}) == len(pairs), f"two contexts share a key in {language}"
        assert len({context for _, context in pairs}) == len(pairs), f"two keys for one context in {language}"


def test_the_checksum_follows_the_bytes_and_the_fingerprint_the_records(make_set: MakeSet) -> None:
    folder = make_set({"en": EN, "de": DE})
    first = load_data(str(folder))
    assert load_data(str(folder)).source_sha256 == first.source_sha256
    assert load_data(str(folder), ["de"]).source_sha256 != first.source_sha256
    assert load_data(str(folder), ["de"]).fingerprint != first.fingerprint
    path = folder / "small.de.json"
    path.write_bytes(path.read_bytes() + b"\n")
    again = load_data(str(folder))
    assert (again.source_sha256 != first.source_sha256, again.fingerprint) == (True, first.fingerprint)
    path.write_text(path.read_text(encoding="utf-8").replace("?", "??"), encoding="utf-8")
    assert load_data(str(folder)).fingerprint != first.fingerprint


# -- examples of a setting ------------------------------------------------------------------------------------------


def test_en_x_asks_in_each_language_about_english_text(three: Dataset) -> None:
    examples = three.examples(["en-x"])
    assert len(examples) == 12
    for example in examples:
        english, own = three.records["en"][example.question_id], three.records[example.language][example.question_id]
        assert example.question == own.question
        assert (example.context, example.answer, example.answer_start) == (
            english.context, english.answer, english.answer_start,
        )  # fmt: skip
        assert (example.setting, example.context_language, example.paragraph) == ("en-x", "en", english.paragraph)


def test_x_x_stays_in_each_language(three: Dataset) -> None:
    examples = three.examples(["x-x"])
    assert len(examples) == 12
    for example in examples:
        own = three.records[example.language][example.question_id]
        assert (example.question, example.context, example.answer, example.answer_start) == (
            own.question, own.context, own.answer, own.answer_start,
        )  # fmt: skip
        assert (example.setting, example.context_language) == ("x-x", example.language)


def test_examples_have_all_gold_answers_of_their_context(make_set: MakeSet) -> None:
    folder = make_set({"en": EN, "de": DE})
    for name, text in (("small.en.json", "in 1874"), ("small.de.json", "wurde 1874")):
        document = json.loads((folder / name).read_text(encoding="utf-8"))
        paragraph = document["data"][0]["paragraphs"][0]
        start = paragraph["context"].index(text)
        paragraph["qas"][0]["answers"].append({"text": text, "answer_start": start})
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    answers = {example.id: example.answers for example in load_data(str(folder)).examples(["en-x", "x-x"])}
    assert answers["en-x/de/q1"] == answers["en-x/en/q1"] == answers["x-x/en/q1"] == ("1874", "in 1874")
    assert answers["x-x/de/q1"] == ("1874", "wurde 1874")
    assert answers["x-x/de/q2"] == ("Turm",)


def test_an_example_made_with_one_answer_has_that_answer() -> None:
    assert Example("en-x", "en", "q1", "p1", "en", "A context.", "Which?", "context", 2).answers == ("context",)


def test_examples_come_setting_by_setting_question_by_question_in_the_order_asked(three: Dataset) -> None:
    examples = three.examples(["x-x", "en-x"], ["zh", "en"], limit=2)
    assert [example.id for example in examples] == [
        "x-x/zh/q1", "x-x/en/q1", "x-x/zh/q2", "x-x/en/q2",
        "en-x/zh/q1", "en-x/en/q1", "en-x/zh/q2", "en-x/en/q2",
    ]  # fmt: skip


def test_examples_on_one_context_share_a_group(three: Dataset) -> None:
    examples = three.examples(["en-x", "x-x"])
    contexts: dict[str, set[str]] = {}
    for example in examples:
        contexts.setdefault(example.group, set()).add(example.context)
    assert all(len(found) == 1 for found in contexts.values())
    assert len(contexts) == 2 + 2 * 3


@pytest.mark.parametrize("setting", ["en-x", "x-x"])
@pytest.mark.parametrize("limit", [1, 3, 4, 99])
def test_the_limit_counts_questions_not_examples(setting: str, limit: int, three: Dataset) -> None:
    examples = three.examples([setting], limit=limit)
    asked = list(dict.fromkeys(example.question_id for example in examples))
    assert asked == ["q1", "q2", "q3", "q4"][:limit]
    assert len(examples) == 3 * len(asked)


def test_the_limit_skips_questions_that_nobody_can_ask(make_set: MakeSet) -> None:
    # q1 and q2 are not asked in German, q3 is not in English
    data = load_data(str(make_set({"en": [EN[0], (EN[1][0], EN[1][1][1:])], "de": DE[1:]})))
    assert [example.id for example in data.examples(["en-x"], ["de"], limit=1)] == ["en-x/de/q4"]
    assert {example.question_id for example in data.examples(["x-x"], ["de"], limit=1)} <= {"q3", "q4"}


def test_a_question_that_one_language_lacks_is_asked_in_the_others(make_set: MakeSet) -> None:
    data = load_data(str(make_set({"en": EN, "de": DE[1:], "zh": ZH})))
    asked = [(example.question_id, example.language) for example in data.examples(["en-x"])]
    assert [language for id_, language in asked if id_ == "q1"] == ["en", "zh"]
    assert [language for id_, language in asked if id_ == "q3"] == ["en", "de", "zh"]


def test_en_x_without_english_is_refused_with_what_to_do(make_set: MakeSet) -> None:
    data = load_data(str(make_set({"de": DE, "zh": ZH})))
    with pytest.raises(UsageError, match=r"en-x needs English.*only de, zh.*\.en\.json.*x-x"):
        data.examples(["en-x"])
    assert len(data.examples(["x-x"])) == 8


def test_examples_in_a_language_that_is_not_there_are_refused(three: Dataset) -> None:
    with pytest.raises(UsageError, match=r"language 'fr' is not in .*available: en, de, zh"):
        three.examples(["x-x"], ["fr"])


# -- the built-in set -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def builtin() -> Dataset:
    return load_data("builtin")


def builtin_questions() -> dict[str, list[dict[str, Any]]]:
    """Raw questions per language, for what records do not keep."""
    found = {}
    for path in sorted(BUILTIN_DIR.glob("*.json")):
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        found[path.name.split(".")[1]] = [qa for a in articles for p in a["paragraphs"] for qa in p["qas"]]
    return found


def test_the_built_in_set_has_no_problems(builtin: Dataset) -> None:
    assert builtin.problems == ()
    assert load_data("builtin", strict=True).fingerprint == builtin.fingerprint


def test_the_built_in_set_has_the_languages_of_xquad(builtin: Dataset) -> None:
    assert sorted(builtin.languages) == sorted(XQUAD_LANGUAGES)
    assert len(builtin.languages) == 12
    assert builtin.languages[0] == "en"


def test_the_built_in_set_has_twelve_paragraphs_of_three_questions_or_more(builtin: Dataset) -> None:
    for records in builtin.records.values():
        paragraphs = [record.paragraph for record in records.values()]
        assert len(set(paragraphs)) >= 12
        assert min(paragraphs.count(key) for key in set(paragraphs)) >= 3


def test_the_built_in_set_is_parallel(builtin: Dataset) -> None:
    reference = builtin.records["en"]
    for language, records in builtin.records.items():
        assert list(records) == list(reference), language
        assert [r.paragraph for r in records.values()] == [r.paragraph for r in reference.values()], language


def test_every_built_in_answer_stands_exactly_once_in_its_context(builtin: Dataset) -> None:
    for language, records in builtin.records.items():
        for record in records.values():
            starts = [at for at in range(len(record.context)) if record.context.startswith(record.answer, at)]
            assert starts == [record.answer_start], (language, record.id, record.answer)


def test_built_in_texts_are_in_normal_form(builtin: Dataset) -> None:
    for language, records in builtin.records.items():
        for record in records.values():
            for text in (record.context, record.question, record.answer):
                assert unicodedata.is_normalized("NFC", text), (language, record.id)


def test_built_in_questions_of_a_language_are_all_distinct(builtin: Dataset) -> None:
    for language, records in builtin.records.items():
        questions = [record.question.casefold() for record in records.values()]
        assert len(set(questions)) == len(questions), language
        assert len({record.context for record in records.values()}) == len({r.paragraph for r in records.values()})


def test_built_in_texts_are_translated(builtin: Dataset) -> None:
    for language, records in builtin.records.items():
        if language != "en":
            same = [id_ for id_, r in records.items() if r.question == builtin.records["en"][id_].question]
            assert same == [], language


def test_built_in_answers_are_of_at_least_four_types_alike_in_every_language() -> None:
    types = {language: {qa["id"]: qa["answer_type"] for qa in qas} for language, qas in builtin_questions().items()}
    assert len(set(types["en"].values())) >= 4
    for language, found in types.items():
        assert found == types["en"], language


# -- the real XQuAD -------------------------------------------------------------------------------------------------


def test_the_real_xquad_reads_without_a_problem(xquad_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPROBE_XQUAD_DIR", str(xquad_folder))
    data = load_data("xquad", strict=True)
    assert data.problems == ()
    assert sorted(data.languages) == sorted(XQUAD_LANGUAGES)
    # all 48 articles have 1190 questions, the first half of them 632
    assert {len(records) for records in data.records.values()} <= {632, 1190}
    for language, records in data.records.items():
        assert tuple(records) == data.ids, language
    assert len(data.examples(["en-x"])) == 12 * len(data.ids)
