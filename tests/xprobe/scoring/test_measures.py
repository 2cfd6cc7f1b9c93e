"""F1 and exact match: the known cases of the SQuAD script, and words in twelve languages."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xprobe.errors import UsageError
from xprobe.scoring import packages
from xprobe.scoring.measures import score
from xprobe.scoring.normalisers import NORMALISERS, get_normaliser

SQUAD, MLQA, XPROBE = (get_normaliser(name) for name in ("squad", "mlqa", "xprobe"))
LANGUAGES = ("ar", "de", "el", "en", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")


@pytest.mark.parametrize(
    ("answer", "golds", "f1", "equal"),
    [
        ("The Denver Broncos!", ["Denver Broncos"], 1.0, True),  # articles and punctuation go
        ("a  cat", ["the cat"], 1.0, True),
        ("Denver", ["Denver Broncos"], 2 / 3, False),
        ("Broncos Broncos", ["Broncos"], 2 / 3, False),  # a word counts as often as both have it
        ("", ["Denver"], 0.0, False),
        ("the", ["a"], 0.0, True),  # nothing is left of either: equal, and no word in common
        ("wrong", ["right", "Wrong."], 1.0, True),  # the best of several gold answers
        ("it is the right one", ["right", "it is wrong"], 4 / 7, False),
        ("U.S.", ["US"], 1.0, True),
        ("1,000", ["1000"], 1.0, True),
        ("anthem", ["them an"], 0.0, False),  # articles are whole words
        ("«Broncos»", ["Broncos"], 0.0, False),  # only ASCII punctuation goes
        ("野马队", ["丹佛野马队"], 0.0, False),  # no segmentation
    ],
)
def test_the_squad_script(answer: str, golds: list[str], f1: float, equal: bool) -> None:
    found = score(answer, golds, "en", SQUAD)
    assert found.f1 == pytest.approx(f1)
    assert found.exact_match is equal


@pytest.mark.parametrize(
    ("language", "answer", "gold", "f1"),
    [
        ("en", "«Broncos»", "the Broncos", 1.0),
        ("de", "die Panther", "Panther", 1.0),
        ("es", "El equipo", "equipo", 1.0),
        ("zh", "野马队", "丹佛野马队", 2 * 3 / 8),  # by character
        ("zh", "NFL 联盟", "NFL联盟", 1.0),
        ("vi", "những con mèo", "con mèo", 1.0),
        ("ar", "الفريق", "فريق", 1.0),
        ("hi", "टीम।", "टीम", 1.0),
    ],
)
def test_the_mlqa_script(language: str, answer: str, gold: str, f1: float) -> None:
    assert score(answer, [gold], language, MLQA).f1 == pytest.approx(f1)


@pytest.mark.parametrize(
    ("language", "answer", "gold"),
    [
        ("en", "“The Broncos”", "broncos"),
        ("de", "Die STRASSE", "straße"),
        ("es", "¿Las manzanas?", "manzanas"),
        ("el", "Ο ΤΟΙΧΟΣ", "τοίχος".replace("ί", "ι")),
        ("ro", "un câine", "câine"),
        ("ru", "«Москва»", "москва"),
        ("tr", "İSTANBUL", "istanbul"),
        ("tr", "IŞIK", "ışık"),
        ("ar", "الكِتَابُ", "كتاب"),
        ("hi", "टीम।", "टीम"),
        ("vi", "Hà Nội", "hà nội"),  # composed and decomposed letters
        ("th", "กรุงเทพ  มหานคร", "กรุงเทพมหานคร"),
        ("zh", "北京，中国", "北京中国"),
        ("en", "1,000 dollars", "1000 dollars"),
        ("ar", "١٬٠٠٠", "1000"),
        ("ar", "٣٫٥", "3.5"),
        ("de", "3,5 Millionen", "3.5 Millionen"),
        ("en", "don´t", "don’t"),
        ("en", "€5 million", "5 million"),
        ("en", "co\u200boperation\ufeff", "cooperation"),  # signs that nobody sees
        ("en", "A", "a"),  # an article may be the answer
        ("zh", "⊆", "⊆"),
        ("th", "นํ้า", "น้ำ"),  # two orders of the same signs
        ("th", "๒๔ แต้ม", "24 แต้ม"),
        ("ar", "٣٠٨ نقطة", "308 نقطة"),
        ("hi", "२४ अंक", "24 अंक"),
        ("ro", "oraşul Timişoara", "orașul Timișoara"),
        ("zh-TW", "北京 中国", "北京中国"),
    ],
)
def test_equal_answers_of_xprobe(language: str, answer: str, gold: str) -> None:
    assert score(answer, [gold], language, XPROBE) == (1.0, True)


@pytest.mark.parametrize(
    ("language", "answer", "gold"),
    [("th", "308 แต้มในฤดูกาลนี้", "308 แต้ม"), ("zh", "黑豹队的防守丢了308分", "308分"), ("zh", "丹佛野马队", "野马队")],
)
def test_words_of_thai_and_chinese_are_found_where_no_blanks_are(language: str, answer: str, gold: str) -> None:
    found = score(answer, [gold], language, XPROBE)
    assert 0 < found.f1 < 1
    assert not found.exact_match
    assert score("完全不同" if language == "zh" else "คนละเรื่อง", [gold], language, XPROBE).f1 == 0


@pytest.mark.parametrize(
    ("language", "answer", "gold"),
    [
        ("en", "35", "3.5"),
        ("en", "0125", "0.125"),
        ("en", "the", "a"),
        ("en", "", "?"),
        ("th", "⊆", "⊂"),
        ("tr", "ılık", "ilik"),
    ],
)
def test_answers_that_only_look_equal(language: str, answer: str, gold: str) -> None:
    assert score(answer, [gold], language, XPROBE) == (0.0, False)


def test_thai_words_with_a_vowel_that_nfkc_takes_apart_are_found() -> None:
    assert XPROBE.words("แม่น้ำทำให้", "th") == ["แม่น้ำ", "ทำให้"]
    assert score("ในแม่น้ำสายใหญ่", ["แม่น้ำ"], "th", XPROBE).f1 == pytest.approx(0.4)  # 1 of 4 words, 1 of 1


def by_the_definition(answer: str, gold: str) -> tuple[float, bool]:
    """F1 and equality of two answers, step by step as SQuAD v1.1 defines them."""
    words = []
    for text in (answer.lower(), gold.lower()):
        letters = "".join(letter for letter in text if letter not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
        words.append([word for word in letters.split() if word not in {"a", "an", "the"}])
    rest, common = list(words[1]), 0
    for word in words[0]:
        if word in rest:
            rest.remove(word)
            common += 1
    f1 = 2 * common / (len(words[0]) + len(words[1])) if common else 0.0
    return f1, words[0] == words[1]


@given(
    *[
        st.lists(
            st.sampled_from(["a", "The", "cat.", "cat", "sat;", "on,", "U.S.", "1,000", "mat!", "Ö", "—", "野马队"]),
            max_size=7,
        )
    ]
    * 2
)
def test_squad_follows_its_definition(answer: list[str], gold: list[str]) -> None:
    pair = " ".join(answer), " ".join(gold)
    found, (f1, equal) = score(pair[0], [pair[1]], "en", SQUAD), by_the_definition(*pair)
    assert found.f1 == pytest.approx(f1)
    assert found.exact_match is equal


@pytest.mark.parametrize("language", LANGUAGES)
@given(st.text(max_size=30))
def test_every_text_equals_itself_whatever_its_case_form(language: str, text: str) -> None:
    found = score(unicodedata.normalize("NFD", text), [unicodedata.normalize("NFC", text)], language, XPROBE)
    assert found.exact_match
    assert found.f1 == bool(XPROBE.words(text, language))


@given(st.text(max_size=30), st.lists(st.text(max_size=30), min_size=1, max_size=3), st.sampled_from(LANGUAGES))
def test_scores_keep_their_bounds(answer: str, golds: list[str], language: str) -> None:
    for normaliser in (SQUAD, XPROBE):
        found = score(answer, golds, language, normaliser)
        assert 0 <= found.f1 <= 1
        assert score(answer, golds[::-1], language, normaliser) == found
        assert found.f1 >= max(score(answer, [gold], language, normaliser).f1 for gold in golds)
        assert score(golds[0], golds, language, normaliser).exact_match
        if found.exact_match and normaliser.words(answer, language):
            assert found.f1 == 1


def test_a_normaliser_refuses_languages_that_it_is_not_defined_for() -> None:
    with pytest.raises(
        UsageError, match=r"'mlqa' is defined for ar, de, en, es, hi, vi, zh, not for 'th': use another"
    ):
        score("a", ["a"], "th", MLQA)


def test_unknown_normalisers_and_missing_gold_answers_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown normaliser 'bleu'; known: xprobe, mlqa, squad"):
        get_normaliser("bleu")
    with pytest.raises(UsageError, match="golds is empty"):
        score("a", [], "en", XPROBE)
    assert [get_normaliser(name).name for name in NORMALISERS] == list(NORMALISERS)


@pytest.mark.parametrize(("language", "module"), [("zh", "rjieba"), ("th", "pythainlp.tokenize")])
def test_a_missing_segmenter_is_named_with_its_remedy(
    language: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"pip install 'xprobe\[scoring\]', or choose another normaliser"):
        score("a", ["b"], language, XPROBE)
    assert score("a", ["a"], "en", XPROBE).exact_match
    assert packages.load_package("json", "json", "").dumps(1) == "1"
