"""Own data in languages that XQuAD does not have: every stage, the page, figures and comparison work."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.other_languages import LANGUAGES, write_other_languages
from xprobe_cli.main import main

import xprobe
from xprobe.qa.templates import load_template
from xprobe.scoring.error_types import classify
from xprobe.scoring.measures import score
from xprobe.scoring.normalisers import get_normaliser


@pytest.fixture(scope="module")
def study(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> xprobe.Study:
    folder = tmp_path_factory.mktemp("languages")
    data = write_other_languages(folder / "data")
    made = xprobe.run(
        tiny, data=data, setting=["en-x", "x-x"], out=folder / "run", bootstrap=20, permutations=20, template="plain"
    )
    return made.evaluate(xprobe.AnswerSettings(max_new_tokens=4))


def test_every_language_has_its_results(study: xprobe.Study) -> None:
    for setting in ("en-x", "x-x"):
        assert list(study[setting].boundaries.index) == list(LANGUAGES)
        own = study.answers[study.answers["setting"] == setting]
        assert own.groupby("language").size().to_dict() == dict.fromkeys(LANGUAGES, 6)
        assert own["f1"].between(0, 1).all()
    assert study.manifest.counts.skipped == study.manifest.counts.bad_records == {}


def test_what_is_not_known_of_these_languages_is_said_once(study: xprobe.Study) -> None:
    wording, rules = (
        [one for one in study.manifest.warnings if text in one] for text in ("no wording for", "scoring does not know")
    )
    assert wording == [
        "the template has no wording for fi, ja, sw, yo: prompts with contexts in these languages have that of en "
        "(--template FILE takes your own, docs/prompts.md)"
    ]
    assert rules == [
        "scoring does not know which words are articles in fi, ja, sw, yo (docs/data.md, Languages)"
    ]  # fmt: skip


def test_later_stages_and_pages_take_these_languages(study: xprobe.Study, tmp_path: Path) -> None:
    done = xprobe.oracle(study, xprobe.OracleSettings(limit=2, spans=False))
    done = done.attribute(xprobe.RelevanceSettings(limit=2)).patch(xprobe.PatchSettings(limit=2)).read_lenses()
    for table in (done.oracle, done.relevance):
        assert set(table["language"]) == set(LANGUAGES)
    page = done.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(f">{language}<" in page for language in LANGUAGES)
    assert len(done.plot.save(tmp_path / "figures", formats=["svg"])) > 5
    assert set(xprobe.compare([done, done]).languages["language"]) == set(LANGUAGES)
    assert main(["export", str(done.path), "--format", "latex", "--out", str(tmp_path / "tex")]) == 0


@pytest.mark.parametrize(
    ("language", "answer", "gold", "f1", "exact"),
    [
        ("ja", "ナイル川です", "ナイル川", 2 / 3, False),  # ナイル, 川 of ナイル, 川, で, す
        ("ja", "ナイル 川。", "ナイル川", 1.0, True),
        ("ja", "1998年", "1998年", 1.0, True),
        ("my", "ရန်ကုန်မြို့", "ရန်ကုန်", 8 / 9, False),  # four syllables of five
        ("fi", "Helsingissä", "helsingissä.", 1.0, True),
        ("fi", "Helsinki", "Helsingissä", 0.0, False),  # nothing takes endings away
        ("sw", "mashua tatu", "tatu", 2 / 3, False),
        ("yo", "mẹ́ta", "mẹ́ta".replace("ẹ́", "ẹ\u0301"), 1.0, True),
        ("az", "İzmir", "izmir", 1.0, True),
    ],
)
def test_answers_are_scored_by_words(language: str, answer: str, gold: str, f1: float, exact: bool) -> None:
    found = score(answer, [gold], language, get_normaliser("xprobe"))
    assert (found.f1, found.exact_match) == (pytest.approx(f1), exact)


def test_a_script_that_the_context_lacks_is_a_wrong_language() -> None:
    assert (
        classify("Хельсинки находится далеко", 0.0, "fi", "Peter osti kolme venettä Helsingissä.") == "wrong language"
    )
    assert classify("赤い家", 0.0, "ja", "アンナは1998年に赤い家を建てた。") == "content"
    assert classify("Хельсинки", 0.0, "ja", "アンナは1998年に赤い家を建てた。") == "wrong language"
    assert classify("mwaka 2001 alijenga nyumba", 0.0, "sw", "Anna alijenga nyumba nyekundu mwaka 1998.") == "content"


def test_a_code_with_a_region_has_the_wording_of_its_language() -> None:
    template = load_template("plain")
    assert template.cue_for("zh-TW") == template.cue_for("zh") != template.cue_for("en")
    assert template.cue_for("sw") == template.cue_for("en")
